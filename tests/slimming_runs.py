"""Tiny models and records of slimming."""

import json
from pathlib import Path
from typing import Any

import torch

from ulsam.model.build import build, make_spec, save

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


def save_untrained(path: Path) -> Path:
    """A model with ten residual blocks, not trained: enough to have scores."""
    spec = make_spec("mobilenetv2_035", CLASSES, size=32)
    torch.manual_seed(0)
    save(build(spec)[0], spec, path)
    return path


def kept(out: Path) -> dict[str, Any]:
    return json.loads((out / "slim.json").read_text())
