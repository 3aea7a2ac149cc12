"""Where Python lacks what it has on Unix alone: what is missing on Windows is missing here."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import ulsam
from ulsam.cli import main

TESTS = Path(__file__).parent


def as_on_windows(*words: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    path = [str(TESTS / "windows"), str(TESTS), str(Path(ulsam.__file__).parents[1])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env, cwd=cwd, check=False)


def test_every_module_is_imported_without_what_windows_lacks(tmp_path: Path) -> None:
    package = Path(ulsam.__file__).parent
    files = sorted(path.relative_to(package.parent).with_suffix("") for path in package.rglob("*.py"))
    apart = {"ulsam.layer.ops.triton_kernels", "ulsam.study.ray_launcher"}  # they need Triton and Ray
    names = [name for path in files if (name := ".".join(path.parts)) not in apart and "__main__" not in name]
    code = f"import importlib, os; [importlib.import_module(name) for name in {names}]; print(hasattr(os, 'fork'))"
    done = as_on_windows("-c", code, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


@pytest.mark.slow
def test_all_works_without_what_windows_lacks(tmp_path: Path) -> None:
    done = as_on_windows("-X", "warn_default_encoding", str(TESTS / "portable.py"), str(tmp_path), cwd=tmp_path)
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


def test_a_process_that_is_not_forked_imports_the_command_without_starting_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`multiprocessing` runs the main module of the one that starts it, under another name."""
    found = runpy.run_module("ulsam.__main__", run_name="__mp_main__")  # else it ends this process with a usage error
    assert found["main"] is main
    assert capsys.readouterr() == ("", "")
