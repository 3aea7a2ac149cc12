"""Teachers and students of distillation."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tiny import SETTINGS, TINY_MODEL
from ulsam.base.distributed import World
from ulsam.model.build import build, save
from ulsam.model.spec import Edit, ModelSpec
from ulsam.training.config import TrainConfig

ALONE = World(0, 1, torch.device("cpu"))
CLASSES = ("class0", "class1", "class2")
SIZE = (3, 64, 64)
EDITS = ["insert blocks.3", "replace blocks.4.0.se"]
PLACES = ["blocks.3.0", "blocks.4.0.se", "bn2"]


def spec(*edits: str, base: str = TINY_MODEL, classes: tuple[str, ...] = CLASSES, **rest: Any) -> ModelSpec:
    return ModelSpec(base, classes, tuple(map(Edit.parse, edits)), input_size=SIZE, **rest)


def update_norms(model: nn.Module, images: Tensor) -> None:
    """Give the BatchNorms the statistics of these images, as training would."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the plain mean
    model.train()(images)


def save_teacher(path: Path) -> Path:
    """A model file, of images normalized in another way than the students'."""
    torch.manual_seed(3)
    its = spec(mean=(0.4, 0.5, 0.6), std=(0.3, 0.2, 0.25))
    model, _ = build(its)
    update_norms(model, torch.randn(32, *SIZE))
    nn.init.normal_(model.classifier.weight, std=0.2)
    save(model, its, path)
    return path


def config(data: Path | str, **settings: Any) -> TrainConfig:
    settings = {**SETTINGS, "data": str(data), "epochs": 1, "size": 64, "amp": "none", "compile": "none", **settings}
    return TrainConfig.from_mapping(settings)
