"""Whether a resumed run ends as an unbroken one."""

import contextlib
import csv
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from safetensors.torch import load_file

from ulsam.training.checkpoint import read_checkpoint

TIMEOUT = 120.0  # seconds; what is waited for comes much sooner


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
