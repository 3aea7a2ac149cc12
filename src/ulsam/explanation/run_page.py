"""The page: figures, curves, confusions and images of runs, in one HTML file that needs no other and no network."""

import dataclasses
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ulsam.base.errors import UlsamError, printable
from ulsam.base.timing import duration
from ulsam.explanation.captions import percent
from ulsam.explanation.confusions import SharedImage, choose_samples, class_rows, confusion, most_confused
from ulsam.explanation.explain_page import Card, card_of_models, environment, photo_uri
from ulsam.explanation.explainer import Explainer
from ulsam.explanation.run_differences import Paired, differences
from ulsam.explanation.run_latency import Times
from ulsam.explanation.run_measured import Measured, RunPrediction
from ulsam.explanation.svg_charts import Chart, Line, chart, shape
from ulsam.explanation.trained_runs import TrainedRun
from ulsam.model.build import load

TABLE_CLASSES = 16
"""A confusion matrix of up to so many classes is a table with figures, a larger one an image of colored cells."""

THUMBNAIL = 168
"""The most pixels to a side of a small image: twice what it is shown at, for dense screens."""


@dataclass(frozen=True)
class Cell:
    """A cell of a confusion matrix: where it is, how many images, and their share of their class."""

    row: int
    column: int
    count: int
    share: float
    text: str


@dataclass(frozen=True)
class Matrix:
    """The confusion matrix of a run; only cells with an image."""

    run: TrainedRun
    classes: tuple[str, ...]
    cells: tuple[Cell, ...]

    def at(self, row: int, column: int) -> Cell | None:
        """The cell, if an image is in it."""
        return next((cell for cell in self.cells if (cell.row, cell.column) == (row, column)), None)


@dataclass(frozen=True)
class CostRow:
    """A model's cost beside its base model's; of a base model, ``run`` is None."""

    run: TrainedRun | None
    model: str
    cost: Mapping[str, Any]
    base: Mapping[str, Any]
    time: Mapping[str, Any] | None
    base_time: Mapping[str, Any] | None


@dataclass(frozen=True)
class ImageCard:
    """A small image and what each run says of it, by the runs' keys."""

    name: str
    truth: str
    image: str
    guesses: Mapping[str, RunPrediction]


def page(
    runs: Sequence[TrainedRun],
    measured: Sequence[Measured],
    notes: Sequence[str],
    *,
    times: Times | None,
    command: str,
    versions: str,
) -> str:
    """The page.

    Args:
        runs: what it is about.
        measured: those whose models were run again; confusions and images are theirs.
        notes: a line about each thing that is not there.
        times: latencies, where they were asked for.
        command, versions: what made the page.
    """
    pairs = most_confused(measured)
    small = {one.image: _small(one, measured) for pair in pairs for one in (*pair.errors, *pair.right)}
    samples, why_not = _samples(measured)
    paired = differences(runs)
    templates = environment(Path(__file__).parent)
    templates.globals.update(
        shape=shape, quantity=quantity, change=change, points=points, duration=duration, percent=percent
    )
    templates.filters["breakable"] = breakable
    return templates.get_template("run_page.html").render(
        runs=runs,
        keys={run.key: run for run in runs},
        finished=[run for run in runs if run.result],
        measured=measured,
        notes=list(map(printable, [*notes, *why_not])),
        charts=curves(runs),
        differences=paired,
        forest=_forest(paired),
        rows=class_rows(runs, measured),
        matrices=[_matrix(one) for one in measured],
        max_classes=TABLE_CLASSES,
        pairs=pairs,
        small=small,
        samples=samples,
        times=times,
        costs=_costs(runs, times),
        settings=_settings(runs),
        repeat={run.key: repeat(run) for run in runs},
        training_note=_training_note(runs),
        command=command,
        versions=versions,
    )


