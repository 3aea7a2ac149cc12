"""What a run leaves for its reader: metrics.csv, curves.png, summary.json."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

from safetensors.torch import save as to_safetensors
from torch import nn

from ulsam.base.extras import installed
from ulsam.base.files import write_atomic, write_json
from ulsam.model.build import file_content
from ulsam.model.spec import ModelSpec
from ulsam.surgery.cost import Cost
from ulsam.training.best import kept_lines
from ulsam.training.checkpoint import Position
from ulsam.training.config import TrainConfig
from ulsam.training.distill import Teacher
from ulsam.training.evaluate import Scores
from ulsam.training.label_scores import LabelScores
from ulsam.training.train_summary import CostEntry, EpochEntry, ImageCounts, ScoreEntry, TeacherEntry, TrainSummary

COLUMNS = ("epoch", "lr", "train_loss", "val_loss", "val_top1", "val_top5", "seconds", "images_per_second")
LABEL_COLUMNS = ("epoch", "lr", "train_loss", "val_loss", "val_map", "val_f1", "seconds", "images_per_second")
"""Of a model that gives several labels an image."""


def epoch_row(at: Position, rate: float, scores: Scores | LabelScores | None, several: bool = False) -> EpochEntry:
    """What ``metrics.csv`` says of the epoch that ends at this position; ``scores`` is None if it was not measured."""
    names = ("map", "f1") if several else ("top1", "top5")
    row = {
        "epoch": at.epoch + 1,
        "lr": rate,
        "train_loss": at.loss_sum / at.images,
        "val_loss": scores and scores.loss,
        **{f"val_{name}": scores and getattr(scores, name) for name in names},
        "seconds": round(at.seconds, 2),
        "images_per_second": round(at.images / at.seconds, 1),
    }
    return cast(EpochEntry, row)


def epoch_line(row: EpochEntry, epochs: int, split: str) -> str:
    """How the epoch of this row was, for the user.

    >>> row = {"epoch": 1, "train_loss": 0.5, "val_loss": 0.25, "val_top1": 0.75, "images_per_second": 90.0}
    >>> epoch_line(row, 3, "validation")
    'epoch   1/3: training loss 0.5000, validation top-1 75.00 %, loss 0.2500 (90 img/s)'
    """
    measured = "not measured"
    if row["val_loss"] is not None:
        score = f"mAP {percent(row['val_map'])}" if "val_map" in row else f"top-1 {percent(row['val_top1'])}"
        measured = f"{split} {score}, loss {row['val_loss']:.4f}"
    return (
        f"epoch   {row['epoch']}/{epochs}: training loss {row['train_loss']:.4f}, {measured} "
        f"({row['images_per_second']:.0f} img/s)"
    )


def write_metrics(run: Path, rows: Sequence[EpochEntry]) -> None:
    """Write ``metrics.csv``, a row an epoch: shares 0..1, losses in nats; an epoch that was not measured has gaps."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_atomic(run / "metrics.csv", text.getvalue())


