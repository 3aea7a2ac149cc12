"""The demonstration: train a model on drawn birds, take a part of its work away, and restore what that broke."""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ulsam.base.extras import check_plots
from ulsam.base.files import write_atomic, write_json
from ulsam.base.logs import say
from ulsam.data.birds import draw_birds
from ulsam.data.opening import open_data, open_split
from ulsam.deploy.evaluate import evaluate
from ulsam.model.build import load, save
from ulsam.model.spec import Edit, ModelSpec
from ulsam.surgery.cost import cost
from ulsam.surgery.reconstruct import reconstruct
from ulsam.training.config import TrainConfig
from ulsam.training.evaluate import ALONE
from ulsam.training.sample import draw_sample
from ulsam.training.train import train

CAUTION = "One run with one seed proves nothing: another seed can turn the order."
BIRDS: dict[str, Any] = {"classes": 8, "train": 120, "val": 60, "size": 96}
TRAINING: dict[str, Any] = {
    "model": "mobilenetv1_050",
    "size": 96,
    "epochs": 16,  # beyond those in which rounding decides when a mark is learned
    "batch_size": 16,
    "opt": "adamw",
    "lr": 4e-3,
    "weight_decay": 0.05,
    "smoothing": 0.0,
    "crop_scale": [0.8, 1.0],
    "val_every": 1,
    "layout": "channels_last",  # no probe: all models, and every machine, take the same
    "amp": "none",
    "compile": "none",
}
FINE_TUNING: dict[str, Any] = {"epochs": 2, "lr": 5e-4, "warmup_epochs": 0, "reconstruct_images": 0}
BLOCKS = "10,11,12"  # three of the five equal ones
EDITS = {"blocks removed": f"remove {BLOCKS}", "ULSAM in their place": f"replace {BLOCKS} g=4"}
IMAGES = 512  # for reconstruction
STEPS = 500  # of it
STAGES = ("at once", "reconstructed", "fine-tuned")


@dataclasses.dataclass(frozen=True)
class DemoRow:
    """One model of the demonstration: its cost for one image, and its top-1 as a share after each step."""

    name: str
    params: int
    macs: int
    top1: Mapping[str, float]


def run_demo(
    out: str | Path,
    seed: int = 0,
    *,
    birds: Mapping[str, Any] = BIRDS,
    settings: Mapping[str, Any] | None = None,
    steps: int = STEPS,
) -> list[DemoRow]:
    """Draw the birds, train the base model, edit, reconstruct and fine-tune it, all into the new folder ``out``.

    The base model is fine-tuned for as long as the edited ones. ``out/demo.json`` holds what is returned,
    ``out/demo.png`` shows it.

    Args:
        out: the folder.
        seed: of the drawings and of all trainings.
        birds: how many to draw, and their size in pixels: arguments of `ulsam.data.birds.draw_birds`.
        settings: of the base model's training, in place of the demonstration's own.
        steps: of reconstruction.

    Returns:
        The base model and the edited ones.

    Raises:
        UlsamError: ``out`` exists and is not empty, or cannot be written, or the seed is negative.
    """
    check_plots("ulsam demo")
    out = Path(out)
    data = out / "birds"
    config = TrainConfig.from_mapping({**TRAINING, **(settings or {}), "data": str(data), "seed": seed})
    draw_birds(data, seed=seed, **birds)  # after the settings are known to be sound
    say("base model: training")
    trained = train(config, out / "base")["scores"]["top1"]
    weights = out / "base" / "model.safetensors"
    rows = [_row("base model", *load(weights), {"at once": trained, **_fine_tuned(config, weights, out)})]
    for name, text in EDITS.items():
        model, spec = load(weights)
        edit = Edit.parse(text)
        with torch.random.fork_rng(devices=[]):  # the new layers' weights are of this seed too
            torch.manual_seed(seed)
            edit.apply(model, spec.input_size)
        spec = dataclasses.replace(spec, edits=(*spec.edits, edit))
        top1 = {"at once": _top1(model, spec, data)}
        say(f"{name}: {100 * top1['at once']:.1f} % at once; reconstructing")
        reconstruct(model, draw_sample(open_data(str(data))[0], spec, IMAGES, ALONE).images, steps=steps)
        top1["reconstructed"] = _top1(model, spec, data)
        say(f"{name}: {100 * top1['reconstructed']:.1f} % reconstructed, without labels; fine-tuning")
        save(model, spec, out / f"{text.split()[0]}.safetensors")
        top1 |= _fine_tuned(dataclasses.replace(config, edits=[text]), out / f"{text.split()[0]}.safetensors", out)
        rows.append(_row(name, model, spec, top1))
    write_json(out / "demo.json", [dataclasses.asdict(row) for row in rows])
    write_atomic(out / "demo.png", draw(data, rows))
    return rows


