"""Tiny models and records of slimming."""

import json
from pathlib import Path
from typing import Any

SIZE = (3, 32, 32)
CLASSES = ("class0", "class1", "class2")
SETTINGS: dict[str, Any] = {
    "epochs": 1,
    "batch_size": 8,
    "workers": 0,
    "threads": 1,
    "device": "cpu",
    "layout": "contiguous",
    "amp": "none",
    "compile": "none",
    "clip_grad": 9.0,
    "reconstruct_images": 0,  # new layers as they are made: fitting them has tests of its own
}


def kept(out: Path) -> dict[str, Any]:
    return json.loads((out / "slim.json").read_text())
