"""The library logs and prints nothing; the command line shows what it logs, as much as --quiet and --verbose say."""

import contextlib
import io
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tiny import SETTINGS, draw_splits, options
from ulsam.base.errors import UlsamError
from ulsam.base.logs import LOGGER
from ulsam.cli import COMMANDS, main, parse
from ulsam.study.slim import slim
from ulsam.training.config import TrainConfig
from ulsam.training.probe import resolve_auto
from ulsam.training.train import train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_splits(tmp_path_factory.mktemp("data"), train=8, val=4)


def test_the_library_prints_nothing(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], logged: Callable[[], str]
) -> None:
    settings = {**SETTINGS, "epochs": 1}
    (data / "train" / "class0" / "000.png").write_bytes(b"no image")
    train(data, tmp_path / "run", **settings)
    del settings["model"]
    model = tmp_path / "run" / "model.safetensors"
    slim(
        model,
        str(data),
        tmp_path / "slim",
        macs=0.999,
        layer={"layer": "eca"},
        images=6,
        fine_tune=False,
        settings=settings,
    )
    resolve_auto(TrainConfig.from_mapping({**settings, "data": str(data)}))
    assert capfd.readouterr() == ("", "")
    text = logged()
    assert "epoch   1/1: training loss" in text
    assert "unreadable " in text
    assert "chosen  " in text
    assert "probe   " in text


def test_a_command_shows_as_much_as_it_is_asked_for(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = {}
    for name in ("quiet", "normal", "verbose"):
        run = tmp_path / name
        words = ["train", str(data), "--out", str(run), *options({**SETTINGS, "epochs": 1})]
        assert main(words if name == "normal" else [*words, f"--{name}"]) == 0
        shown[name] = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown["quiet"]] in (["result"], ["result", "note"])
    kinds = [line.split()[0] for line in shown["normal"]]
    assert kinds[:4] == ["start", "data", "cache", "model"] and "epoch" in kinds
    assert f"wrote   {tmp_path / 'verbose' / 'summary.json'}" in "\n".join(shown["verbose"])
    assert not any(line.startswith("wrote ") for line in shown["normal"])


def test_verbose_shows_where_an_error_arose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "nowhere.safetensors", "--verbose"]) == 2
    *trace, last = capsys.readouterr().err.splitlines()
    assert trace[0] == "Traceback (most recent call last):"
    assert last == "ulsam: error: no model file nowhere.safetensors"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_can_be_quiet_or_verbose(command: str) -> None:
    with pytest.raises(UlsamError, match="--verbose: not allowed with argument --quiet"):
        parse([command, "--quiet", "--verbose"])


def test_a_command_leaves_the_logger_as_it_was(tmp_path: Path) -> None:
    before = LOGGER.level, list(LOGGER.handlers)
    with contextlib.redirect_stdout(io.StringIO()):
        main(["birds", str(tmp_path / "birds"), "--train", "1", "--val", "1", "--verbose"])
        main(["info", "nowhere.safetensors", "--quiet"])
    assert (LOGGER.level, LOGGER.handlers) == before


BARS = """
import ulsam.base.logs as logs
def shown(**options):
    return not logs.progress(range(3), **options).disable
found = [shown(), logs.show_progress(False), shown(), logs.show_progress(True), shown(), shown(shown=False)]
print(*found)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no pseudo-terminals")
def test_bars_are_for_terminals_and_can_be_switched_off() -> None:
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run([sys.executable, "-c", BARS], stdout=subprocess.PIPE, stderr=theirs, text=True)
    finally:
        os.close(theirs)
        os.close(ours)
    assert done.stdout.split() == ["True", "True", "False", "False", "True", "False"]


def test_without_configuration_progress_is_not_shown_and_warnings_are(capfd: pytest.CaptureFixture[str]) -> None:
    code = "import logging; from ulsam.base.logs import say; say('epoch'); say('unreadable x', level=logging.WARNING)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "unreadable x\n")
    assert logging.getLogger("ulsam").handlers == []
