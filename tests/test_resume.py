"""Runs in processes of their own: killed, stopped, out of disk, or several at once, they end in the same weights."""

import contextlib
import csv
import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from stopping import after
from tiny import FULL, SETTINGS, Warm, command, draw, draw_shards, draw_splits, options, session
from ulsam.cli import main
from ulsam.model.build import load
from ulsam.training.checkpoint import read_checkpoint
from ulsam.training.config import TrainConfig
from ulsam.training.machine import why_not_compiled
from ulsam.training.probe import undecided

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes as Linux lists them")

TIMEOUT = 120.0  # seconds; what is waited for comes much sooner


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


def wait_for(event: Callable[[], Any], pause: float = 0.0) -> None:
    """Wait until ``event`` is true."""
    end = time.monotonic() + TIMEOUT
    while not event():
        assert time.monotonic() < end, "waited too long"
        time.sleep(pause)


def changed(path: Path, times: int) -> Callable[[], bool]:
    """An event: the file has been replaced so many times."""
    state = {"last": 0, "seen": -1}

    def look() -> bool:
        with contextlib.suppress(OSError):
            now = path.stat().st_ino
            state["seen"] += now != state["last"]
            state["last"] = now
        return state["seen"] >= times

    if not path.exists():
        state["seen"] = 0
    return look


def parts(run: Path, name: str = "") -> list[str]:
    return [entry for entry in os.listdir(run) if entry.startswith(f".{name}") and entry.endswith(".part")]


def check_whole(run: Path) -> None:
    """Whatever has its final name is complete."""
    for path in run.iterdir():
        if path.name == "config.yaml":
            assert yaml.safe_load(path.read_text())["seed"] == 0
        elif path.name == "checkpoint.pt":
            assert read_checkpoint(run) is not None
        elif path.name == "metrics.csv":
            for row in csv.DictReader(path.open()):
                assert float(row["train_loss"]) > 0
                assert float(row["images_per_second"]) > 0
        elif path.name == "curves.png":
            with Image.open(path) as image:
                image.load()
        elif path.name == "model.safetensors":
            assert load_file(path)
        elif path.name == "summary.json":
            assert json.loads(path.read_text())["scores"]
        else:
            assert path.name.startswith("."), path


def assert_same_end(run: Path, other: Path) -> None:
    """Both runs are finished and have the same weights and figures."""
    files = ["checkpoint.pt", "config.yaml", "curves.png", "metrics.csv", "model.safetensors", "summary.json"]
    assert sorted(os.listdir(run)) == files  # no temporary file is left
    check_whole(run)
    assert (run / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    mine, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (run, other))
    assert mine["scores"] == theirs["scores"]
    for row, same in zip(mine["epochs"], theirs["epochs"], strict=True):
        assert [row[key] for key in ("lr", "train_loss", "val_loss")] == [
            same[key] for key in ("lr", "train_loss", "val_loss")
        ]


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


@pytest.fixture(scope="module")
def odd_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """72 training images and 13 validation images, one of which cannot be read."""
    root = tmp_path_factory.mktemp("odd")
    draw(root / "train", 24)
    draw(root / "val", 5, seed=1)
    for name in ("000.png", "001.png"):
        (root / "val" / "class2" / name).unlink()
    (root / "val" / "class1" / "002.png").write_bytes(b"")
    return root


PAIR = {**SETTINGS, "workers": 1, "batch_size": 4, "accumulate": 2, "ema": 0.5, "insert": "blocks.2", "lr": 0.02}
TORCHRUN = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port"]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start_pair(interpreter: Warm, words: list[str], log: Path) -> list[int]:
    """Two processes as torchrun starts them."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    env = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return [interpreter.start(words, Path(f"{log}{rank}"), env=env[rank]) for rank in range(2)]


@pytest.fixture(scope="module")
def pair(odd_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A run of two processes under torchrun: its folder, output and errors."""
    run = tmp_path_factory.mktemp("runs") / "pair"
    words = ["train", str(odd_data), "--out", str(run), *options(PAIR)]
    process = command(words, launcher=[*TORCHRUN, free_port()])
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, err
    return run, out, err