def draw_curves(run: Path, rows: Sequence[EpochEntry], split: str, *, loss: str = "cross-entropy (nats)") -> None:
    """Draw ``curves.png``: loss and scores against epochs; ``split`` is what was measured on, ``loss`` the axis's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    losses, accuracy = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in rows]
    several = "val_map" in rows[0]
    shown: dict[Literal["val_map", "val_f1", "val_top1", "val_top5"], str] = (
        {"val_map": "mAP", "val_f1": "mean F1"} if several else {"val_top1": "top-1", "val_top5": "top-5"}
    )
    measured = [row for row in rows if row["val_loss"] is not None]
    losses.plot(epochs, [row["train_loss"] for row in rows], "o-", ms=3, label="training")
    losses.plot([row["epoch"] for row in measured], [row["val_loss"] for row in measured], "s--", ms=3, label=split)
    losses.set(xlabel="epoch", ylabel=loss, title="Loss")
    losses.legend(frameon=False)
    for (key, label), style in zip(shown.items(), ("s--", "^:"), strict=True):
        points = [(row["epoch"], 100 * share) for row in measured if (share := row[key]) is not None]
        accuracy.plot([at for at, _ in points], [share for _, share in points], style, ms=3, label=label)
    title = "Labels" if several else "Accuracy"
    accuracy.set(xlabel="epoch", ylabel=f"{split} {'scores' if several else 'accuracy'} (%)", title=title)
    accuracy.legend(frameon=False)
    for axes in (losses, accuracy):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    write_atomic(run / "curves.png", buffer.getvalue())


def percent(share: float | None) -> str:
    """A share as text.

    >>> percent(0.5), percent(None)
    ('50.00 %', 'undefined')
    """
    return "undefined" if share is None else f"{100 * share:.2f} %"


def score_entry(scores: Scores | LabelScores, classes: Sequence[str]) -> ScoreEntry:
    """Scores as JSON: shares 0..1, the 95 % interval of top-1 (Wilson's, over the choice of images), every class."""
    if isinstance(scores, LabelScores):
        return scores.entry()
    return {
        "images": scores.images,
        "top1": scores.top1,
        "top1_interval_95": list(scores.interval),
        "top5": scores.top5,
        "loss": scores.loss,
        "unreadable": len(scores.unreadable),
        "per_class": scores.per_class(classes),
    }


def cost_entry(cost: Cost) -> CostEntry:
    """A cost as JSON, with its counting rule."""
    return {
        "params": cost.params,
        "macs": cost.macs,
        "activations": cost.activations,
        "input_size": list(cost.input_size),
        "rule": cost.rule,
    }


def cost_line(edited: Cost, base: Cost) -> str:
    """Parameters and MACs of a model, and the change against its base model."""

    def change(now: int, before: int) -> str:
        return "" if now == before else f" ({100 * (now / before - 1):+.1f} % against the base model)"

    size = "x".join(map(str, edited.input_size))
    return (
        f"{edited.params / 1e6:.3f} M parameters{change(edited.params, base.params)}, "
        f"{edited.macs / 1e6:.1f} M MACs{change(edited.macs, base.macs)} at {size}"
    )


def data_lines(images: ImageCounts, split: str, classes: int, cached: str | None) -> list[str]:
    """What is trained on: how many images of how many classes, and what is ``cached`` of them."""
    data = f"data    {images['train']} training, {images['val']} {split} images of {classes} classes"
    return [data, *([f"cache   {cached}"] if cached else [])]


def model_lines(config: TrainConfig, cost: Cost, base_cost: Cost, *, prepared: nn.Module | None) -> list[str]:
    """What is trained: the settings' model, or a prepared one in its place, and its cost."""
    named = f"{config.model}; edits: {'; '.join(config.edits) or 'none'}"
    if prepared is not None:
        named = f"a prepared {type(prepared).__name__} for {config.model}"
    return [f"model   {named}", f"cost    {cost_line(cost, base_cost)}"]


def result_lines(summary: TrainSummary, run: Path) -> list[str]:
    """What a run has come to, for its reader: top-1 with its interval, or mAP, and what is noteworthy."""
    scores = summary["scores"]
    on = f"on {scores['images']} {summary['split']} images; {run}"
    if "map" in scores:
        lines = [f"result  mAP {percent(scores['map'])}, mean F1 {percent(scores['f1'])} {on}"]
        if scores["map"] is None:
            lines.append("note    no label has a validation image: the thresholds stay at 0.5")
        else:
            good = "" if summary["kept"]["chosen_on"] else ", mAP is not"
            lines.append(f"note    the thresholds were chosen on these images: F1 is a little too good there{good}")
    else:
        low, high = scores["top1_interval_95"]
        lines = [
            f"result  top-1 {100 * scores['top1']:.2f} % (95 % interval {100 * low:.1f} to {100 * high:.1f}), "
            f"top-5 {100 * scores['top5']:.2f} % {on}"
        ]
    lines += kept_lines(summary["kept"], summary["config"]["epochs"])
    if summary["prepared"]:
        lines.append("note    no spec builds this model: its weights alone are saved, in weights.safetensors")
    if count := len(summary["unreadable"]["train"]) + len(summary["unreadable"]["val"]):
        lines.append(f"note    {count} images could not be read; they are named above and in summary.json")
    return lines


def write_result(run: Path, summary: TrainSummary, model: nn.Module, spec: ModelSpec | None) -> None:
    """Write the model file, the curves and, last, ``summary.json``: with it the run is finished.

    Without a spec the weights alone are kept, in ``weights.safetensors``: nothing could build the model.
    """
    if spec is not None:
        write_atomic(run / "model.safetensors", file_content(model, spec))
    else:
        state = {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}
        write_atomic(run / "weights.safetensors", to_safetensors(state))
    if installed("matplotlib"):
        loss = "cross-entropy and distillation" if summary["teacher"] else "cross-entropy (nats)"
        loss = "binary cross-entropy (nats)" if "map" in summary["scores"] else loss
        draw_curves(run, summary["epochs"], summary["split"], loss=loss)
    write_json(run / "summary.json", summary)


def teacher_entry(teacher: Teacher) -> TeacherEntry:
    """A teacher as JSON: its spec, the SHA-256 of its file, and where its feature maps were compared."""
    return {"spec": spec_entry(teacher.spec), "sha256": teacher.digest, "places": list(teacher.places)}


def spec_entry(spec: ModelSpec) -> dict[str, Any]:
    """A spec as JSON."""
    entry: dict[str, Any] = json.loads(spec.to_json())
    return entry