def curves(runs: Sequence[TrainedRun]) -> list[Chart]:
    """Loss, accuracy and learning rate against epochs, of all runs."""

    keys = {run.number: run.key if len(runs) > 1 else "" for run in runs}  # a run alone needs no letter

    def lines(column: str, what: str, scale: float = 1.0, dashed: bool = False) -> list[Line]:
        return [
            Line(
                keys[run.number],
                run.number,
                ", ".join(filter(None, (keys[run.number], what))),
                tuple((row["epoch"] or 0, scale * value) for row in run.rows if (value := row[column]) is not None),
                dashed,
            )
            for run in runs
        ]

    losses = lines("train_loss", "training loss") + lines("val_loss", "loss on measured images", dashed=True)
    top = lines("val_top1", "top-1 (%)", 100) + lines("val_top5", "top-5 (%)", 100, dashed=True)
    rate = lines("lr", "learning rate")
    numbers = [row["epoch"] or 0 for run in runs for row in run.rows]
    epochs = (min(numbers, default=1), max(numbers, default=1))
    found = [
        chart("loss", "Loss", losses, unit="nats", epochs=epochs, limits=(0, math.inf)),
        chart("accuracy", "Accuracy", top, unit="%", epochs=epochs, limits=(0, 100), digits=".2f"),
        chart("rate", "Learning rate", rate, unit="at the end of each epoch", epochs=epochs, limits=(0, math.inf)),
    ]
    return [one for one in found if one]


def repeat(run: TrainedRun) -> str | None:
    """The command that repeats a run in a new folder; None where no file of it holds its settings."""
    if (run.result and run.result.prepared) or not (run.folder / "config.yaml").is_file():
        return None
    return printable(shlex.join(["ulsam", "train", "--config", str(run.folder / "config.yaml"), "--out", "NEW-FOLDER"]))


def quantity(value: float) -> str:
    """A count in thousands or millions.

    >>> quantity(1931940), quantity(152931200), quantity(97_412), quantity(730)
    ('1.932 M', '152.9 M', '97.4 k', '730')
    """
    if value >= 1e6:
        return f"{value / 1e6:.{1 if value >= 1e7 else 3}f} M"
    return f"{value / 1e3:.1f} k" if value >= 1e4 else f"{value:.0f}"


def change(now: float, before: float) -> str:
    """How much more or less than before, as a share.

    >>> change(80, 100), change(100, 100), change(110, 100)
    ('−20.0 %', 'as base', '+10.0 %')
    """
    return "as base" if now == before else f"{100 * (now / before - 1):+.1f} %".replace("-", "−")


def breakable(name: str) -> Markup:
    """A name as HTML, which a browser may break behind its underscores, too.

    >>> print(breakable("Scarlet_Tanager<br>"))
    Scarlet_<wbr>Tanager&lt;br&gt;
    """
    return Markup("_<wbr>").join(name.split("_"))


def points(share: float) -> str:
    """A difference of shares in points.

    >>> points(-0.0062)
    '−0.62'
    """
    return f"{100 * share:+.2f}".replace("-", "−")


def _costs(runs: Sequence[TrainedRun], times: Times | None) -> list[CostRow]:
    """The finished runs' models, and before them the base models that none of them is."""
    shown = [(run.config.model, run.result.cost) for run in runs if run.result and not run.config.edits]
    bases, rows = [], []
    for run in runs:
        if run.result is None:
            continue
        base, key = run.result.base_cost, run.key
        time, base_time = (times.runs.get(key), times.bases.get(key)) if times else (None, None)
        if (run.config.model, base) not in shown:
            shown.append((run.config.model, base))
            bases.append(CostRow(None, f"{run.config.model} without edits", base, base, base_time, base_time))
        rows.append(CostRow(run, run.model, run.result.cost, base, time, base_time))
    return [*bases, *rows]


def _forest(pairs: Sequence[Paired]) -> tuple[float, float] | None:
    """What the axis of the differences reaches from and to, in points: 0 and every interval, with a margin."""
    ends = [end for pair in pairs if pair.gap for end in (pair.gap.mean, pair.gap.low, pair.gap.high)]
    known = [0.0, *(100 * end for end in ends if end is not None)]
    margin = 0.06 * (max(known) - min(known))
    return (min(known) - margin, max(known) + margin) if margin else None


