"""What training and measuring compare a model's outputs with: the class of an image, or which labels it has."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ulsam.base.errors import UlsamError
from ulsam.data.sources import LabelSetImages, MapImages

Target = int | NDArray[np.float32]
"""The index of a class; or where an image may have several labels, 0 or 1 for each class, [classes]."""


def target(images: MapImages, label: int) -> Target:
    """What the label of one of the images, as of ``images.fetch``, stands for."""
    return images.sets[label].astype(np.float32) if isinstance(images, LabelSetImages) else label


def as_labels(targets: Sequence[Target]) -> Tensor:
    """The targets of a batch as one tensor, int64 [B] or float32 [B, classes].

    >>> as_labels([2, 0]), as_labels([np.float32([0, 1])]), as_labels([])
    (tensor([2, 0]), tensor([[0., 1.]]), tensor([], dtype=torch.int64))
    """
    return torch.from_numpy(np.array(targets)) if targets else torch.empty(0, dtype=torch.long)


def check_labels(labels: Tensor, n_classes: int, *, several: bool = False) -> None:
    """Refuse labels outside 0 .. ``n_classes`` - 1, which a named data set may hold; and labels of the other kind.

    Args:
        labels: of :func:`as_labels`, for one image or more.
        n_classes: that are known.
        several: whether an image may have several labels.

    Raises:
        UlsamError: there is one.

    >>> check_labels(torch.ones(1, 3), 3)
    Traceback (most recent call last):
    ulsam.base.errors.UlsamError: these images may have several labels each, and here an image has one class
    """
    if several and labels.dim() != 2:
        raise UlsamError("these images have one class each, and here an image may have several labels")
    if several:
        return
    if labels.dim() != 1:
        raise UlsamError("these images may have several labels each, and here an image has one class")
    wrong = labels[(labels < 0) | (labels >= n_classes)]
    if len(wrong):
        raise UlsamError(
            f"an image has the class number {int(wrong[0])}, but the {n_classes} classes are numbered from 0: "
            "check `class_names`"
        )
