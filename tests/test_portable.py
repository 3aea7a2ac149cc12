"""Where Python lacks what it has on Unix alone: what is missing on Windows is missing here."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import ulsam

TESTS = Path(__file__).parent


@pytest.mark.slow
def test_all_works_without_what_windows_lacks(tmp_path: Path) -> None:
    path = [str(TESTS / "windows"), str(TESTS), str(Path(ulsam.__file__).parents[1])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-X", "warn_default_encoding", str(TESTS / "portable.py"), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0 <= found.pop("top1") <= 1
    assert found == {
        "lacks": [False, False],
        "stopped": True,
        "eval": 0,
        "predict": 0,
        "export": 0,
        "onnx": 0,
        "served": 0,
        "elsewhere": [None, True],
    }
    log = (tmp_path / "arms" / "base" / "seed-0.log").read_text()
    assert "images, 0 MB, in memory" in log
    assert not list(tmp_path.rglob("*.part"))


def test_a_process_that_is_not_forked_imports_the_command_without_starting_it() -> None:
    """`multiprocessing` runs the main module of the one that starts it, under another name."""
    runpy.run_module("ulsam.__main__", run_name="__mp_main__")  # else it ends this process with a usage error
