"""What models take for what: counts, the pairs of classes that are confused most, and images to show."""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ulsam.explanation.run_measured import Measured, RunPrediction
from ulsam.explanation.trained_runs import TrainedRun


@dataclass(frozen=True)
class SharedImage:
    """An image, and what the runs that were measured on it say of it, by their keys."""

    image: str  # its key among the guesses
    name: str
    truth: str
    guesses: Mapping[str, RunPrediction]


@dataclass(frozen=True)
class ConfusedPair:
    """Two classes that are taken for each other."""

    classes: tuple[str, str]
    counts: Mapping[str, tuple[int, int]]  # by the runs' keys: the first taken for the second, the second for the first
    errors: tuple[SharedImage, ...]  # the surest first
    right: tuple[SharedImage, ...]  # of each class the image that is named rightly, the surest

    @property
    def total(self) -> int:
        """Errors of all runs."""
        return sum(map(sum, self.counts.values()))


@dataclass(frozen=True)
class ClassRow:
    """A class as the runs see it."""

    number: int  # from 1 on, in the order of the models' outputs
    name: str
    images: int | None  # None: the runs were measured on different numbers
    top1: Mapping[str, float | None]  # by the runs' keys
    taken_for: Mapping[str, tuple[str, int]]  # the class that it is taken for most often, and how often


def confusion(measured: Measured) -> Counter[tuple[str, str]]:
    """How many images of a class (the first name) were taken for which (the second), right ones included."""
    return Counter((one.truth, one.named) for one in measured.guesses.values())


def most_confused(runs: Sequence[Measured], pairs: int = 8, images: int = 6) -> list[ConfusedPair]:
    """The pairs of classes with the most errors over all runs, either way round, most first; then by name.

    Args:
        runs: measured models.
        pairs: at most so many.
        images: of errors of each pair, at most.
    """
    counts = {one.run.key: confusion(one) for one in runs}
    totals: Counter[tuple[str, str]] = Counter()
    for found in counts.values():
        for (truth, named), number in found.items():
            if truth != named:
                totals[min(truth, named), max(truth, named)] += number
    chosen = sorted(totals, key=lambda pair: (-totals[pair], pair))[:pairs]
    pool = seen_by(runs)
    return [
        ConfusedPair(
            classes,
            {key: (found[classes], found[classes[::-1]]) for key, found in counts.items()},
            tuple(_mixed(pool, classes)[:images]),
            tuple(shown for name in classes for shown in _best_right(pool, name)),
        )
        for classes in chosen
    ]


def class_rows(runs: Iterable[TrainedRun], measured: Iterable[Measured]) -> list[ClassRow]:
    """Every class, the one with the lowest mean top-1 first; figures are the runs' own, from their summaries."""
    finished = {run.key: run.result for run in runs if run.result}
    if not finished:
        return []
    taken: dict[str, dict[str, tuple[str, int]]] = {}
    for one in measured:
        for (truth, named), count in sorted(confusion(one).items(), key=lambda entry: (-entry[1], entry[0])):
            if truth != named:
                taken.setdefault(truth, {}).setdefault(one.run.key, (named, count))
    rows = []
    for number, name in enumerate(next(iter(finished.values())).spec.classes, start=1):
        entries = {key: result.scores["per_class"][name] for key, result in finished.items()}
        held = {entry["images"] for entry in entries.values()}
        top1 = {key: entry["top1"] for key, entry in entries.items()}
        rows.append(ClassRow(number, name, held.pop() if len(held) == 1 else None, top1, taken.get(name, {})))
    return sorted(rows, key=_worst)


def choose_samples(runs: Sequence[Measured], errors: int = 3, right: int = 3) -> list[SharedImage]:
    """Images to look at: the surest errors of the runs, in turn, then some that all name rightly, evenly spread."""
    pool = seen_by(runs)
    by_run = [_errors(pool, run.run.key) for run in runs]
    turns = (one for turn in itertools.zip_longest(*by_run) for one in turn if one is not None)
    chosen = list({one.image: one for one in turns}.values())[:errors]
    good = [one for one in pool if all(guess.right for guess in one.guesses.values())]
    spread = range(right) if len(good) >= right else range(len(good))
    return chosen + [good[len(good) * (2 * number + 1) // (2 * len(spread))] for number in spread]


def seen_by(runs: Iterable[Measured]) -> list[SharedImage]:
    """All images that any run was measured on, each once, in their order."""
    found: dict[str, dict[str, RunPrediction]] = {}
    for one in runs:
        for image, guess in one.guesses.items():
            found.setdefault(image, {})[one.run.key] = guess
    firsts = {image: next(iter(guesses.values())) for image, guesses in found.items()}
    return [SharedImage(image, first.name, first.truth, found[image]) for image, first in firsts.items()]


def _mixed(pool: Iterable[SharedImage], classes: tuple[str, str]) -> list[SharedImage]:
    """The images of one of two classes that a run takes for the other, the surest first."""

    def surest(image: SharedImage) -> float:
        return max(
            (guess.share for guess in image.guesses.values() if {guess.truth, guess.named} == {*classes}), default=0
        )

    return sorted((one for one in pool if surest(one)), key=surest, reverse=True)


def _errors(pool: Iterable[SharedImage], key: str) -> list[SharedImage]:
    """Of one run, the surest first."""
    found = [one for one in pool if key in one.guesses and not one.guesses[key].right]
    return sorted(found, key=lambda one: -one.guesses[key].share)


def _best_right(pool: Iterable[SharedImage], name: str) -> list[SharedImage]:
    good = [one for one in pool if one.truth == name and all(guess.right for guess in one.guesses.values())]
    return [max(good, key=lambda one: min(guess.share for guess in one.guesses.values()))] if good else []


def _worst(row: ClassRow) -> tuple[float, int]:
    known = [share for share in row.top1.values() if share is not None]
    return (sum(known) / len(known) if known else 2.0), row.number
