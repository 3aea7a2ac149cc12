"""Scores of a model that gives several labels an image: average precision, and F1 at a threshold for each class."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ulsam.base.distributed import World
from ulsam.base.errors import NotFinite
from ulsam.data.loading import Batch
from ulsam.training.evaluate import ALONE, run_batches
from ulsam.training.predict import NOT_FINITE, sigmoid
from ulsam.training.train_summary import ScoreEntry

LABEL_COLUMNS = ("images", "named", "precision", "recall", "f1", "average_precision", "threshold")
"""What is said of each class."""


@dataclass(frozen=True)
class LabelScores:
    """What a model scores on images that may have several labels each; shares are 0..1.

    Attributes:
        classes: names, in the order of the outputs.
        truths: whether each image has each label, [images, classes].
        shares: the probability of each label, the sigmoid of the model's output, [images, classes].
        thresholds: of each class, from which on an image is given the label.
        loss: mean binary cross-entropy over images and classes, nats.
        unreadable: name and reason of each image that could not be read.
    """

    classes: tuple[str, ...]
    truths: NDArray[np.bool_]
    shares: NDArray[np.float32]
    thresholds: tuple[float, ...]
    loss: float
    unreadable: tuple[tuple[str, str], ...]

    @property
    def images(self) -> int:
        """How many were read."""
        return len(self.truths)

    @property
    def map(self) -> float | None:
        """Mean average precision: over the classes that an image has; None if there is none."""
        return self.macro()["average_precision"]

    @property
    def f1(self) -> float | None:
        """Mean F1 at the thresholds, likewise."""
        return self.macro()["f1"]

    def table(self) -> dict[str, dict[str, Any]]:
        """`LABEL_COLUMNS` of every class by its name: how many images have the label, how many were given it, scores.

        A score is None where it is a share of nothing: without an image of the class, or precision if none was given
        the label.

        >>> truths, shares = np.array([[True], [False], [True]]), np.float32([[0.9], [0.6], [0.3]])
        >>> found = LabelScores(("sun",), truths, shares, (0.5,), 0.0, ()).table()["sun"]
        >>> found["precision"], found["recall"], round(found["average_precision"], 4)
        (0.5, 0.5, 0.8333)
        """
        guesses = self.shares >= np.asarray(self.thresholds)
        images, named, right = (found.sum(0) for found in (self.truths, guesses, self.truths & guesses))
        return {
            name: {
                "images": int(images[n]),
                "named": int(named[n]),
                "precision": _share(right[n], named[n]),
                "recall": _share(right[n], images[n]),
                "f1": _share(2 * right[n], images[n] + named[n]) if images[n] else None,
                "average_precision": average_precision(self.truths[:, n], self.shares[:, n]),
                "threshold": self.thresholds[n],
            }
            for n, name in enumerate(self.classes)
        }

    def macro(self) -> dict[str, float | None]:
        """The means over the classes that an image has; the precision of one that none was given counts as 0."""
        rows = [row for row in self.table().values() if row["images"]]
        return {key: sum(row[key] or 0.0 for row in rows) / len(rows) if rows else None for key in LABEL_COLUMNS[2:-1]}

    def micro(self) -> dict[str, float | None]:
        """Precision, recall and F1 over all pairs of an image and a label."""
        guesses = self.shares >= np.asarray(self.thresholds)
        right, named, images = (int(found.sum()) for found in (self.truths & guesses, guesses, self.truths))
        return {
            "precision": _share(right, named),
            "recall": _share(right, images),
            "f1": _share(2 * right, named + images),
        }

    def entry(self) -> ScoreEntry:
        """All scores as JSON."""
        return {
            "images": self.images,
            "map": self.map,
            "f1": self.f1,
            "loss": self.loss,
            "unreadable": len(self.unreadable),
            "macro": self.macro(),
            "micro": self.micro(),
            "per_class": self.table(),
        }


def evaluate_label_batches(
    model: nn.Module,
    batches: Iterable[Batch],
    classes: Sequence[str],
    thresholds: Sequence[float] | None = None,
    *,
    world: World = ALONE,
    amp: torch.dtype | None = None,
    channels_last: bool = True,
    progress: str | None = None,
    stop: Callable[[], bool] | None = None,
) -> LabelScores:
    """Measure ``model`` on batches; as `ulsam.training.evaluate.evaluate_batches`, for several labels an image.

    Args:
        model: [B, C, H, W] -> logits [B, classes].
        batches: with labels [B, classes].
        classes: names of the outputs.
        thresholds: of each class; None: those of :func:`best_thresholds` on these images.
        world, amp, channels_last, progress, stop: as there.

    Raises:
        NotFinite, Stopped, UlsamError: as there.
    """
    mine: list[tuple[NDArray[np.bool_], NDArray[np.float32], float]] = []

    def add(logits: Tensor, labels: Tensor) -> None:
        loss = F.binary_cross_entropy_with_logits(logits.double(), labels.double(), reduction="sum")
        if not loss.isfinite():
            raise NotFinite(NOT_FINITE)
        mine.append((labels.numpy() > 0.5, sigmoid(logits.numpy()), loss.item()))

    unreadable = run_batches(
        model,
        batches,
        len(classes),
        add,
        several=True,
        world=world,
        amp=amp,
        channels_last=channels_last,
        progress=progress,
        stop=stop,
    )
    measured = [batch for share in world.gather(mine) for batch in share]
    truths, shares = (np.concatenate([batch[part] for batch in measured]) for part in (0, 1))
    if thresholds is None:
        thresholds = best_thresholds(truths, shares)
    loss = sum(batch[2] for batch in measured) / truths.size
    return LabelScores(tuple(classes), truths, shares, tuple(thresholds), loss, tuple(unreadable))


def average_precision(truths: NDArray[np.bool_], shares: NDArray[np.float32]) -> float | None:
    """The sum of precisions, each times the recall that it adds, over all thresholds; None without a true one.

    Images of one and the same probability are named together. There is no interpolation.

    Args:
        truths: whether each image has the label, [images].
        shares: its probability, [images].

    >>> average_precision(np.array([True, False, True]), np.float32([0.9, 0.5, 0.5]))
    0.8333333333333333
    """
    named, right = _cuts(truths, shares)[:2]
    if not len(right) or not right[-1]:
        return None
    return float((np.diff(right, prepend=0) / right[-1] * (right / named)).sum())


def best_thresholds(truths: NDArray[np.bool_], shares: NDArray[np.float32]) -> tuple[float, ...]:
    """The threshold of each class at which its F1 is largest; 0.5 for a class that no image has.

    It lies halfway between two probabilities, so that rounding changes no label. Of equal ones it is the largest.

    Args:
        truths, shares: [images, classes].

    >>> best_thresholds(np.array([[True], [True], [False]]), np.float32([[0.75], [0.25], [0.125]]))
    (0.1875,)
    """
    found = []
    for truth, share in zip(truths.T, shares.T, strict=True):
        if not truth.any():
            found.append(0.5)
            continue
        named, right, lowest = _cuts(truth, share)
        best = int(np.argmax(2 * right / (named + right[-1])))
        below = lowest[best + 1] if best + 1 < len(lowest) else 0.0
        found.append(float((lowest[best].astype(np.float64) + below) / 2))
    return tuple(found)


def _cuts(
    truths: NDArray[np.bool_], shares: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """For each probability, the largest first: images named from it on, those of them that are right, and itself."""
    order = np.argsort(-shares, kind="stable")
    ranked = shares[order]
    last = np.flatnonzero(np.diff(ranked, append=-1.0))
    return last + 1, np.cumsum(truths[order], dtype=np.int64)[last], ranked[last]


def _share(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None
