"""Run what a grid asks for, some runs at a time, each in a process of its own."""

import contextlib
import dataclasses
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from filelock import FileLock

from ulsam.base.errors import Interrupted, UlsamError, printable
from ulsam.base.files import make_folder, write_atomic
from ulsam.base.locks import take_lock
from ulsam.base.logs import say
from ulsam.base.processes import GROUP
from ulsam.study.comparison_folder import ComparisonFolder
from ulsam.study.epoch_lines import EpochLines
from ulsam.study.grid import Failed, Grid, Run
from ulsam.training.config import TrainConfig
from ulsam.training.restore import CHANGEABLE_ON_RESUME
from ulsam.training.signals import stop_signals

PAUSE = 0.2  # seconds between two looks at the runs that were started
OTHERS = 5.0  # seconds between two looks at what other processes have done: each reads the whole plan


@dataclass(frozen=True)
class EndedRun:
    """A run that has ended: with a summary in its folder, or for a reason."""

    run: Run
    reason: str | None = None


class Launcher(Protocol):
    """Where runs are started."""

    def start(self, run: Run) -> bool:
        """Start a run; False if another process has it in hand."""

    def room(self) -> bool:
        """Whether one more run may be started."""

    def running(self) -> Sequence[Run]:
        """The runs that were started and have not been given out by :meth:`ended`."""

    def ended(self) -> list[EndedRun]:
        """The runs that have ended since the last call."""

    def stop(self) -> None:
        """Let all runs save and stop, and wait for them."""


class LocalLauncher:
    """So many processes at a time on this machine."""

    def __init__(self, comparison: ComparisonFolder, jobs: int) -> None:
        self.comparison, self.jobs = comparison, jobs
        self.processes: list[tuple[Run, subprocess.Popen[bytes], FileLock]] = []

    def start(self, run: Run) -> bool:
        folder = self.comparison.folder(run)
        make_folder(folder.parent)
        lock = lock_run(folder)
        if lock is None:
            return False
        with contextlib.ExitStack() as ending:
            ending.callback(lock.release)
            self.comparison.check(run)
            if not (folder / "summary.json").exists():  # by another process, since we looked
                self.processes.append((run, start_process(folder, run.config), lock))
                ending.pop_all()
        return True

    def room(self) -> bool:
        return len(self.processes) < self.jobs

    def running(self) -> list[Run]:
        return [run for run, *_ in self.processes]

    def ended(self) -> list[EndedRun]:
        over = [started for started in self.processes if started[1].poll() is not None]
        self.processes = [started for started in self.processes if started not in over]
        for *_, lock in over:
            lock.release()
        return [EndedRun(run, reason_of(process.returncode, self.comparison.folder(run))) for run, process, _ in over]

    def stop(self) -> None:
        for _, process, _ in self.processes:
            stop_process(process)
        for _, process, lock in self.processes:
            process.wait()
            lock.release()
        self.processes = []


def run_all(grid: Grid, comparison: ComparisonFolder, launcher: Launcher, again: str) -> None:
    """Run what the grid asks for until nothing is due; a run that fails does not stop the others.

    Args:
        grid: what is compared.
        comparison: its folder.
        launcher: where runs are started.
        again: the command that resumes, shown when this is interrupted.

    Raises:
        UlsamError: a run's folder holds a run with other settings.
        Interrupted: Ctrl-C or SIGTERM, after every run has saved.
    """
    announced: set[str] = set()
    epochs = EpochLines(grid, comparison)
    due, looked = grid.due(comparison.outcome), time.monotonic()
    with stop_signals() as stopping, _stopped_at_the_end(launcher):
        while due or launcher.running():
            if stopping():
                raise Interrupted("stopped, all runs are saved", f"resume with: {again}")
            busy = [str(run) for run in launcher.running()]
            for run in due:
                if str(run) not in busy and launcher.room() and not launcher.start(run) and str(run) not in announced:
                    announced.add(str(run))
                    say(f"wait    {run}: another process is training it")
            time.sleep(PAUSE)
            over = launcher.ended()
            epochs.look([*launcher.running(), *(ended.run for ended in over)])
            for ended in over:
                if ended.reason:
                    comparison.fail(ended.run, ended.reason)
                elif comparison.outcome(ended.run) is None:
                    comparison.fail(ended.run, "it ended without a summary")
                say(f"run     {_progress(grid, comparison, launcher)} {ended.run}: {_result(comparison, ended.run)}")
            if over or time.monotonic() > looked + OTHERS:
                due, looked = grid.due(comparison.outcome), time.monotonic()


