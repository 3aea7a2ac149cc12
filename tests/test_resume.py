"""Runs in processes of their own: killed, stopped or out of disk, they end in the same weights."""

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from resuming import TIMEOUT, assert_same_end, changed, check_whole, wait_for
from stopping import after
from tiny import FULL, SETTINGS, Warm, command, draw_splits, options, session
from ulsam.cli import main
from ulsam.model.build import load
from ulsam.training.checkpoint import read_checkpoint
from ulsam.training.config import TrainConfig
from ulsam.training.probe import undecided

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes as Linux lists them")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 training images: 15 updates an epoch with `FULL`; 15 validation images."""
    return draw_splits(tmp_path_factory.mktemp("data"), train=80, val=5)


@pytest.fixture(scope="module")
def unbroken(interpreter: Warm, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `FULL` that nothing happens to."""
    run = tmp_path_factory.mktemp("runs") / "unbroken"
    assert interpreter.run(["train", str(data), "--out", str(run), *options(FULL)], run.with_name("log")) == 0
    return run


def parts(run: Path, name: str = "") -> list[str]:
    return [entry for entry in os.listdir(run) if entry.startswith(f".{name}") and entry.endswith(".part")]


# killed


def kill_often(interpreter: Warm, data: Path, run: Path, log: Path, seed: int, kills: int, write_hits: int) -> None:
    """Train with `FULL` and resume after each SIGKILL.

    The kills: before the first checkpoint, at so many random moments, in so many checkpoint writes, and between the
    last checkpoint and the summary.
    """
    draws = random.Random(seed)
    checkpoint = run / "checkpoint.pt"

    def start() -> int:
        new = ["train", str(data), "--out", str(run), *options(FULL)]
        return interpreter.start(["train", "--resume", str(run)] if (run / "config.yaml").exists() else new, log)

    def kill(pid: int) -> None:
        assert interpreter.kill(pid) == -signal.SIGKILL, log.read_text()
        check_whole(run)

    pid = start()
    wait_for(lambda: (run / "config.yaml").exists())
    kill(pid)
    for _ in range(kills):
        pid = start()
        wait_for(changed(checkpoint, draws.randint(1, 3)))
        time.sleep(draws.uniform(0, 0.015))
        kill(pid)
        assert checkpoint.exists()
    hits = 0
    for _ in range(8 * write_hits):
        if hits < write_hits:
            pid = start()
            wait_for(changed(checkpoint, 1))
            wait_for(lambda: parts(run, "checkpoint.pt"))
            kill(pid)
            hits += bool(parts(run, "checkpoint.pt"))
    assert hits == write_hits
    pid = start()
    wait_for(lambda: (run / "model.safetensors").exists(), 0.001)
    kill(pid)
    assert not (run / "summary.json").exists()
    assert interpreter.ask(wait=start()) == 0
    wait_for(lambda: not session(pid), 0.1)  # the reading processes of those killed have ended too


def test_killed_at_any_moment_it_ends_in_the_same_weights(
    interpreter: Warm, data: Path, unbroken: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    kill_often(interpreter, data, run, log, seed=1, kills=2, write_hits=1)
    assert_same_end(run, unbroken)
    printed = log.read_text()
    assert printed.count("resume  in epoch") >= 3
    assert "warning " not in printed
    assert "ulsam: error" not in printed


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 8))
def test_killed_more_often(seed: int, interpreter: Warm, data: Path, unbroken: Path, tmp_path: Path) -> None:
    kill_often(interpreter, data, tmp_path / "run", tmp_path / "log", seed, kills=5, write_hits=2)
    assert_same_end(tmp_path / "run", unbroken)


def test_killed_after_its_probe_it_does_not_probe_again(interpreter: Warm, data: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    settings = {**SETTINGS, "epochs": 100, "save_seconds": 0}  # 3000 steps: enough for a probe
    pid = interpreter.start(["train", str(data), "--out", str(run), *options(settings)], log)
    wait_for(changed(run / "checkpoint.pt", 2))
    assert interpreter.kill(pid) == -signal.SIGKILL, log.read_text()
    chosen = (run / "config.yaml").read_bytes()
    assert not undecided(TrainConfig(**yaml.safe_load(chosen)))
    assert " ms a step" in log.read_text()
    probes = log.read_text().count("probe ")
    pid = interpreter.start(["train", "--resume", str(run)], log)
    wait_for(changed(run / "checkpoint.pt", 2))
    assert interpreter.kill(pid) == -signal.SIGKILL, log.read_text()
    assert "resume  in epoch" in log.read_text()
    assert log.read_text().count("probe ") == probes
    assert (run / "config.yaml").read_bytes() == chosen
    state = read_checkpoint(run)
    assert state is not None
    assert {state["settings"][name] for name in ("layout", "amp", "compile")} <= {
        *("contiguous", "channels_last", "none", "bf16")
    }


# stopped


SIGHUP = getattr(signal, "SIGHUP", signal.SIGTERM)  # not on Windows


@pytest.mark.parametrize(
    "number", [*(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, SIGHUP)), signal.SIGTERM]
)
def test_stopped_it_saves_and_says_how_to_resume(
    number: int, interpreter: Warm, data: Path, unbroken: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "a run", tmp_path / "log"
    settings = {**FULL, "save_seconds": 1000}
    words = ["train", str(data), "--out", str(run), *options(settings)]
    if number == signal.SIGINT:  # as a terminal does it, to an ordinary process
        process = command(words)
        wait_for(lambda: (run / "metrics.csv").exists(), 0.001)
        time.sleep(0.05)
        os.killpg(process.pid, number)
        _, err = process.communicate(timeout=TIMEOUT)
        pid, code = process.pid, process.returncode
    else:
        pid = interpreter.start(words, log)
        wait_for(lambda: log.exists() and "\nepoch   1/2: " in log.read_text(), 0.001)
        code = interpreter.kill(pid, number, group=True)
        err = "\n" + log.read_text().partition("\n\n")[2]
    assert code == 130
    wait_for(lambda: session(pid) == [], 0.05)  # a fork server notices a moment later
    lines = [line for line in err.splitlines() if line]
    assert lines[0] == "ulsam: saving and stopping; once more stops at once"
    assert lines[1].startswith("ulsam: stopped in epoch 2, step ")
    assert lines[1].endswith(f"; resume with: ulsam train --resume '{run}'")
    assert len(lines) == 2
    check_whole(run)
    state = read_checkpoint(run)
    assert state is not None
    assert state["position"]["batch"] > 0  # saved in mid-epoch
    assert interpreter.run(["train", "--resume", str(run)], log) == 0
    assert_same_end(run, unbroken)


@pytest.mark.slow
def test_a_terminal_that_is_closed_stops_a_run_and_under_nohup_does_not(data: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "ulsam", "train", str(data), *options({**FULL, "save_seconds": 1000, "epochs": 50})]
    for name, launcher in (("alone", []), ("nohup", ["nohup"])):
        run = tmp_path / name
        pid, terminal = os.forkpty()
        if not pid:
            os.environ["OMP_NUM_THREADS"] = "1"
            os.chdir(tmp_path)  # where nohup writes
            os.execvp((launcher or words)[0], [*launcher, *words, "--out", str(run)])
        wait_for(lambda run=run: (run / "metrics.csv").exists(), 0.01)
        os.close(terminal)
        if name == "nohup":
            rows = (run / "metrics.csv").read_text().count("\n")
            wait_for(lambda run=run, rows=rows: (run / "metrics.csv").read_text().count("\n") > rows, 0.01)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        else:
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
            state = read_checkpoint(run)
            assert state is not None and state["position"]["batch"] > 0


def test_a_mistake_in_mid_run_ends_the_reading_processes(interpreter: Warm, data: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    settings = {**FULL, "lr": 1e30, "warmup_epochs": 0}
    pid = interpreter.start(["train", str(data), "--out", str(run), *options(settings)], log)
    assert interpreter.ask(wait=pid) == 2
    wait_for(lambda: session(pid) == [], 0.05)  # a fork server notices a moment later
    assert log.read_text().splitlines()[-1].startswith("ulsam: error: diverged: the loss is ")


def test_a_killed_reading_process_is_one_line(interpreter: Warm, data: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    pid = interpreter.start(["train", str(data), "--out", str(run), *options({**FULL, "epochs": 50})], log)
    wait_for(changed(run / "checkpoint.pt", 2))
    os.kill(max(set(session(pid)) - {pid}), signal.SIGKILL)
    assert interpreter.ask(wait=pid) == 2
    assert log.read_text().splitlines()[-1].startswith("ulsam: error: a process that reads images was killed")
    check_whole(run)
    wait_for(lambda: not session(pid), 0.1)


# the disk


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_checkpoint(interpreter: Warm, data: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    settings = {**SETTINGS, "save_seconds": 0}  # no workers: their shared memory is files too
    pid = interpreter.start(["train", str(data), "--out", str(run), *options(settings)], log)
    wait_for(changed(run / "checkpoint.pt", 2))
    interpreter.kill(pid)
    before = (run / "checkpoint.pt").read_bytes()
    assert interpreter.run(["train", "--resume", str(run)], log, file_size=len(before) // 2) == 2
    last = log.read_text().splitlines()[-1]
    assert last.startswith(f"ulsam: error: cannot write {run}/checkpoint.pt: File too large; what was there before is")
    assert (run / "checkpoint.pt").read_bytes() == before
    assert parts(run) == []
    check_whole(run)
    assert interpreter.run(["train", "--resume", str(run)], log) == 0
    check_whole(run)
    assert (run / "summary.json").exists()


# several processes


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="who may write anywhere")
def test_a_folder_that_becomes_read_only_is_one_line(data: Path, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    with after(1, lambda: run.chmod(0o555)):
        assert main(["train", str(data), "--out", str(run), *options({**SETTINGS, "save_seconds": 0})]) == 2
    run.chmod(0o755)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"ulsam: error: cannot write {run / 'checkpoint.pt'}: Permission denied"
    assert main(["train", "--resume", str(run)]) == 0


def test_the_saved_model_is_the_one_that_was_measured(unbroken: Path) -> None:
    model, _ = load(unbroken / "model.safetensors")
    state = read_checkpoint(unbroken)
    assert state is not None
    for name, value in model.state_dict().items():
        assert torch.equal(state["ema"][name], value)
    assert not torch.equal(state["ema"]["conv_stem.weight"], state["model"]["conv_stem.weight"])
