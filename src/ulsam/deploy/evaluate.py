"""Measure a trained model on images, whatever runs it: PyTorch, or ONNX Runtime for an exported file."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from ulsam.base.distributed import start
from ulsam.base.errors import UlsamError, printable
from ulsam.base.text_table import as_csv
from ulsam.data.labelled import splits_of
from ulsam.data.loading import Loader, eval_loader
from ulsam.data.opening import is_named, open_split
from ulsam.data.sources import FolderImages
from ulsam.deploy.exported_module import load_exported
from ulsam.model.build import meta_model
from ulsam.model.given import model_and_spec
from ulsam.model.spec import ModelSpec
from ulsam.surgery.cost import cost
from ulsam.training.class_scores import COLUMNS, ClassScores, Collected
from ulsam.training.evaluate import Scores, evaluate_batches, spec_transform
from ulsam.training.summary import cost_entry, score_entry, spec_entry
from ulsam.training.trained_on import note_trained_on

_TITLES = {"precision": "precision", "recall": "recall", "f1": "F1", "specificity": "specificity", "auc": "AUC"}


@dataclass(frozen=True)
class Evaluation:
    """What a model scores on one split of a data set; ``print`` shows it.

    Attributes:
        scores: accuracy, loss and counts, of each class too.
        split: that was measured; "all" for a folder without splits.
        spec: of the model.
        by_class: precision, recall, F1, specificity and AUC of each class, and the confusion matrix.
    """

    scores: Scores
    split: str
    spec: ModelSpec
    by_class: ClassScores

    def __str__(self) -> str:
        scores = self.scores
        low, high = scores.interval
        left_out = f"; {len(scores.unreadable)} unreadable ones left out" if scores.unreadable else ""
        found = scores.per_class(self.spec.classes).items()
        worst = sorted((entry["top1"], name, entry["images"]) for name, entry in found if entry["images"])[:5]
        means = self.by_class.macro().items()
        lines = [
            f"top-1   {100 * scores.top1:.2f} % (95 % interval {100 * low:.1f} to {100 * high:.1f})",
            f"top-5   {100 * scores.top5:.2f} %",
            f"loss    {scores.loss:.4f}",
            "means   " + ", ".join(f"{_TITLES[key]} {100 * share:.1f} %" for key, share in means if share is not None),
            f"on      {scores.images} images, split {self.split}{left_out}",
            "lowest  " + "; ".join(f"{printable(name)} {100 * top1:.0f} % of {n}" for top1, name, n in worst),
        ]
        return "\n".join(lines)

    def csv(self) -> str:
        """The table of the classes, with a header: shares 0..1, empty where a share of nothing is meant."""
        return as_csv([["class", *COLUMNS], *([name, *row.values()] for name, row in self.by_class.table().items())])

    def entry(self) -> dict[str, Any]:
        """All of it as JSON, with the model's cost."""
        return {
            "split": self.split,
            "scores": {
                **score_entry(self.scores, self.spec.classes),
                "macro": self.by_class.macro(),
                "per_class": {
                    name: {**self.scores.per_class(self.spec.classes)[name], **row}
                    for name, row in self.by_class.table().items()
                },
            },
            "confusion": self.by_class.confusion(),
            "cost": cost_entry(cost(meta_model(self.spec), self.spec.input_size)),
            "spec": spec_entry(self.spec),
        }


