"""Check that a checkpoint is that of the run that goes on from it, and take it apart."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ulsam.errors import UlsamError
from ulsam.train import report
from ulsam.train.config import TrainConfig
from ulsam.train.state import Position


def check_same(
    saved: Mapping[str, Any], *, processes: int, classes: list[str], settings: Mapping[str, Any], config_file: Path
) -> None:
    """Raise unless the run was started with these settings, classes and as many processes.

    Raises:
        UlsamError: it was not; the line says what differs.
    """
    before = saved["environment"]["processes"]
    if before != str(processes):
        raise UlsamError(f"this run has {before} process(es), not {processes}: start as many")
    if saved["classes"] != classes:
        raise UlsamError("the data has other classes than this run was started with")
    for name, now in settings.items():
        if saved["settings"][name] != now:
            raise UlsamError(
                f"{config_file} was changed: {name} was {saved['settings'][name]} and is {now} now; "
                "put it back, or start a new run"
            )


def position(saved: dict[str, Any], config: TrainConfig, epoch_updates: int) -> Position:
    """The position in a checkpoint; raises ValueError and what else a wrong one leads to."""
    at = Position(**saved)
    batches = epoch_updates * config.accumulate
    for name, most in (("epoch", config.epochs), ("batch", batches), ("updates", None), ("pictures", None)):
        value = saved.get(name, 0)
        if type(value) is not int or value < 0 or (most is not None and value > most):
            raise ValueError(f"{name} is {value!r}" + ("" if most is None else f", not 0 to {most}"))
    if not (type(at.loss_sum) is type(at.seconds) is float and math.isfinite(at.loss_sum) and at.seconds >= 0):
        raise ValueError(f"loss and seconds are {at.loss_sum!r}, {at.seconds!r}")
    if at.batch % config.accumulate or (at.batch and not (at.pictures and at.seconds)):
        raise ValueError(f"batch is {at.batch}, after {at.pictures} pictures in {at.seconds} s")
    sound = all(
        tuple(row) == report.COLUMNS and all(value is None or type(value) in (int, float) for value in row.values())
        for row in at.rows
    )
    if len(at.rows) != at.epoch or not sound:
        raise ValueError(f"{at.epoch} epochs, but its rows are not theirs")
    return at


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any], opt: str) -> None:
    """Give the optimizer its state; raises ValueError and what else the state of another one leads to."""
    new = optimizer.state_dict()["param_groups"]
    for group, other in zip(new, saved["param_groups"], strict=True):
        changed = [name for name in group.keys() | other.keys() if name != "lr" and group.get(name) != other.get(name)]
        if changed:
            raise ValueError(f"{min(changed)} of its optimizer is not that of {opt}")
    optimizer.load_state_dict(saved)
    kinds = {"momentum_buffer"} if opt == "sgd" else {"step", "exp_avg", "exp_avg_sq"}
    for parameter, state in optimizer.state.items():
        fits = all(value.numel() == 1 or value.shape == parameter.shape for value in state.values())
        if state.keys() != kinds or not fits:
            raise ValueError(f"the state of its optimizer is not that of {opt}")