def _fine_tuned(config: TrainConfig, weights: Path, out: Path) -> dict[str, float]:
    """The top-1 of this model file after a little more training."""
    config = dataclasses.replace(config, weights=str(weights), **FINE_TUNING)
    name = weights.parent.name if weights.parent != out else weights.stem
    return {"fine-tuned": train(config, out / f"{name}-fine-tuned")["scores"]["top1"]}


def _top1(model: nn.Module, spec: ModelSpec, data: Path) -> float:
    return evaluate(model, data, spec=spec).scores.top1


def _row(name: str, model: nn.Module, spec: ModelSpec, top1: Mapping[str, float]) -> DemoRow:
    found = cost(model, spec.input_size)
    return DemoRow(name, found.params, found.macs, dict(top1))


def table(rows: Sequence[DemoRow]) -> str:
    """The models, a line each: cost, and top-1 after each step."""
    lines = [f"{'':22}{'parameters':>11}{'MACs':>13}   " + "".join(f"{stage:>15}" for stage in STAGES)]
    for row in rows:
        shares = (f"{100 * row.top1[stage]:.1f} %" if stage in row.top1 else "" for stage in STAGES)
        lines.append(f"{row.name:22}{row.params:11,}{row.macs:13,}   " + "".join(f"{share:>15}" for share in shares))
    return "\n".join(lines)


def draw(data: Path, rows: list[DemoRow]) -> bytes:
    """A PNG: a bird of every class, top-1 after each step, and cost against the base model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), dpi=150, layout="constrained")  # pages show it half as wide: text stays readable
    panels: Any = figure.subfigures(2, 1, height_ratios=(1.2, 1))
    upper, lower = panels
    left, right = lower.subplots(1, 2, width_ratios=(1.7, 1))
    birds = open_split(str(data), "val")
    labels = [] if birds.labels is None else birds.labels.tolist()
    first = {label: number for number, label in reversed(list(enumerate(labels)))}
    grid = upper.subplots(2, (len(first) + 1) // 2).flat
    for axes, label in zip(grid, sorted(first), strict=False):
        axes.imshow(birds.fetch(first[label])[0])  # type: ignore[union-attr]
        axes.set_title(birds.classes[label].replace("-", "\n"), fontsize=12)
    for axes in upper.axes:
        axes.axis("off")

    base, *edited = rows
    steps = left
    for row, marker in zip(edited, ("s--", "o-"), strict=True):
        shares = [100 * row.top1[stage] for stage in STAGES]
        steps.plot(STAGES, shares, marker, ms=7, label=row.name)
    for stage, line, name in (("at once", ":", "base model"), ("fine-tuned", "-", "base model, fine-tuned as long")):
        steps.axhline(100 * base.top1[stage], color="0.4", linestyle=line, label=name)
    steps.set(ylabel="validation top-1 (%)", title="accuracy after each step")
    steps.legend(fontsize=10)
    steps.grid(alpha=0.3)

    bars = right
    for shift, row, color in zip((-0.2, 0.2), edited, ("C0", "C1"), strict=True):
        shares = [100 * row.params / base.params, 100 * row.macs / base.macs]
        drawn = bars.bar([shift, 1 + shift], shares, width=0.38, color=color, label=row.name)
        bars.bar_label(drawn, fmt="%.0f %%", fontsize=11)
    bars.set_xticks(range(2), ["parameters", "MACs"])
    bars.set(ylabel="% of the base model", title="cost", ylim=(0, 105))
    for axes in (steps, bars):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=11)
    figure.suptitle(CAUTION, fontsize=12)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