def start_process(folder: Path, config: TrainConfig, cwd: str | None = None) -> "subprocess.Popen[bytes]":
    """Start training in ``folder``, or resume what is there; its output goes to the file beside it, FOLDER.log.

    Relative paths among the settings are seen from ``cwd``, by default the working directory of this process. The
    process holds a lock of its own, which :func:`lock_run` heeds. It saves and stops when its standard input is closed.
    """
    if (folder / "config.yaml").is_file():
        words = ["train", config.data, "--resume", str(folder), *resume_options(config)]
    else:
        settings = folder.with_name(f"{folder.name}.yaml")
        write_atomic(settings, config.to_yaml())
        words = ["train", "--config", str(settings), "--out", str(folder)]
    say(f"start   ulsam {shlex.join(words)}", level=logging.DEBUG)
    with open(folder.with_name(f"{folder.name}.log"), "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "ulsam.child_process", str(_running_lock_of(folder).absolute()), *words],
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
            **GROUP,  # Ctrl-C comes to us alone, and we pass it on once
        )


def resume_options(config: TrainConfig) -> list[str]:
    """The options of ``ulsam train --resume`` for the settings that may differ from those of the run's beginning.

    >>> resume_options(TrainConfig(data="birds", workers=0, track=["wandb", "mlflow"]))[:2]
    ['--workers=0', '--cache=auto']
    """
    options: list[str] = []
    for name in CHANGEABLE_ON_RESUME:
        value, option = getattr(config, name), f"--{name.replace('_', '-')}"
        if isinstance(value, list):
            options += [option, *value] if value else []
        elif value is not None and name != "data":
            options.append(f"{option}={value}")
    return options


def stop_process(process: "subprocess.Popen[bytes]") -> None:
    """Let a process of :func:`start_process` save and stop."""
    if process.stdin:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


def reason_of(code: int, folder: Path) -> str | None:
    """Why a run ended without a result, None if it did not: the last line that it printed."""
    if code == 0:
        return None
    log = folder.with_name(f"{folder.name}.log")
    with contextlib.suppress(FileNotFoundError), open(log, "rb") as file:
        lines = _tail(file).decode("utf-8", errors="replace").replace("\r", "\n").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        if code > 0 and last:
            return printable(last.removeprefix("ulsam: error: "))
    return f"killed by signal {-code}" if code < 0 else f"exit status {code}"


def lock_run(folder: Path, wait: bool = False) -> FileLock | None:
    """Take charge of a run; None if another process has it, unless we ``wait`` for it.

    Where that other process was killed, the one that it had started may still be saving: it holds the run, too.
    """
    lock = take_lock(lock_of(folder), wait)
    running = lock and take_lock(_running_lock_of(folder), wait)
    if running:
        running.release()  # for the process that we start; we alone start one here
    elif lock:
        lock.release()
    return lock if running else None


def lock_of(folder: Path) -> Path:
    """The lock file of a run's folder: of the process that trains in there, or has it trained."""
    return folder.with_name(f".{folder.name}.lock")


def _running_lock_of(folder: Path) -> Path:
    """The lock file of the process that :func:`start_process` starts."""
    return folder.with_name(f".{folder.name}.running")


def threads_of(config: TrainConfig, jobs: int) -> TrainConfig:
    """The settings with the cores shared out evenly among ``jobs`` runs, where they do not say how many threads.

    >>> threads_of(TrainConfig("birds", threads=3), jobs=2).threads
    3
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return dataclasses.replace(config, threads=config.threads or max(1, cores // jobs))


@contextlib.contextmanager
def _stopped_at_the_end(launcher: Launcher) -> Iterator[None]:
    try:
        yield
    finally:
        launcher.stop()


def _tail(file: IO[bytes]) -> bytes:
    file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
    return file.read()


def _progress(grid: Grid, comparison: ComparisonFolder, launcher: Launcher) -> str:
    """Runs that have ended, of all."""
    busy = map(str, launcher.running())
    known = grid.known(comparison.outcome)
    ended = {str(run) for run in known if comparison.outcome(run) is not None}.difference(busy)
    return f"[{len(ended)}/{max(grid.size, len(known))}]"  # rates that turn out close make more of them


def _result(comparison: ComparisonFolder, run: Run) -> str:
    found = comparison.outcome(run)
    if found is None or isinstance(found, Failed):
        return f"failed: {found.reason if found else 'no summary'}"
    seconds = sum(row["seconds"] for row in found["epochs"])
    return f"top-1 {100 * found['scores']['top1']:.2f} % on {found['split']} images, {seconds:.0f} s of training"


def refuse_torchrun() -> None:
    """Raise under torchrun.

    Raises:
        UlsamError: this is one of several processes.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UlsamError(
            "a comparison starts its processes itself: leave torchrun out, and use `jobs` or `launcher=ray`"
        )
