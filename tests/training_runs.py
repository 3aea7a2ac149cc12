"""Runs of a tiny model in the process of the test."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tiny import SETTINGS
from ulsam.training.config import TrainConfig

FILES = ["checkpoint.pt", "config.yaml", "curves.png", "metrics.csv", "model.safetensors", "summary.json"]


def config(data: Path, **settings: Any) -> TrainConfig:
    return TrainConfig.from_mapping({**SETTINGS, "data": str(data), "epochs": 1, "lr": 0.05, **settings})


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model.safetensors")


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
