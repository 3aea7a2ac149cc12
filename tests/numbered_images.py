"""Images whose pixels are their numbers, and the loading of them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ulsam.data.augment import EvalTransform, TrainTransform
from ulsam.data.images import UnreadableImage
from ulsam.data.loading import Batch
from ulsam.data.opening import open_data
from ulsam.data.sources import FolderImages

PLAIN = {"crop_scale": (1.0, 1.0), "hflip": 0, "color_jitter": 0, "rand_augment": None, "random_erasing": 0}
LOOK = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear"}
WHOLE = TrainTransform((3, 32, 32), **PLAIN, **LOOK)
EVAL = EvalTransform((3, 32, 32), crop_pct=0.9, **LOOK)


def augmented(policy: str | None = "rand-m9-n2-mstd0.5", erasing: float = 0.5) -> TrainTransform:
    return TrainTransform(
        (3, 32, 32),
        crop_scale=(0.3, 1.0),
        hflip=0.5,
        color_jitter=0.3,
        rand_augment=policy,
        random_erasing=erasing,
        **LOOK,
    )


class Numbers:
    """Images in memory whose color is their number; ``bad`` ones cannot be read."""

    def __init__(self, n: int, labels: Any = None, bad: set[int] | None = None) -> None:
        self.n, self.labels, self.bad = n, labels, bad or set()
        self.classes = ("even", "odd")

    def __len__(self) -> int:
        return self.n

    def name(self, index: int) -> str:
        return f"image {index}"

    def fetch(self, index: int, reduction: Any = None, channels: int = 3) -> tuple[Any, int]:
        if index in self.bad:
            raise UnreadableImage(f"image {index}: broken")
        return np.full((40, 40, 3), index, np.uint8), index % 2


def same(left: list[Batch], right: list[Batch]) -> bool:
    pairs = zip(left, right, strict=True)
    return all(torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in pairs)


def training_images(folder: Path) -> FolderImages:
    """Those of a folder that was drawn."""
    train, _, _ = open_data(str(folder))
    assert isinstance(train, FolderImages)
    return train
