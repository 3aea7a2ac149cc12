"""Two processes never train into one folder, and what a killed one left half-written is removed."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stopping import stop_after
from tiny import SETTINGS, draw_splits
from ulsam.base.errors import Interrupted, UlsamError
from ulsam.cli import main
from ulsam.training.config import TrainConfig
from ulsam.training.run_lock import HOLDER, LOCK, check_idle, run_lock
from ulsam.training.train import resume, train

HOLD = """
import sys, time
from pathlib import Path
from ulsam.training.run_lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_splits(tmp_path_factory.mktemp("data"), train=6, val=2)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[Path, "subprocess.Popen[str]"]]:
    """A folder, and another process that has locked it."""
    (tmp_path / "run").mkdir()
    words = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "held\n"
        yield tmp_path / "run", process
        process.kill()


def test_the_other_process_is_named(holder: tuple[Path, "subprocess.Popen[str]"], data: Path, capsys) -> None:
    run, process = holder
    message = f"process {process.pid} already trains into {run}: wait for its end, or name another"
    with pytest.raises(
        UlsamError, match=f"^{message} `out`; if it ran on a machine that is gone, delete {run / '.lock'}$"
    ):
        train(TrainConfig(str(data), **SETTINGS), run)
    (run / "config.yaml").write_text(
        TrainConfig(str(data), layout="contiguous", amp="none", compile="none", **SETTINGS).to_yaml()
    )
    with pytest.raises(UlsamError, match=message):
        resume(run)
    assert main(["train", str(data), "--resume", str(run)]) == 2
    assert f"{message} --out" in capsys.readouterr().err
    assert {LOCK, HOLDER, "config.yaml"} == set(os.listdir(run))


def test_a_killed_process_holds_nothing(holder: tuple[Path, "subprocess.Popen[str]"], data: Path) -> None:
    run, process = holder
    process.kill()
    process.wait()
    (run / f".config.yaml.{process.pid}.part").touch()  # as it was in its first write
    train(TrainConfig(str(data), **{**SETTINGS, "epochs": 1}), run)
    assert not [name for name in os.listdir(run) if name.startswith(".")]


def test_a_stopped_run_is_free(data: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted), stop_after(1):
        train(TrainConfig(str(data), **SETTINGS), tmp_path / "run")
    check_idle(tmp_path / "run")
    resume(tmp_path / "run")
    assert not [name for name in os.listdir(tmp_path / "run") if name.startswith(".")]


def test_a_run_that_began_meanwhile_is_seen(tmp_path: Path) -> None:

    with (
        run_lock(tmp_path),
        pytest.raises(UlsamError, match=f"^process {os.getpid()} already trains into "),
        run_lock(tmp_path),
    ):
        pytest.fail("locked twice")
    assert HOLDER not in os.listdir(tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system forks no process")
def test_the_reading_processes_of_a_killed_one_are_waited_for(tmp_path: Path) -> None:
    code = HOLD.replace("time.sleep(600)", "import os\n    os.fork() or time.sleep(1.5)\n    os._exit(0)")
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "held\n"
        process.wait()
        began = time.monotonic()
        with run_lock(tmp_path):
            assert time.monotonic() - began < 9


def test_a_folder_that_cannot_be_locked_is_one_line(tmp_path: Path) -> None:
    (tmp_path / LOCK).mkdir()
    with pytest.raises(UlsamError, match=r"^cannot lock the folder "), run_lock(tmp_path):
        pytest.fail("locked")
