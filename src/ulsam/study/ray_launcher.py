"""Runs spread over machines by Ray (https://docs.ray.io): each run is one task.

Ray starts a task that is lost with its node again on another one. It resumes from the run's last checkpoint where all
nodes see the comparison's folder under the same path, and from the start where they do not; then the files of a
finished run, without its checkpoint, come back to the driver. Data, weights and a teacher must lie under the same paths
on all nodes, relative ones seen from the directory where the command is given, and ulsam must be installed there.
"""

import contextlib
import logging
import os
import platform
import tempfile
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ulsam.base.errors import UlsamError, first_line, printable
from ulsam.base.extras import extra
from ulsam.base.files import make_folder, write_atomic
from ulsam.study.comparison_folder import ComparisonFolder
from ulsam.study.grid import Run
from ulsam.study.launch import EndedRun, lock_run, reason_of, start_process, stop_process
from ulsam.training.checkpoint import CHECKPOINT
from ulsam.training.config import TrainConfig

RETRIES = 8  # of a run whose node was lost
TIMEOUT = 90.0  # seconds in which runs save and stop


class RayLauncher:
    """As many runs at a time as a Ray cluster has room for, or ``jobs``.

    Args:
        comparison: the folder of the comparison.
        threads: CPUs that a run asks for.
        gpus: that a run asks for.
        jobs: the most runs at a time; 0 for no limit.
        address: of the cluster; by default RAY_ADDRESS, else a cluster of this machine alone is started.

    Raises:
        UlsamError: Ray is not installed, or the cluster does not answer.
    """

    def __init__(
        self, comparison: ComparisonFolder, *, threads: int, gpus: int = 0, jobs: int = 0, address: str | None = None
    ) -> None:
        require_ray()
        import ray

        self.ray, self.comparison, self.jobs = ray, comparison, jobs
        self.token = comparison.root.absolute() / f".shared-{uuid.uuid4().hex}"
        self.tasks: dict[Any, Run] = {}
        self.started = not ray.is_initialized()
        if self.started:
            where = address or os.environ.get("RAY_ADDRESS") or "local"
            options: dict[str, Any] = {"include_dashboard": False} if where == "local" else {}
            try:
                ray.init(address=where, log_to_driver=False, logging_level=logging.ERROR, **options)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise UlsamError(f"no Ray cluster answers at {where}: {printable(first_line(error))}") from error
        make_folder(comparison.root)
        self.token.touch()
        self.task = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=RETRIES)(train_there)

    def start(self, run: Run) -> bool:
        self.comparison.check(run)
        folder = str(self.comparison.folder(run).absolute())
        self.tasks[self.task.remote(folder, run.config.to_yaml(), str(self.token), os.getcwd())] = run
        return True

    def room(self) -> bool:
        return not self.jobs or len(self.tasks) < self.jobs

    def running(self) -> list[Run]:
        return list(self.tasks.values())

    def ended(self) -> list[EndedRun]:
        if not self.tasks:
            return []
        over, _ = self.ray.wait(list(self.tasks), num_returns=len(self.tasks), timeout=0)
        return [self._end(task, self.tasks.pop(task)) for task in over]

    def stop(self) -> None:
        for task in self.tasks:
            self.ray.cancel(task)
        if self.tasks:
            self.ray.wait(list(self.tasks), num_returns=len(self.tasks), timeout=TIMEOUT)
        self.tasks = {}
        self.token.unlink(missing_ok=True)
        if self.started:
            self.ray.shutdown()

    def _end(self, task: Any, run: Run) -> EndedRun:
        try:
            reason, files = self.ray.get(task)
        except self.ray.exceptions.RayError as error:
            return EndedRun(run, f"Ray lost it: {printable(first_line(error))}")
        receive(self.comparison.folder(run), files)
        return EndedRun(run, reason)


def require_ray() -> None:
    """Raise unless Ray is installed.

    Raises:
        UlsamError: it is not.
    """
    with extra("ray", "`launcher=ray` needs"):
        import ray  # noqa: F401


def train_there(folder: str, settings: str, token: str, cwd: str) -> tuple[str | None, dict[str, bytes]]:
    """Train on the node where this is called; what a Ray task does.

    Args:
        folder: of the run, as the driver calls it.
        settings: YAML.
        token: a file beside the runs on the driver; a node that sees it shares the driver's storage.
        cwd: the driver's working directory, from which relative paths among the settings are seen.

    Returns:
        Why the run failed, or None; and, where storage is not shared, its files by name, the log too.
    """
    import yaml

    config = TrainConfig.from_mapping(yaml.safe_load(settings))
    if not Path(cwd).is_dir():
        return f"the node {platform.node()} has no folder {cwd}, from where the command was given", {}
    if Path(token).exists():
        return _train(Path(folder), config, cwd), {}
    with tempfile.TemporaryDirectory(prefix="ulsam-") as scratch:
        there = Path(scratch) / Path(folder).name
        reason = _train(there, config, cwd)
        files = [path for path in there.glob("*") if path.is_file() and path.name != CHECKPOINT]
        log = there.with_name(f"{there.name}.log")
        return reason, {path.name: path.read_bytes() for path in [*files, log] if path.is_file()}


def receive(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files of a run that came back from a node; the summary last, because with it the run is finished."""
    if not files:
        return
    make_folder(folder)
    for name in sorted(files, key=lambda name: name == "summary.json"):
        beside = name == f"{folder.name}.log"
        write_atomic(folder.with_name(name) if beside else folder / name, files[name])


def _train(folder: Path, config: TrainConfig, cwd: str) -> str | None:
    """Train in ``folder``, in a process that ends with this one; why it failed, or None."""
    make_folder(folder.parent)
    lock = lock_run(folder, wait=True)  # the process of a lost task may still be saving
    if lock is None:
        return None
    with contextlib.ExitStack() as ending:
        ending.callback(lock.release)
        if (folder / "summary.json").exists():
            return None
        process = start_process(folder, config, cwd)
        ending.callback(process.wait)
        ending.callback(stop_process, process)
        while process.poll() is None:
            time.sleep(0.2)  # in which Ray can cancel the task
    return reason_of(process.returncode, folder)
