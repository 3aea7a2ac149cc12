"""The confusion matrix as an image."""

import io

import numpy as np

from ulsam.base.errors import printable
from ulsam.training.class_scores import ClassScores

_NAMED = 60  # the most classes whose names can be read
_COUNTED = 25  # the most classes whose cells can hold a number


def confusion_png(scores: ClassScores) -> bytes:
    """A PNG: a row for each class that has images, a column for each that was named or has images.

    The color is the share of the row; with few classes each cell also holds its count.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = np.unique(scores.truths), np.union1d(scores.truths, scores.guesses)
    counts = np.zeros((len(rows), len(columns)), np.int64)
    np.add.at(counts, (np.searchsorted(rows, scores.truths), np.searchsorted(columns, scores.guesses)), 1)
    shares = counts / counts.sum(1, keepdims=True)
    side = min(4 + 0.28 * len(columns), 20)
    figure = Figure(figsize=(side, side), layout="constrained", dpi=100)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, shrink=0.7, label="share of the true class")
    axes.set(xlabel="named", ylabel="true class")
    for axis, numbers in ((axes.xaxis, columns), (axes.yaxis, rows)):
        names = [printable(scores.classes[number])[:40].replace("$", r"\$") for number in numbers]
        axis.set_ticks(range(len(names)) if len(columns) <= _NAMED else [], names if len(columns) <= _NAMED else [])
    axes.tick_params(axis="x", labelrotation=90)
    if len(columns) <= _COUNTED:
        for row, column in zip(*np.nonzero(counts), strict=True):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=color, fontsize=8)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