def evaluate(
    model: nn.Module | str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    spec: ModelSpec | None = None,
    split: str | None = None,
    data_dir: str | None = None,
    class_names: str | None = None,
    classes_by_number: bool = False,
    batch_size: int = 64,
    workers: int = 2,
    device: str = "auto",
) -> Evaluation:
    """Measure a trained model: top-1 with a confidence interval, top-5, loss; precision, recall, F1, AUC of each class.

    Under torchrun each process measures its share of the images, and all get the sum.

    Args:
        model: a model file, the name of a trained model of the package, NAME.onnx of `ulsam.export`; or a model in
            memory, which is moved to the device.
        data: an image folder, a CSV of paths and labels, or timm's name of a data set.
        spec: of a model in memory, as of `ulsam.load`.
        split: of the data; by default test, else val, else the whole folder; "validation" of a named data set.
        data_dir: where a named data set lies, or where the paths in a CSV count from.
        class_names: a text file with the class names of a named data set, one a line.
        classes_by_number: take the data's classes for the model's by their position; a name that is a number is one,
            from 0 on.
        batch_size: images at once.
        workers: processes that read images.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``; of an exported file ``auto``, which is the CPU,
            or one that `ulsam.runtime.load` takes.

    Raises:
        UlsamError: no such model, data, split or device; a model that gives several labels an image, or images that
            have; classes that the model does not know; no readable image; or ``batch_size`` or ``workers`` out of
            range.
        NotFinite: the model's outputs are not finite.

    >>> import tempfile
    >>> import ulsam
    >>> from ulsam.data.birds import draw_birds
    >>> birds = draw_birds(tempfile.mkdtemp() + "/birds", classes=2, train=1, val=3, size=32)
    >>> spec = ulsam.make_spec("test_efficientnet", sorted(path.name for path in (birds / "val").iterdir()), size=32)
    >>> evaluate(ulsam.build(spec)[0], birds, spec=spec, workers=0).scores.images
    6
    """
    with to_measure(
        model,
        data,
        several=False,
        spec=spec,
        split=split,
        data_dir=data_dir,
        class_names=class_names,
        classes_by_number=classes_by_number,
        batch_size=batch_size,
        workers=workers,
        device=device,
    ) as found:
        collected = Collected()
        scores = evaluate_batches(
            found.model, found.batches, len(found.spec.classes), on_batch=collected.add, **found.options
        )
        by_class = collected.scores(found.spec.classes, found.options["world"])
    return Evaluation(scores, found.split, found.spec, by_class)


@dataclass(frozen=True)
class ToMeasure:
    """A model and the images that it is measured on; ``options`` are further arguments of `evaluate_batches`."""

    model: nn.Module
    spec: ModelSpec
    split: str
    batches: Loader
    options: dict[str, Any]


@contextmanager
def to_measure(
    model: nn.Module | str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    several: bool,
    spec: ModelSpec | None,
    split: str | None,
    data_dir: str | None,
    class_names: str | None,
    classes_by_number: bool,
    batch_size: int,
    workers: int,
    device: str,
) -> Iterator[ToMeasure]:
    """Open what :func:`evaluate` measures, for as long as the context lasts.

    Args:
        several: whether the model must give several labels an image, or must not.
        model, data, spec, split, data_dir, class_names, classes_by_number, batch_size, workers, device: as there.

    Raises:
        UlsamError: as there.
    """
    for name, least, value in (("batch_size", 1, batch_size), ("workers", 0, workers)):
        if value < least:
            raise UlsamError(f"`{name}` must be {least} or more, not {value}")
    data = os.fspath(data)
    split = split or _default_split(data)
    exported = not isinstance(model, nn.Module) and os.fspath(model).endswith(".onnx")
    module: nn.Module
    with start("cpu" if exported else device) as world:
        if not isinstance(model, nn.Module) and exported:
            module, spec, transform = load_exported(model, "cpu" if device == "auto" else device)
        else:
            module, spec = model_and_spec(model, spec)
            transform = spec_transform(spec)
        if spec.several is not several:
            kind, other = ("several labels", "evaluate_labels") if spec.several else ("one class", "evaluate")
            raise UlsamError(f"the model gives {kind} an image: `ulsam.{other}` measures it")
        images = open_split(
            data,
            split,
            spec.classes,
            data_dir=data_dir,
            class_names=class_names,
            by_number=classes_by_number,
            several=several,
        )
        if isinstance(images, FolderImages) and world.writes:
            held_out = images.in_table and split in ("val", "test")
            note_trained_on(model, [path for path, _ in images.samples], [data], held_out=held_out)
        batches = eval_loader(
            images,
            transform,
            batch_size=batch_size,
            workers=workers,
            rank=world.rank,
            world=world.size,
            device=world.device,
        )
        options = {"world": world, "channels_last": not exported, "progress": split if world.writes else None}
        yield ToMeasure(module.to(world.device), spec, split, batches, options)


def _default_split(data: str) -> str:
    """test, else val, of an image folder or a table; timm's "validation" of a named data set."""
    if is_named(data):
        return "validation"
    splits = splits_of(data)
    return next((name for name in ("test", "val") if name in splits), "all")
