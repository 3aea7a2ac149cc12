"""Measure a trained model that gives several labels an image."""

import os
from dataclasses import dataclass
from typing import Any

from torch import nn

from ulsam import runtime
from ulsam.base.errors import printable
from ulsam.base.text_table import as_csv
from ulsam.deploy.evaluate import to_measure
from ulsam.model.build import load, meta_model, read_spec
from ulsam.model.pretrained import is_pretrained_name
from ulsam.model.spec import ModelSpec
from ulsam.model.trained import names
from ulsam.surgery.cost import cost
from ulsam.training.label_scores import LABEL_COLUMNS, LabelScores, evaluate_label_batches
from ulsam.training.summary import cost_entry, percent, spec_entry


@dataclass(frozen=True)
class LabelEvaluation:
    """What a model that gives several labels an image scores on one split; ``print`` shows it.

    Attributes:
        scores: average precision, precision, recall and F1, of each class too.
        split: that was measured; "all" for a table without splits.
        spec: of the model, with the thresholds that F1 is measured at.
    """

    scores: LabelScores
    split: str
    spec: ModelSpec

    def __str__(self) -> str:
        macro, micro = self.scores.macro(), self.scores.micro()
        known = {name: row for name, row in self.scores.table().items() if row["images"]}
        worst = sorted((row["average_precision"], name, row["images"]) for name, row in known.items())[:5]
        unreadable = self.scores.unreadable
        means = ", ".join(f"{name} {percent(macro[name])}" for name in ("precision", "recall"))
        lines = [
            f"mAP     {percent(self.scores.map)}",
            f"F1      {percent(self.scores.f1)} (over all labels at once {percent(micro['f1'])})",
            f"means   {means}, at the thresholds of the model",
            f"loss    {self.scores.loss:.4f}",
            f"on      {self.scores.images} images, split {self.split}"
            + (f"; {len(unreadable)} unreadable ones left out" if unreadable else ""),
        ]
        if worst:
            named = (f"{printable(name)} AP {100 * ap:.0f} % of {count}" for ap, name, count in worst)
            lines.append("lowest  " + "; ".join(named))
        if absent := len(self.spec.classes) - len(known):
            lines.append(f"note    {absent} of {len(self.spec.classes)} classes have no image here, and no score")
        return "\n".join(lines)

    def csv(self) -> str:
        """The table of the classes, with a header: shares 0..1, empty where a share of nothing is meant."""
        rows = ([name, *row.values()] for name, row in self.scores.table().items())
        return as_csv([["class", *LABEL_COLUMNS], *rows])

    def entry(self) -> dict[str, Any]:
        """All of it as JSON, with the model's cost."""
        return {
            "split": self.split,
            "scores": self.scores.entry(),
            "cost": cost_entry(cost(meta_model(self.spec), self.spec.input_size)),
            "spec": spec_entry(self.spec),
        }


def gives_several(model: nn.Module | str | os.PathLike[str], spec: ModelSpec | None = None) -> bool:
    """Whether a model gives several labels an image; as of :func:`evaluate_labels`.

    Raises:
        UlsamError: there is no such model.
    """
    if not isinstance(model, nn.Module) and os.fspath(model).endswith(".onnx"):
        return runtime.load(model).thresholds is not None
    if spec is None and isinstance(model, str) and model not in names() and is_pretrained_name(model):
        return load(model)[1].several
    if isinstance(model, nn.Module):
        return spec is not None and spec.several
    return read_spec(model).several


def evaluate_labels(
    model: nn.Module | str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    spec: ModelSpec | None = None,
    split: str | None = None,
    data_dir: str | None = None,
    classes_by_number: bool = False,
    batch_size: int = 64,
    workers: int = 2,
    device: str = "auto",
) -> LabelEvaluation:
    """Measure a model that gives several labels an image: mAP, and precision, recall and F1 at its thresholds.

    Under torchrun each process measures its share of the images, and all get the sum.

    Args:
        model: a model file, or NAME.onnx of `ulsam.export`; or a model in memory, which is moved to the device.
        data: a CSV of paths and labels.
        spec: of a model in memory.
        split: of the table, as of `ulsam.evaluate`.
        data_dir: where the paths of the table count from.
        classes_by_number: take the data's classes for the model's by their position.
        batch_size: images a step.
        workers: processes that read images.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.

    Raises:
        UlsamError: as of `ulsam.evaluate`; or the model gives one class an image, or the data has.
        NotFinite: the model's outputs are not finite.

    >>> import dataclasses, tempfile
    >>> from pathlib import Path
    >>> import ulsam
    >>> from ulsam.data.birds import draw_birds
    >>> birds = draw_birds(tempfile.mkdtemp() + "/birds", classes=2, train=1, val=1, size=32)
    >>> names = [path.relative_to(birds).as_posix() for path in sorted(birds.glob("val/*/*"))]
    >>> table = birds / "labels.csv"
    >>> _ = table.write_text(f"path,labels\\n{names[0]},small;red\\n{names[1]},red\\n")
    >>> spec = ulsam.make_spec("test_efficientnet", ["red", "small"], size=32)
    >>> spec = dataclasses.replace(spec, thresholds=(0.5, 0.5))
    >>> found = evaluate_labels(ulsam.build(spec)[0], table, spec=spec, workers=0)
    >>> found.scores.images, found.scores.table()["red"]["average_precision"]
    (2, 1.0)
    """
    with to_measure(
        model,
        data,
        several=True,
        spec=spec,
        split=split,
        data_dir=data_dir,
        class_names=None,
        classes_by_number=classes_by_number,
        batch_size=batch_size,
        workers=workers,
        device=device,
    ) as found:
        thresholds = found.spec.thresholds
        scores = evaluate_label_batches(found.model, found.batches, found.spec.classes, thresholds, **found.options)
    return LabelEvaluation(scores, found.split, found.spec)
