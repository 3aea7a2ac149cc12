"""How a model's confidence changes when what a map marks is taken away, or shown alone."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

STEPS = 10
"""Equal parts of the image that are deleted or inserted one after the other."""

BLUR = (11, 5.0)  # size in pixels and standard deviation, as the paper's authors take them
Classify = Callable[[Tensor], Tensor]
"""A model: its input [B, C, H, W] -> the probabilities of its classes [B, classes]."""


@torch.no_grad()
def deletion_curves(model: Classify, images: Tensor, saliency: Tensor, targets: Tensor, steps: int = STEPS) -> Tensor:
    """The target's probability while the most salient pixels are set to the mean color, [B, steps + 1].

    Deletion of Petsiuk et al. (BMVC 2018, arXiv 1806.07421, section 4.1): the faster it falls, the better the map.

    Args:
        model: gives probabilities.
        images: normalized, so that 0 is the mean color, [B, C, H, W].
        saliency: [B, H, W]; of equal values the one further up, then further left comes first.
        targets: the class of each image, [B].
        steps: the first column is the whole image, the last one the mean color alone.

    >>> white, class_0 = torch.ones(1, 1, 2, 2), torch.tensor([0])
    >>> deletion_curves(lambda x: x.mean((2, 3)), white, white[0], class_0, steps=2).tolist()
    [[1.0, 0.5, 0.0]]
    """
    return _curves(model, images, torch.zeros_like(images), saliency, targets, steps)


@torch.no_grad()
def insertion_curves(model: Classify, images: Tensor, saliency: Tensor, targets: Tensor, steps: int = STEPS) -> Tensor:
    """The target's probability while the most salient pixels come back into a blurred image, [B, steps + 1].

    Insertion of Petsiuk et al., see :func:`deletion_curves`: the faster it rises, the better. The blur is theirs: 11
    pixels, standard deviation 5.
    """
    blurred = gaussian_blur(images, BLUR[0], BLUR[1])
    return _curves(model, blurred, images, saliency, targets, steps)


def area_under(curves: Tensor) -> NDArray[np.float64]:
    """The area under curves [B, steps + 1] over shares of the image from 0 to 1, by trapezoids, [B].

    >>> area_under(torch.tensor([[1.0, 0.5, 0.0]])).tolist()
    [0.5]
    """
    area: NDArray[np.float64] = torch.trapezoid(curves.double(), dim=1).div(curves.shape[1] - 1).cpu().numpy()
    return area


@torch.no_grad()
def kept_confidence(model: Classify, images: Tensor, maps: Tensor, targets: Tensor) -> Tensor:
    """The target's probability on the image times its map, [B]; what the map leaves out has the mean color.

    Args:
        model, images, targets: as in :func:`deletion_curves`.
        maps: between 0 and 1, [B, H, W].
    """
    return _of(model(images * maps[:, None]), targets)


def average_drop(before: NDArray[np.floating], after: NDArray[np.floating]) -> NDArray[np.floating]:
    """The share of the confidence that each image loses; 0 where it loses none (Chattopadhay et al. 2018, 4.1).

    Average drop is its mean; increase in confidence the share of images with ``after`` above ``before``.

    >>> average_drop(np.array([0.5, 0.5]), np.array([0.25, 0.75])).tolist()
    [0.5, 0.0]
    """
    lost: NDArray[np.floating] = np.maximum(0, before - after) / before
    return lost


def _curves(model: Classify, start: Tensor, end: Tensor, saliency: Tensor, targets: Tensor, steps: int) -> Tensor:
    """From one image to another one, the most salient pixels first."""
    order = saliency.flatten(1).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    rank = rank.view_as(saliency)[:, None]
    count = order.shape[1]
    points = [
        _of(model(torch.where(rank < round(step * count / steps), end, start)), targets) for step in range(steps + 1)
    ]
    return torch.stack(points, 1)


def _of(probabilities: Tensor, targets: Tensor) -> Tensor:
    return probabilities.gather(1, targets[:, None])[:, 0]
