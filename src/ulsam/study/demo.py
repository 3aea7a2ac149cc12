"""The demonstration: draw birds, train a model without and with ULSAM under one recipe, show both."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ulsam.base.extras import check_plots
from ulsam.base.files import write_atomic
from ulsam.data.birds import draw_birds
from ulsam.data.opening import open_split
from ulsam.training.config import TrainConfig
from ulsam.training.train import train

CAUTION = "One run with one seed proves nothing: another seed can turn the order."
BIRDS: dict[str, Any] = {  # one bill: models of this size may take very long to see that bills differ
    "classes": [f"{bars}-{spots}-shortbill" for bars in ("broadbar", "finebar") for spots in ("spotted", "speckled")],
    "train": 400,
    "val": 100,
    "size": 96,
}
RECIPE: dict[str, Any] = {
    "model": "mobilenetv1_050",
    "size": 96,
    "epochs": 9,
    "batch_size": 16,
    "opt": "adamw",
    "lr": 4e-3,
    "weight_decay": 0.05,
    "smoothing": 0.0,
    "crop_scale": [0.8, 1.0],
    "val_every": 1,
    "layout": "channels_last",  # no probe: both models, and every machine, take the same
    "amp": "none",
    "compile": "none",
}
EDIT = "replace 12 g=4"  # the paper's row for MobileNet-V1 at half width


def run_demo(out: str | Path, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Draw the birds, train both models, and write ``comparison.png``, all into the new folder ``out``.

    Returns:
        The summaries of the two runs, ``"base"`` and ``"ulsam"``; see `ulsam.training.train.train`.

    Raises:
        UlsamError: ``out`` exists and is not empty, or cannot be written, or the seed is negative.
    """
    check_plots("ulsam demo")
    out = Path(out)
    data = out / "birds"
    configs = {
        name: TrainConfig.from_mapping({**RECIPE, "data": str(data), "edits": edits, "seed": seed})
        for name, edits in (("base", []), ("ulsam", [EDIT]))
    }
    draw_birds(data, seed=seed, **BIRDS)  # after the settings are known to be sound
    summaries = {name: train(config, out / name) for name, config in configs.items()}
    write_atomic(out / "comparison.png", draw_comparison(data, summaries))
    return summaries


def table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """The two models beside each other, a line each."""
    lines = [f"{'model':28} {'parameters':>10} {'MACs':>12} {'top-1':>7}  95 % interval"]
    for summary in summaries.values():
        config, scores = summary["config"], summary["scores"]
        model = " ".join([config["model"], *config["edits"]])
        low, high = scores["top1_interval_95"]
        lines.append(
            f"{model:28} {summary['cost']['params']:10,} {summary['cost']['macs']:12,} "
            f"{100 * scores['top1']:5.1f} %  {100 * low:.1f} to {100 * high:.1f}"
        )
    return "\n".join(lines)


def draw_comparison(data: Path, summaries: Mapping[str, Mapping[str, Any]]) -> bytes:
    """A PNG: a bird of every class, validation accuracy by epoch, and cost against the base model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels: Any = figure.subfigures(1, 3, width_ratios=(1.35, 1.2, 0.9))
    left, middle, right = panels
    birds = open_split(str(data), "val")
    first = {label: number for number, label in reversed(list(enumerate(birds.labels or ())))}
    grid = left.subplots(2, (len(first) + 1) // 2).flat
    for axes, label in zip(grid, sorted(first), strict=False):
        axes.imshow(birds.fetch(first[label])[0])  # type: ignore[union-attr]
        axes.set_title(birds.classes[label].replace("-", "\n"), fontsize=7)
    for axes in left.axes:
        axes.axis("off")

    curve = middle.subplots()
    for (name, summary), style in zip(summaries.items(), ("o-", "s--"), strict=True):
        rows = [row for row in summary["epochs"] if row["val_top1"] is not None]
        curve.plot([row["epoch"] for row in rows], [100 * row["val_top1"] for row in rows], style, ms=4, label=name)
    curve.set(xlabel="epoch", ylabel="validation top-1 (%)", title=f"seed {summaries['base']['config']['seed']}")
    curve.xaxis.set_major_locator(MaxNLocator(integer=True))
    curve.legend(frameon=False)
    curve.grid(alpha=0.3)
    curve.spines[["top", "right"]].set_visible(False)

    bars = right.subplots()
    kinds = {"params": "parameters", "macs": "MACs"}
    base = summaries["base"]["cost"]
    for shift, (name, summary), colour in zip((-0.2, 0.2), summaries.items(), ("C0", "C1"), strict=True):
        shares = [100 * summary["cost"][kind] / base[kind] for kind in kinds]
        drawn = bars.bar([place + shift for place in range(2)], shares, width=0.38, color=colour, label=name)
        bars.bar_label(drawn, fmt="%.0f", fontsize=8)
    bars.set_xticks(range(2), list(kinds.values()))
    bars.set(ylabel="% of the base model", title="cost")
    bars.spines[["top", "right"]].set_visible(False)
    figure.suptitle(CAUTION, fontsize=9)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
