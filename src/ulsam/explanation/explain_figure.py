"""An explanation as a matplotlib figure, to change and to print; panels of whole folders are drawn by Pillow."""

from typing import Any

from matplotlib.figure import Figure

from ulsam.explanation import captions as words
from ulsam.explanation.drawing import COLOURS, STRENGTH
from ulsam.explanation.explainer import Explanation

MOST_COLUMNS = 8


def draw(found: Explanation) -> Figure:
    """The image, its most probable classes, the CAM and all attention maps, with their colour scales."""
    columns = min(MOST_COLUMNS, max([4, *(len(layer.maps) for layer in found.layers)]))
    lines = [-(-len(layer.maps) // columns) for layer in found.layers]
    figure = Figure(figsize=(2.1 * columns + 0.8, 2.6 * (1 + sum(lines))), layout="constrained")
    parts: Any = figure.subfigures(1 + len(lines), 1, squeeze=False, height_ratios=[1, *lines])
    head, *rows = parts[:, 0]
    image, classes, cam = head.subplots(1, 3, width_ratios=[1, columns - 2, 1])
    image.imshow(found.pixels)
    image.set_axis_off()
    names, shares = zip(*reversed(found.top()), strict=True)
    bars = classes.barh(range(len(names)), shares, height=0.5, color="#3f5a8c")
    classes.bar_label(bars, [words.percent(share) for share in shares], padding=3, fontsize=8)
    classes.set_yticks(range(len(names)), names, fontsize=8)
    classes.set(xlim=(0, 1.15), xticks=[])
    classes.spines[["top", "right", "bottom"]].set_visible(False)
    cam.set_title("\n".join(["Grad-CAM++", *words.cam_caption("this model", found)]), fontsize=8)
    _scale(head, _lay(cam, found, found.cam, 1.0), [cam], [0, 1], ["0", "max"])
    for layer, row in zip(found.layers, rows, strict=True):
        row.suptitle(words.layer_heading(layer), fontsize=9, fontweight="bold", x=0.01, ha="left")
        grid = row.subplots(-(-len(layer.maps) // columns), columns, squeeze=False)
        top, values = words.layer_scale(layer), layer.maps * layer.maps[0].size
        for axes, one, caption in zip(grid.flat, values, words.map_captions(layer), strict=False):
            drawn = _lay(axes, found, one, top)
            axes.set_title("\n".join(caption), fontsize=8)
        for axes in grid.flat[len(values) :]:
            axes.set_axis_off()
        _scale(row, drawn, list(grid.flat), [0, 1, top], ["0", "uniform", words.scale_text(top)])
    if not found.layers:
        figure.text(0.5, 0, words.NO_LAYER, ha="center", va="bottom", fontsize=8)
    return figure


def _lay(axes: Any, found: Explanation, values: Any, top: float) -> Any:
    """Draw a map of values from 0 to ``top`` on the image in grey."""
    height, width = found.pixels.shape[:2]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    axes.imshow(found.pixels.mean(2), cmap="gray", vmin=0, vmax=255)
    axes.set_axis_off()
    look = {"cmap": COLOURS, "vmin": 0, "vmax": top, "interpolation": "bilinear"}
    return axes.imshow(values, alpha=STRENGTH, extent=extent, **look)


def _scale(figure: Any, drawn: Any, axes: list[Any], ticks: list[float], labels: list[str]) -> None:
    bar = figure.colorbar(drawn, ax=axes, fraction=0.03, pad=0.01)
    bar.solids.set_alpha(1)
    bar.set_ticks(ticks, labels=labels, fontsize=7)
