"""Scores of each class: precision, recall, F1, specificity, AUC; and which class was taken for which."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ulsam.base.distributed import World

MAX_NUMBERS = 100_000_000
"""Probabilities that are kept to compute AUC, images times classes: 400 MB. Of more there is no AUC."""

COLUMNS = ("images", "named", "precision", "recall", "f1", "specificity", "auc")


@dataclass(frozen=True)
class ClassScores:
    """What a model scores on each class; shares are 0..1.

    Attributes:
        classes: names, in the order of the outputs.
        truths, guesses: the true class of each image, and the first guess, [N].
        auc: of each class against all others, [classes]: how often an image of the class is given a higher probability
            of it than another image. NaN without an image of it, or of others.
    """

    classes: tuple[str, ...]
    truths: NDArray[np.int64]
    guesses: NDArray[np.int64]
    auc: NDArray[np.float64]

    def table(self) -> dict[str, dict[str, Any]]:
        """`COLUMNS` of every class by its name: how many images it has, how many were named so, and the scores.

        A score is None where it is a share of nothing: recall and F1 without an image, precision if nothing was named
        so.

        >>> found = ClassScores(("cat", "dog"), np.array([0, 0, 1]), np.array([0, 1, 1]), np.array([1.0, 0.5]))
        >>> found.table()["dog"] | {"f1": None}
        {'images': 1, 'named': 2, 'precision': 0.5, 'recall': 1.0, 'f1': None, 'specificity': 0.5, 'auc': 0.5}
        """
        count = len(self.classes)
        images, named = (np.bincount(numbers, minlength=count) for numbers in (self.truths, self.guesses))
        right = np.bincount(self.truths[self.truths == self.guesses], minlength=count)
        others = len(self.truths) - images
        columns = {
            "precision": _share(right, named),
            "recall": _share(right, images),
            "f1": _share(2 * right, np.where(images > 0, images + named, 0)),
            "specificity": _share(others - named + right, others),
            "auc": self.auc,
        }
        return {
            name: {"images": int(images[number]), "named": int(named[number])}
            | {key: None if np.isnan(values[number]) else float(values[number]) for key, values in columns.items()}
            for number, name in enumerate(self.classes)
        }

    def macro(self) -> dict[str, float | None]:
        """The means over the classes that have images; the precision of one that nothing was named as counts as 0.

        The mean recall is also called balanced accuracy.
        """
        rows = [row for row in self.table().values() if row["images"]]
        if rows and any(row["auc"] is None for row in rows):
            rows = [{**row, "auc": None} for row in rows]
        return {
            key: None if key == "auc" and rows[0]["auc"] is None else sum(row[key] or 0.0 for row in rows) / len(rows)
            for key in COLUMNS[2:]
        }

    def confusion(self) -> dict[str, dict[str, int]]:
        """How many images of a class, the first name, were named what; pairs without an image are left out."""
        pairs, counts = np.unique(np.stack([self.truths, self.guesses]), axis=1, return_counts=True)
        found: dict[str, dict[str, int]] = {}
        for (truth, guess), count in zip(pairs.T.tolist(), counts.tolist(), strict=True):
            found.setdefault(self.classes[truth], {})[self.classes[guess]] = count
        return found


class Collected:
    """What `ulsam.training.evaluate.evaluate_batches` shows to ``seen``.

    Args:
        max_numbers: numbers that are kept to compute AUC; of more there is none.
    """

    def __init__(self, max_numbers: int = MAX_NUMBERS) -> None:
        self.max_numbers = max_numbers
        self.truths: list[NDArray[np.int64]] = []
        self.guesses: list[NDArray[np.int64]] = []
        self.shares: list[NDArray[np.float32]] | None = []
        self.numbers = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Keep a batch: logits [B, classes], labels [B]."""
        self.truths.append(labels.numpy())
        self.guesses.append(logits.topk(1).indices[:, 0].numpy())
        self.numbers += logits.numel()
        if self.shares is not None:
            self.shares.append(logits.double().softmax(1).float().numpy())
        if self.numbers > self.max_numbers:
            self.shares = None

    def scores(self, classes: Sequence[str], world: World) -> ClassScores:
        """The scores of the images of all processes; every process has to ask."""
        whole = world.gather((self.truths, self.guesses, self.shares))
        truths, guesses = (np.concatenate([batch for share in whole for batch in share[part]]) for part in (0, 1))
        auc = np.full(len(classes), np.nan)
        if all(share[2] is not None for share in whole):
            shares = np.concatenate([batch for share in whole for batch in share[2]])
            auc = np.array([_auc(shares[:, number], truths == number) for number in range(len(classes))])
        return ClassScores(tuple(classes), truths, guesses, auc)


def _share(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)


def _auc(scores: NDArray[np.float32], positive: NDArray[np.bool_]) -> float:
    """The share of pairs of a positive and a negative in which the positive has the higher score; a tie is a half.

    >>> _auc(np.float32([0.9, 0.4, 0.4]), np.array([True, True, False]))
    0.75
    """
    below = np.sort(scores[~positive])
    wanted = scores[positive]
    if not len(below) or not len(wanted):
        return float("nan")
    ranks = np.searchsorted(below, wanted, "left") + np.searchsorted(below, wanted, "right")
    return float(ranks.mean() / (2 * len(below)))
