"""Runs of `ulsam train` as they lie on the disk: finished, stopped, or under way."""

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ulsam.base.errors import UlsamError, printable
from ulsam.base.reading import read_text
from ulsam.model.spec import ModelSpec
from ulsam.study.statistics import right
from ulsam.training.config import TrainConfig, read_config
from ulsam.training.summary import COLUMNS

EpochRow = Mapping[str, float | None]
"""An epoch: what `ulsam.training.summary.COLUMNS` names."""

KEYS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""What the page calls the runs for short, in their order."""


class _SeveralLabels(Exception):
    """A run's model gives several labels an image."""


@dataclass(frozen=True)
class Result:
    """What a finished run says of itself in ``summary.json``."""

    summary: Mapping[str, Any]
    spec: ModelSpec
    scores: Mapping[str, Any]
    split: str
    cost: Mapping[str, Any]
    base_cost: Mapping[str, Any]
    command: str
    versions: Mapping[str, str]
    image_count: int  # images that were measured on, those that could not be read included
    prepared: bool  # no spec builds the model


@dataclass(frozen=True)
class TrainedRun:
    """One run."""

    folder: Path
    number: int  # among those of the report
    name: str
    config: TrainConfig
    rows: tuple[EpochRow, ...]
    result: Result | None  # None: not finished

    @property
    def key(self) -> str:
        """A letter."""
        return KEYS[self.number]

    @property
    def model(self) -> str:
        """The base model and what was done to it."""
        if self.result and self.result.prepared:
            return f"a prepared model in place of {self.config.model}"
        return "; ".join([self.config.model, *self.config.edits])

    @property
    def state(self) -> str:
        """How far it came, where it is not finished."""
        return "" if self.result else f"not finished: {len(self.rows)} of {self.config.epochs} epochs"

    @property
    def line(self) -> str:
        """Its name and result, for a terminal."""
        if self.result is None:
            return f"{self.name}: {self.state}"
        low, high = self.result.scores["top1_interval_95"]
        top1, images = 100 * self.result.scores["top1"], self.result.scores["images"]
        return (
            f"{self.name}: top-1 {top1:.2f} % (95 % interval {100 * low:.1f} to {100 * high:.1f}) "
            f"on {images} {self.result.split} images"
        )

    @property
    def seconds(self) -> float:
        """The time of training so far, without that of measuring."""
        return sum(row["seconds"] or 0 for row in self.rows)


def read_runs(folders: Sequence[str | os.PathLike[str]]) -> list[TrainedRun]:
    """Read runs.

    Raises:
        UlsamError: not a run's folder, a damaged file in it, a folder named twice, more than 26, or runs of other
            classes.

    >>> read_runs(["/"])
    Traceback (most recent call last):
    ulsam.base.errors.UlsamError: / is not the folder of a run: there is neither summary.json nor config.yaml in it
    """
    if len(folders) > len(KEYS):
        raise UlsamError(f"a report shows {len(KEYS)} runs at most, not {len(folders)}")
    paths = [Path(folder) for folder in folders]
    places = [Path(os.path.realpath(path)) for path in paths]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise UlsamError(f"{paths[number]} is named twice")
    pairs = zip(paths, short_names(places), strict=True)
    runs = [_read(path, number, name) for number, (path, name) in enumerate(pairs)]
    finished = [run for run in runs if run.result]
    for run in finished[1:]:
        _check_classes(finished[0], run)
    return runs


def short_names(places: Sequence[Path]) -> list[str]:
    """What distinguishes folders: their paths from the folder on that holds them all.

    >>> short_names([Path("/runs/base/seed-0"), Path("/runs/slim/seed-0")]), short_names([Path("/runs/slim")])
    (['base/seed-0', 'slim/seed-0'], ['slim'])
    """
    above = os.path.commonpath([place.parent for place in places])
    return [printable(place.relative_to(above).as_posix()) for place in places]


def _read(folder: Path, number: int, name: str) -> TrainedRun:
    if not folder.is_dir():
        raise UlsamError(f"no such folder: {folder}")
    summary, config, metrics = (folder / file for file in ("summary.json", "config.yaml", "metrics.csv"))
    try:
        if summary.is_file():
            settings, rows, result = _read_summary(summary)
        elif config.is_file():
            settings, rows, result = read_config(config), _read_metrics(metrics) if metrics.is_file() else (), None
        else:
            inside = sorted(
                str(path.parent) for place in ("*", "arms/*/*") for path in folder.glob(f"{place}/summary.json")
            )
            hint = f"; it holds runs, name these: {', '.join(inside[:8])}" if inside else ""
            raise UlsamError(
                f"{folder} is not the folder of a run: there is neither summary.json nor config.yaml in it{hint}"
            )
        return TrainedRun(folder, number, name, TrainConfig.from_mapping(settings), rows, result)
    except _SeveralLabels:
        raise UlsamError(
            f"a report is for one class an image, and the model of {folder} gives several labels"
        ) from None
    except OSError as error:
        raise UlsamError(f"cannot read {error.filename}: {(error.strerror or str(error)).lower()}") from error


def _read_summary(path: Path) -> tuple[Mapping[str, Any], tuple[EpochRow, ...], Result]:
    try:
        summary = json.loads(read_text(path))
        spec = ModelSpec.from_json(json.dumps(summary["spec"]))
        if spec.several:
            raise _SeveralLabels
        rows = tuple({column: row[column] for column in COLUMNS} for row in summary["epochs"])
        found = {key: summary[key] for key in ("scores", "split", "cost", "base_cost", "command", "versions")}
        image_count = summary["images"]["val"]
        result = Result(summary, spec, **found, image_count=image_count, prepared=bool(summary.get("prepared")))
        if summary.get("outcomes") and len(right(summary)) != summary["outcomes"]["images"]:
            raise ValueError("its outcomes are not those of all its images")
        lacking = set(spec.classes) - result.scores["per_class"].keys()
        lacking |= {"images", "top1", "top1_interval_95", "top5", "loss", "per_class"} - result.scores.keys()
        for cost in (result.cost, result.base_cost):
            lacking |= {"params", "macs", "activations"} - cost.keys()
        if lacking or not isinstance(summary["config"], dict):
            raise KeyError(min(lacking, default="config"))
        return summary["config"], rows, result
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UlsamError(f"{path} is damaged, or not of a run: {type(error).__name__} {error}") from error


def _read_metrics(path: Path) -> tuple[EpochRow, ...]:
    try:
        lines = read_text(path).splitlines()
        if "val_map" in lines[0]:
            raise _SeveralLabels
        return tuple(
            {column: float(row[column]) if row[column] else None for column in COLUMNS} for row in csv.DictReader(lines)
        )
    except (IndexError, ValueError, KeyError, TypeError) as error:
        raise UlsamError(f"{path} is damaged, or not of a run: {type(error).__name__} {error}") from error


def _check_classes(first: TrainedRun, other: TrainedRun) -> None:
    """Raise unless two finished runs have the same classes, in whatever order."""
    assert first.result and other.result
    ours, theirs = (set(run.result.spec.classes) for run in (first, other) if run.result)
    if ours != theirs:
        odd = min(ours ^ theirs)
        which = first.folder if odd in ours else other.folder
        raise UlsamError(
            f"{first.folder} and {other.folder} have other classes, and do not go into one report: "
            f"only {which} has {odd!r}"
        )