def _matrix(measured: Measured) -> Matrix:
    classes = measured.images.classes
    index = {name: number for number, name in enumerate(classes)}
    counts = confusion(measured)
    totals: dict[str, int] = {}
    for (truth, _), count in counts.items():
        totals[truth] = totals.get(truth, 0) + count
    cells = [
        Cell(index[truth], index[named], count, count / totals[truth], f"{truth}, predicted as {named}: {count}")
        if truth != named
        else Cell(index[truth], index[named], count, count / totals[truth], f"{truth}, right: {count}")
        for (truth, named), count in counts.items()
    ]
    return Matrix(measured.run, classes, tuple(sorted(cells, key=lambda cell: (cell.row, cell.column))))


def _small(shared: SharedImage, measured: Sequence[Measured]) -> ImageCard:
    first = next(each for each in measured if each.run.key in shared.guesses)
    photo = photo_uri(first.pixels(shared.guesses[first.run.key]), THUMBNAIL)
    return ImageCard(printable(shared.name), shared.truth, photo, shared.guesses)


def _samples(measured: Sequence[Measured]) -> tuple[list[Card], list[str]]:
    """Some images with every map, and why a model has none."""
    if not measured:
        return [], []
    explainers: dict[str, Explainer] = {}
    notes = []
    for one in measured:
        try:
            explainers[one.run.key] = Explainer(*load(one.run.folder / "model.safetensors"))
        except UlsamError as error:
            notes.append(f"{one.run.key}: no maps: {error}")
    by_key = {one.run.key: one for one in measured}
    cards = []
    for shown in choose_samples(measured):
        models = {}
        for key, explainer in explainers.items():
            if key in shown.guesses:
                pixels, _ = by_key[key].images.fetch(
                    shown.guesses[key].image, explainer.transform.reduction, explainer.transform.channels
                )
                (models[key],) = explainer([explainer.transform.pixels(pixels)])
        if models:
            verdicts = [f"{key + ' ' if len(measured) > 1 else ''}{_verdict(shown.guesses[key])}" for key in models]
            names = models if len(measured) > 1 else {"this model": models[next(iter(models))]}
            attention = models if len(measured) > 1 else {"": models[next(iter(models))]}
            headline = f"{shown.truth}: " + "; ".join(verdicts)
            card = card_of_models(printable(shown.name), shown.truth, names, headline, attention)
            right = {shown.guesses[key].right for key in models}
            cards.append(dataclasses.replace(card, verdict="unknown") if len(right) > 1 else card)
    return cards, notes


def _verdict(guess: RunPrediction) -> str:
    word = "✓ right" if guess.right else f"✗ predicted as {guess.named}"
    return f"{word} ({percent(guess.share)})"


def _settings(runs: Sequence[TrainedRun]) -> list[tuple[str, list[str], bool]]:
    """Every setting: its name, each run's value, and whether they differ; those that do come first."""
    values = [dataclasses.asdict(run.config) for run in runs]
    rows = [(name, [_text(each[name]) for each in values]) for name in values[0]]
    settings = [(name, each, len(set(each)) > 1) for name, each in rows]
    return sorted(settings, key=lambda row: not row[2])


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, list):
        return "; ".join(map(str, value)) or "none"
    return ("yes" if value else "no") if isinstance(value, bool) else str(value) if value != {} else "none"


def _training_note(runs: Sequence[TrainedRun]) -> str:
    """What makes the training loss another one than that on measured images, in these runs."""
    found = {
        "label smoothing": any(run.config.smoothing for run in runs),
        "mixup or cutmix": any(run.config.mixup or run.config.cutmix for run in runs),
        "a teacher's part": any(run.config.teacher for run in runs),
    }
    return ", ".join(["augmented images", *(name for name, holds in found.items() if holds)])
