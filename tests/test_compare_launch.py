"""Comparisons in processes of their own: killed, several at once; no run is lost, no process left."""

import argparse
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tiny import SETTINGS, Warm, draw_splits, options
from ulsam.cli.settings import add_settings, given_settings
from ulsam.study.grid import Failed
from ulsam.study.launch import reason_of, resume_options, start_process
from ulsam.training.config import TrainConfig
from ulsam.training.restore import CHANGEABLE_ON_RESUME

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes as Linux lists them")

LONG = {**SETTINGS, "epochs": 400, "layout": "contiguous", "amp": "none", "compile": "none", "save_seconds": 0}
SHORT = {**LONG, "epochs": 1}
TIMEOUT = 120.0  # seconds; what is waited for comes much sooner


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_splits(tmp_path_factory.mktemp("data"), train=16, val=4)


def words(data: Path, out: Path, settings: dict[str, Any], seeds: int = 1, **more: Any) -> list[str]:
    arms = ["--arm", "base", "--arm", "size=24"]
    return ["compare", str(data), *arms, "--seeds", str(seeds), *options({**settings, **more}), "--out", str(out)]


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"data_dir": "-odd name", "workers": 0, "cache": "true", "max_unreadable": 1.0, "device": "cpu"},
        {"threads": 2, "save_seconds": 0.5, "track": ["tensorboard", "mlflow"]},
    ],
)
def test_a_run_is_resumed_with_the_settings_that_may_differ(changed: dict[str, Any]) -> None:
    config = TrainConfig(data="birds", **changed)
    parser = argparse.ArgumentParser()
    add_settings(parser)
    given = given_settings(parser.parse_args(resume_options(config)))
    assert given.keys() <= set(CHANGEABLE_ON_RESUME) and changed.items() <= given.items()
    assert TrainConfig(data="birds", **given) == config


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "diverged"), [({"lr": 1e30}, True), ({"batch_size": 1000}, False)])
def test_what_its_process_prints_says_whether_a_run_diverged(
    settings: dict[str, Any], diverged: bool, data: Path, tmp_path: Path
) -> None:
    """The command line has put flags in the place of arguments by then."""
    run, config = tmp_path / "run", TrainConfig(data=str(data), **{**SHORT, **settings})
    process = start_process(run, config)
    assert process.wait(TIMEOUT) == 2
    reason = reason_of(2, run)
    assert reason is not None and "--" in reason
    assert Failed(reason).diverged == diverged


def wait_for(event: Callable[[], Any]) -> None:
    end = time.monotonic() + TIMEOUT
    while not event():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def runs_of(out: Path) -> list[int]:
    """The processes that train in this folder, zombies aside."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                line = (entry / "cmdline").read_bytes().decode()
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if "ulsam.child_process" in line and str(out) in line and state != "Z":
                found.append(int(entry.name))
    return found


def checkpoints(out: Path) -> int:
    return len(list(out.glob("arms/*/*/checkpoint.pt")))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "stopped"])
def test_no_run_outlives_the_comparison_and_none_is_lost(
    number: int, interpreter: Warm, data: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    pid = interpreter.start([*words(data, out, LONG), "--jobs", "2"], log)
    wait_for(lambda: checkpoints(out) == 2)
    assert len(runs_of(out)) == 2
    status = interpreter.kill(pid, number)
    wait_for(lambda: not runs_of(out))
    assert checkpoints(out) == 2
    for run in out.glob("arms/*/*/"):
        assert "resume with: ulsam train --resume" in run.with_name(f"{run.name}.log").read_text()
        assert not (run / "summary.json").exists()
    assert not list(out.glob("arms/*/*.failed"))
    if number == signal.SIGTERM:
        assert status == 130
        assert "resume with: ulsam compare" in log.read_text()


@pytest.mark.slow
def test_two_comparisons_in_one_folder_share_the_runs(interpreter: Warm, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pids = [interpreter.start(words(data, out, SHORT, seeds=2), tmp_path / f"log{number}") for number in range(2)]
    assert [interpreter.ask(wait=pid) for pid in pids] == [0, 0]
    logs = [(tmp_path / f"log{number}").read_text() for number in range(2)]
    trained = [
        line.split("] ")[1].split(":")[0] for log in logs for line in log.splitlines() if line.startswith("run ")
    ]
    assert sorted(trained) == ["base, seed-0", "base, seed-1", "size=24, seed-0", "size=24, seed-1"]
    results = [log[log.index("parameters") :] for log in logs]
    assert "not run" not in results[0] + results[1]


@pytest.mark.slow
def test_a_killed_comparison_ends_in_the_weights_of_an_unbroken_one(
    interpreter: Warm, data: Path, tmp_path: Path
) -> None:
    settings = {**LONG, "epochs": 12}
    assert interpreter.run(words(data, tmp_path / "whole", settings), tmp_path / "log") == 0
    out = tmp_path / "broken"
    pid = interpreter.start([*words(data, out, settings), "--jobs", "2"], tmp_path / "log1")
    wait_for(lambda: checkpoints(out) == 2)
    interpreter.kill(pid)
    wait_for(lambda: not runs_of(out))
    assert interpreter.run([*words(data, out, settings), "--threads", "1"], tmp_path / "log2") == 0
    for run in ("base/seed-0", "size-24/seed-0"):
        files = [folder / "arms" / run / "model.safetensors" for folder in (tmp_path / "whole", out)]
        assert files[0].read_bytes() == files[1].read_bytes()
    results = [json.loads((folder / "compare.json").read_text()) for folder in (tmp_path / "whole", out)]
    assert results[0]["differences"] == results[1]["differences"]
