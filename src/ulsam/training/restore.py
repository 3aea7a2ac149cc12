"""What a run's folder must hold for the run to begin or resume, and its checkpoint taken apart."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ulsam.base.errors import UlsamError
from ulsam.base.files import check_empty
from ulsam.training import summary as report
from ulsam.training.checkpoint import Position
from ulsam.training.config import TrainConfig, read_config
from ulsam.training.distill import Teacher
from ulsam.training.probe import undecided

#: Settings that a resumed run may change: what is trained, and how, stays the same.
CHANGEABLE_ON_RESUME = (
    "data",
    "data_dir",
    "workers",
    "cache",
    "max_unreadable",
    "device",
    "threads",
    "save_seconds",
    "track",
)
#: The teacher's file may lie elsewhere: its content is checked.
_MAY_CHANGE = (*CHANGEABLE_ON_RESUME, "teacher")


def fixed_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that a resumed run may not change."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in _MAY_CHANGE}


def resumed_config(run: Path, overrides: Mapping[str, Any]) -> TrainConfig:
    """The settings of the run in this folder, to resume with.

    Raises:
        UlsamError: not the folder of a run, a finished one, or a setting that would change the result.
    """
    if not os.path.isfile(run / "config.yaml"):
        raise UlsamError(f"{run} is not the folder of a run: there is no config.yaml in it")
    if os.path.isfile(run / "summary.json"):
        raise UlsamError(f"{run} is finished: its result is in {run / 'summary.json'}")
    before = read_config(run / "config.yaml")
    config = TrainConfig.from_mapping({**before, **overrides})
    for name, value in dataclasses.asdict(TrainConfig.from_mapping(before)).items():
        now = getattr(config, name)
        if (name not in _MAY_CHANGE or (name == "teacher" and value is None)) and now != value:
            raise UlsamError(f"a resumed run keeps its own settings: {name} was {value} and cannot be changed")
    if names := undecided(config):
        raise UlsamError(f"{run / 'config.yaml'} was changed: {names[0]} is auto, but the run had chosen; put it back")
    return config


def check_begun(begun: Mapping[str, Any], wanted: Mapping[str, Any], run: Path) -> None:
    """Raise unless the settings found in a run's folder are those wanted, but for `CHANGEABLE_ON_RESUME`.

    Raises:
        UlsamError: one differs; the line names it.
    """
    before = dataclasses.asdict(TrainConfig.from_mapping(begun))
    for name, value in wanted.items():
        if name not in CHANGEABLE_ON_RESUME and before[name] != value:
            raise UlsamError(
                f"{run} holds a run with {name} {before[name]}, not {value}: put that back, move it away, or name "
                "another `out`"
            )


def check_run(config: TrainConfig, run: Path) -> None:
    """Raise unless the run in this folder, if one has begun there, has these settings; what is at "auto" may be any.

    Raises:
        UlsamError: as :func:`check_begun`.
    """
    if (run / "config.yaml").exists():
        wanted = {name: value for name, value in dataclasses.asdict(config).items() if value != "auto"}
        check_begun(read_config(run / "config.yaml"), wanted, run)


def check_prepared(run: Path, saved: Mapping[str, Any] | None, has_model: bool) -> None:
    """Raise unless a prepared model is given if and only if the run began with one.

    Raises:
        UlsamError: it is the other way round.
    """
    prepared = saved is not None and bool(saved.get("prepared"))
    if prepared and not has_model:
        raise UlsamError(f"{run} trains a prepared model: resume from Python, {resume_call(run, True)}")
    if has_model and not prepared:
        raise UlsamError(f"{run} trains the model of its settings, not a prepared one: leave model out")


def check_same(
    saved: Mapping[str, Any],
    config: TrainConfig,
    classes: Sequence[str],
    teacher: Teacher | None,
    processes: int,
    run: Path,
    several: bool = False,
) -> None:
    """Raise unless the run was started with these settings, classes, teacher and as many processes.

    Raises:
        UlsamError: it was not; the line says what differs.
    """
    before = saved["environment"]["processes"]
    defaults = dataclasses.asdict(TrainConfig(config.data))
    if before != str(processes):
        raise UlsamError(f"this run has {before} process(es), not {processes}: start as many")
    if saved["classes"] != list(classes):
        raise UlsamError("the data has other classes than this run was started with")
    if saved.get("several", False) != several:
        raise UlsamError("the run was started with images that have several labels, or one class, each: not both")
    if saved.get("teacher") != (teacher and teacher.digest):
        raise UlsamError("the teacher's file is not the one that this run was started with: put that one back")
    for name, now in fixed_settings(config).items():
        if name not in saved["settings"] and now == defaults[name]:
            continue  # a setting that a later version added
        if saved["settings"][name] != now:
            raise UlsamError(
                f"{run / 'config.yaml'} was changed: {name} was {saved['settings'][name]} and is {now} now; "
                "put it back, or start a new run"
            )


def position(saved: dict[str, Any], config: TrainConfig, epoch_updates: int) -> Position:
    """The position in a checkpoint; raises ValueError and what else a wrong one leads to."""
    at = Position(**saved)
    batches = epoch_updates * config.accumulate
    for name, most in (("epoch", config.epochs), ("batch", batches), ("updates", None), ("images", None)):
        value = saved.get(name, 0)
        if type(value) is not int or value < 0 or (most is not None and value > most):
            raise ValueError(f"{name} is {value!r}" + ("" if most is None else f", not 0 to {most}"))
    if not (type(at.loss_sum) is type(at.seconds) is float and math.isfinite(at.loss_sum) and at.seconds >= 0):
        raise ValueError(f"loss and seconds are {at.loss_sum!r}, {at.seconds!r}")
    if at.batch % config.accumulate or (at.batch and not (at.images and at.seconds)):
        raise ValueError(f"batch is {at.batch}, after {at.images} images in {at.seconds} s")
    sound = all(
        tuple(row) in (report.COLUMNS, report.LABEL_COLUMNS)
        and all(value is None or type(value) in (int, float) for value in row.values())
        for row in at.rows
    )
    if len(at.rows) != at.epoch or not sound:
        raise ValueError(f"{at.epoch} epochs, but its rows are not theirs")
    return at


def environment_changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What is not as it was when the run was stopped, a line each.

    >>> environment_changes({"torch": "2.7"}, {"torch": "2.8", "image files": "1f"})
    ['torch: 2.7 before, 2.8 now']
    """
    known = {
        name: value for name, value in now.items() if name != "image files" or name in before
    }  # older runs lack it
    return [
        f"{name}: {before.get(name)} before, {value} now" for name, value in known.items() if value != before.get(name)
    ]


def resume_call(run: Path, prepared: bool) -> str:
    """How to resume a run, of a prepared model or not.

    >>> resume_call(Path("my-run"), prepared=True)
    "ulsam.resume('my-run', model=...)"
    """
    return f"ulsam.resume({str(run)!r}{', model=...' if prepared else ''})"


def check_free(run: Path) -> None:
    """Raise unless there is no such folder, or an empty one.

    Raises:
        UlsamError: something lies in it.
    """
    begun = (run / "config.yaml").is_file()
    check_empty(run, "resume it with `ulsam.resume`, " if begun else "", hidden=True)