@pytest.mark.slow
def test_torchrun_has_one_writer(pair: tuple[Path, str, str]) -> None:
    run, out, err = pair
    assert len(os.listdir(run)) == 6
    check_whole(run)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["versions"]["processes"] == "2"
    words = [line.split()[0] for line in out.splitlines()]
    assert words == ["start", "data", "cache", "model", "cost", "probe", "epoch", "epoch", "result", "note"]
    assert err.count("unreadable ") == 1
    assert read_checkpoint(run)["position"]["updates"] == 2 * (72 // (4 * 2) // 2)  # type: ignore[index]


@pytest.mark.slow
def test_torchrun_counts_every_image_once(
    pair: tuple[Path, str, str], odd_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = json.loads((pair[0] / "summary.json").read_text())
    words = ["--split", "val", "--device", "cpu", "--workers", "0", "--json"]
    assert main(["eval", str(pair[0] / "model.safetensors"), str(odd_data), *words]) == 0
    scores, expected = summary["scores"], json.loads(capsys.readouterr().out)["scores"]
    assert expected["unreadable"] == 1
    assert scores["images"] == 12
    assert scores["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    counted = {name: {key: row[key] for key in ("images", "top1")} for name, row in expected["per_class"].items()}
    assert scores["per_class"] == counted
    assert all(scores[key] == expected[key] for key in ("top1", "top1_interval_95", "top5"))
    assert [Path(name).parts[-2:] for name in summary["unreadable"]["val"]] == [("class1", "002.png")]


@pytest.mark.slow
def test_two_processes_resume_to_the_same_weights(
    interpreter: Warm, pair: tuple[Path, str, str], odd_data: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    pids = start_pair(
        interpreter, ["train", str(odd_data), "--out", str(run), *options({**PAIR, "save_seconds": 0})], log
    )
    wait_for(changed(run / "checkpoint.pt", 1))
    for pid in pids:
        interpreter.kill(pid)
    check_whole(run)
    pids = start_pair(interpreter, ["train", "--resume", str(run)], log)
    wait_for(changed(run / "checkpoint.pt", 1))
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    assert [interpreter.ask(wait=pid) for pid in pids] == [130, 130]
    assert f"resume with: torchrun --nproc-per-node 2 -m ulsam train --resume {run}\n" in Path(f"{log}0").read_text()
    assert "resume with" not in Path(f"{log}1").read_text()
    assert interpreter.run(["train", "--resume", str(run)], log) == 2  # alone
    assert "this run has 2 process(es), not 1: start as many" in log.read_text()
    pids = start_pair(interpreter, ["train", "--resume", str(run)], log)
    assert [interpreter.ask(wait=pid) for pid in pids] == [0, 0]
    assert_same_end(run, pair[0])


def test_two_processes_take_one_choice(interpreter: Warm, odd_data: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    settings = {**PAIR, "epochs": 200, "save_seconds": 0}
    pids = start_pair(interpreter, ["train", str(odd_data), "--out", str(run), *options(settings)], log)
    wait_for(changed(run / "checkpoint.pt", 1))
    for pid in pids:
        interpreter.kill(pid)
    assert not undecided(TrainConfig(**yaml.safe_load((run / "config.yaml").read_text())))
    assert " ms a step" in Path(f"{log}0").read_text()
    assert "probe " not in Path(f"{log}1").read_text()


@pytest.mark.slow
@pytest.mark.skipif(why_not_compiled() is not None, reason="no C++ compiler")
def test_two_processes_train_compiled(
    interpreter: Warm, pair: tuple[Path, str, str], odd_data: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    settings = {**PAIR, "compile": "inductor"}
    pids = start_pair(interpreter, ["train", str(odd_data), "--out", str(run), *options(settings)], log)
    assert [interpreter.ask(wait=pid) for pid in pids] == [0, 0], Path(f"{log}0").read_text()
    ours, eager = (load_file(folder / "model.safetensors") for folder in (run, pair[0]))
    assert ours.keys() == eager.keys()
    for name, value in eager.items():
        torch.testing.assert_close(ours[name], value, atol=1e-2, rtol=1e-1)


@pytest.mark.slow
def test_too_many_bad_images_end_all_processes(interpreter: Warm, tmp_path: Path) -> None:
    data, log = draw_splits(tmp_path / "data"), tmp_path / "log"
    bad = sorted((data / "train").rglob("*.png"))[::4]
    for path in bad:
        path.write_bytes(b"")
    words = ["train", str(data), "--out", str(tmp_path / "run"), *options({**PAIR, "epochs": 50, "lr": 1e-4})]
    assert [interpreter.ask(wait=pid) for pid in start_pair(interpreter, words, log)] == [2, 2]
    first, second = (Path(f"{log}{rank}").read_text() for rank in range(2))
    named = [line for line in (first + second).splitlines() if line.startswith("unreadable ")]
    assert 4 <= len(set(named)) == len(named) <= len(bad)
    for printed in (first, second):
        assert printed.splitlines()[-1].startswith("ulsam: error: more than 3 images cannot be read (named above)")


def test_two_processes_count_every_image_of_a_stream_once(interpreter: Warm, odd_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    root = draw_shards(tmp_path, odd_data / "train", val=(9, 1, 3))
    run, log = tmp_path / "run", tmp_path / "log"
    data = ["wds/birds", "--data-dir", str(root), "--class-names", str(root / "names.txt")]
    words = ["train", *data, "--out", str(run), *options({**SETTINGS, "epochs": 1, "batch_size": 3})]
    assert [interpreter.ask(wait=pid) for pid in start_pair(interpreter, words, log)] == [0, 0]
    summary = json.loads((run / "summary.json").read_text())
    words = ["eval", str(run / "model.safetensors"), *data, "--device", "cpu", "--workers", "1", "--json"]
    assert [interpreter.ask(wait=pid) for pid in start_pair(interpreter, words, log)] == [0, 0]
    measured = next(json.loads(line) for line in Path(f"{log}0").read_text().splitlines() if line[0] == "{")["scores"]
    assert measured["images"] == summary["scores"]["images"] == 13
    counts = {name: entry["images"] for name, entry in measured["per_class"].items()}
    assert counts == {"robin": 5, "wren": 4, "finch": 4}


def test_a_mistake_under_torchrun_is_reported_once(interpreter: Warm, odd_data: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    words = ["train", str(odd_data), "--out", str(tmp_path / "run"), *options({**PAIR, "insert": "blocks.99"})]
    first, second = start_pair(interpreter, words, log)
    assert interpreter.ask(wait=first) == 2
    assert interpreter.kill(second, signal.SIGTERM) == -signal.SIGTERM  # as torchrun does when one has failed
    printed = Path(f"{log}0").read_text() + Path(f"{log}1").read_text()
    assert printed.count("ulsam: error: no module is named 'blocks.99'") == 1
    assert "Traceback" not in printed


@pytest.mark.slow
def test_torchrun_stopped_and_resumed(pair: tuple[Path, str, str], odd_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = command(
        ["train", str(odd_data), "--out", str(run), *options({**PAIR, "save_seconds": 0})],
        launcher=[*TORCHRUN, free_port()],
    )
    wait_for(changed(run / "checkpoint.pt", 1))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=TIMEOUT)
    check_whole(run)
    assert not (run / "summary.json").exists()
    process = command(["train", "--resume", str(run)], launcher=[*TORCHRUN, free_port()])
    process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0
    assert_same_end(run, pair[0])


LOST = (
    "ulsam: error: one of the 2 processes is gone or does not answer (killed? memory full?): what is saved is whole; "
    "resume with: "
)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_who_loses_the_other_process_says_how_to_resume(
    interpreter: Warm, pair: tuple[Path, str, str], odd_data: Path, tmp_path: Path, lost: int
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    words = ["train", str(odd_data), "--out", str(run), *options({**PAIR, "save_seconds": 0})]
    pids = start_pair(interpreter, words, log)
    wait_for(changed(run / "checkpoint.pt", 1))
    interpreter.kill(pids[lost])
    assert interpreter.ask(wait=pids[1 - lost]) == 2
    printed = Path(f"{log}{1 - lost}").read_text()
    assert printed.endswith(f"{LOST}torchrun --nproc-per-node 2 -m ulsam train --resume {run}\n")
    assert "Traceback" not in printed
    pids = start_pair(interpreter, ["train", "--resume", str(run)], log)
    assert [interpreter.ask(wait=pid) for pid in pids] == [0, 0]
    assert_same_end(run, pair[0])


@pytest.mark.slow
def test_under_real_torchrun_one_process_says_that_another_is_gone(odd_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launcher = [*(word if word != "2" else "3" for word in TORCHRUN), free_port()]
    process = command(
        ["train", str(odd_data), "--out", str(run), *options({**PAIR, "epochs": 200, "save_seconds": 0})],
        launcher=launcher,
    )
    wait_for(changed(run / "checkpoint.pt", 1))
    first = next(one for one in psutil.Process(process.pid).children() if one.environ()["RANK"] == "0")
    first.kill()
    _, err = process.communicate(timeout=TIMEOUT)
    assert err.count("resume with: torchrun --nproc-per-node 3 -m ulsam train --resume") == 1
    assert "gloo" not in err


@pytest.mark.slow
def test_a_mistake_under_real_torchrun(odd_data: Path, tmp_path: Path) -> None:
    words = ["train", str(odd_data), "--out", str(tmp_path / "run"), *options({**PAIR, "insert": "blocks.99"})]
    process = command(words, launcher=[*TORCHRUN, free_port()])
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode != 0
    assert err.count("ulsam: error: no module is named 'blocks.99'") == 1
    assert not (tmp_path / "run").exists()


def test_the_saved_model_is_the_one_that_was_measured(unbroken: Path) -> None:
    model, _ = load(unbroken / "model.safetensors")
    state = read_checkpoint(unbroken)
    assert state is not None
    for name, value in model.state_dict().items():
        assert torch.equal(state["ema"][name], value)
    assert not torch.equal(state["ema"]["conv_stem.weight"], state["model"]["conv_stem.weight"])
