"""Where the field marks of a drawn bird lie in what a model was given."""

import os

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from ulsam.data.augment import EvalTransform
from ulsam.data.birds import mark_boxes

BIRD = "bird"
"""The box around all marks: from the tail to the bill."""


def mark_areas(image: str | os.PathLike[str], transform: EvalTransform) -> dict[str, NDArray[np.float32]] | None:
    """The area of each field mark in the model's input, and of the whole bird; None for what `ulsam birds` did not
    draw.

    Args:
        image: its path.
        transform: that made the model's input of it; the boxes go the same way.

    Returns:
        The share of each pixel that belongs to it, [H, W], by the names of `ulsam.data.bird_drawing.Marks` and `BIRD`.

    Raises:
        UlsamError: the files that describe the set are damaged.
    """
    marks = mark_boxes(image)
    if marks is None:
        return None
    size, boxes = marks
    corners = np.array(list(boxes.values()))
    boxes = {BIRD: (*corners[:, :2].min(0).tolist(), *corners[:, 2:].max(0).tolist()), **boxes}
    areas = {}
    for name, (x0, y0, x1, y1) in boxes.items():
        drawn = np.zeros((size, size, transform.channels), np.uint8)
        drawn[y0:y1, x0:x1] = 255
        areas[name] = (transform.pixels(drawn)[:, :, 0].float() / 255).numpy()
    return areas


def at_size(area: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """An area [H, W] as the shares of the positions of a map that belong to it, [height, width].

    >>> at_size(np.eye(4, dtype=np.float32), 2, 2).tolist()
    [[0.5, 0.0], [0.0, 0.5]]
    """
    shares: NDArray[np.float32] = F.adaptive_avg_pool2d(torch.from_numpy(area)[None], (height, width))[0].numpy()
    return shares
