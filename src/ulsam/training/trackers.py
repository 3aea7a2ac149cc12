"""Trackers of experiments, each a callback of a run: TensorBoard, Weights & Biases, MLflow.

Where each one writes is the user's choice by its own variables, such as ``WANDB_MODE`` or ``MLFLOW_TRACKING_URI``. Runs
of a comparison are one group, named after its folder.
"""

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ulsam.base.errors import UlsamError
from ulsam.base.extras import extra
from ulsam.training.callbacks import Callback
from ulsam.training.train_summary import EpochEntry, TrainSummary

PROJECT = "ulsam"  # unless the tracker's own variable names another


def open_trackers(names: Sequence[str]) -> list[Callback]:
    """The trackers of these names.

    Raises:
        UlsamError: an unknown name, or its package is not installed.

    >>> open_trackers([])
    []
    """
    unknown = [name for name in names if name not in TRACKERS]
    if unknown:
        raise UlsamError(f"unknown tracker {unknown[0]!r}; valid: {', '.join(TRACKERS)}")
    found = []
    for name in dict.fromkeys(names):
        with extra("trackers", f"track={name} needs"):
            found.append(TRACKERS[name]())
    return found


def place(run: Path) -> tuple[str, str | None]:
    """How a run is called, and the group that it belongs to.

    >>> place(Path("runs/base")), place(Path("runs/compared/arms/remove-14/.seed-0.running"))
    (('base', None), ('remove-14, seed-0', 'compared'))
    """
    run = run.resolve()
    if run.parent.parent.name != "arms":
        return run.name, None
    name = run.name.removeprefix(".").removesuffix(".running")
    return f"{run.parent.name}, {name}", run.parents[2].name


def identity(run: Path) -> str:
    """The same for a run that resumes."""
    return hashlib.sha256(os.fsencode(run.resolve())).hexdigest()[:16]


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """What of a row can be drawn.

    >>> numbers({"epoch": 2, "val_top1": 0.5, "val_loss": None})
    {'val_top1': 0.5}
    """
    return {name: float(value) for name, value in row.items() if name != "epoch" and isinstance(value, int | float)}


class TensorBoard(Callback):
    """Event files in the run's folder: ``tensorboard --logdir runs``."""

    def __init__(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._open = SummaryWriter

    def start(self, run: Path, settings: Mapping[str, Any], updates: int) -> None:
        self._writer = self._open(str(run), purge_step=updates + 1 if updates else None)
        if not updates:
            text = "\n".join(f"    {name}: {value}" for name, value in settings.items())
            self._writer.add_text("settings", text)

    def step(self, update: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"step/{name}", value, update)

    def epoch(self, row: EpochEntry, update: int) -> None:
        for name, value in numbers(row).items():
            self._writer.add_scalar(f"epoch/{name}", value, update)

    def end(self, summary: TrainSummary | None) -> None:
        self._writer.close()


class WeightsAndBiases(Callback):
    """A run of Weights & Biases; a resumed one goes on in the same."""

    def __init__(self) -> None:
        import wandb

        self._wandb = wandb

    def start(self, run: Path, settings: Mapping[str, Any], updates: int) -> None:
        name, group = place(run)
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=name,
            group=group,
            id=identity(run),
            resume="allow",
            config=dict(settings),
            dir=str(run),
        )

    def step(self, update: int, values: Mapping[str, float]) -> None:
        self._run.log({f"step/{name}": value for name, value in values.items()}, step=update)

    def epoch(self, row: EpochEntry, update: int) -> None:
        self._run.log({f"epoch/{name}": value for name, value in numbers(row).items()}, step=update)

    def end(self, summary: TrainSummary | None) -> None:
        if summary is not None:
            scores = summary["scores"]
            headline = {"map": scores["map"]} if "map" in scores else {"top1": scores["top1"]}
            self._run.summary.update({**headline, "params": summary["cost"]["params"]})
        self._run.finish(exit_code=int(summary is None))


class MLflow(Callback):
    """A run of MLflow; a resumed one goes on in the same."""

    def __init__(self) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._client, self._metric, self._param = MlflowClient(), Metric, Param

    def start(self, run: Path, settings: Mapping[str, Any], updates: int) -> None:
        name, group = place(run)
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", group or PROJECT)
        experiment = self._client.get_experiment_by_name(title)
        number = experiment.experiment_id if experiment else self._client.create_experiment(title)
        mine = f"tags.ulsam_run = '{identity(run)}'"
        before = self._client.search_runs([number], mine) if updates else []
        if before:
            self._run = before[0].info.run_id
            return
        tags = {"ulsam_run": identity(run), "mlflow.runName": name, **({"group": group} if group else {})}
        self._run = self._client.create_run(number, tags=tags).info.run_id
        self._client.log_batch(
            self._run, params=[self._param(key, str(value)[:500]) for key, value in settings.items()]
        )

    def step(self, update: int, values: Mapping[str, float]) -> None:
        self._log("step", values, update)

    def epoch(self, row: EpochEntry, update: int) -> None:
        self._log("epoch", numbers(row), update)

    def _log(self, kind: str, values: Mapping[str, float], update: int) -> None:
        now = int(1000 * time.time())
        metrics = [self._metric(f"{kind}/{name}", value, now, update) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def end(self, summary: TrainSummary | None) -> None:
        self._client.set_terminated(self._run, "FAILED" if summary is None else "FINISHED")


TRACKERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow}
