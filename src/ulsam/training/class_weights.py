"""Weights of the classes in the training loss, for data in which some classes have few images."""

import difflib
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ulsam.base.errors import UlsamError, printable
from ulsam.data.sources import AnyImages, check_one_class


def class_weights_of(setting: Mapping[str, float] | str | None, images: AnyImages) -> dict[str, float] | None:
    """The weight of every class, in the order of the classes; None where no weights are set.

    Args:
        setting: weights by class name, 1 for the others; or ``balanced``: images / (classes * images of the class),
            whose mean over the training images is 1.
        images: that are trained on.

    Raises:
        UlsamError: a name that is no class, or, for ``balanced``, a class without a training image, images that do
            not list their labels, or images of several labels each.

    >>> from ulsam.data.sources import FolderImages
    >>> images = FolderImages([("a.jpg", 0), ("b.jpg", 1), ("c.jpg", 1), ("d.jpg", 1)], ("robin", "wren"))
    >>> class_weights_of({"wren": 0.5}, images)
    {'robin': 1.0, 'wren': 0.5}
    >>> class_weights_of("balanced", images)
    {'robin': 2.0, 'wren': 0.6666666666666666}
    """
    if setting is None:
        return None
    check_one_class(images, "class_weights")
    classes = images.classes
    if not isinstance(setting, str):
        if unknown := [name for name in setting if name not in classes]:
            near = difflib.get_close_matches(unknown[0], classes, n=1)
            hint = f"; did you mean {printable(near[0])!r}?" if near else ""
            raise UlsamError(f"`class_weights` names {printable(unknown[0])!r}, which is no class of the data{hint}")
        return {name: float(setting.get(name, 1.0)) for name in classes}
    if images.labels is None:
        raise UlsamError("`class_weights` balanced needs a data set that lists its labels: give weights by class name")
    counts = np.bincount(images.labels[images.labels >= 0], minlength=len(classes))[: len(classes)]
    if not counts.all():
        empty = printable(classes[int(counts.argmin())])
        raise UlsamError(f"`class_weights` balanced: the class {empty!r} has no training image: give weights by name")
    return dict(zip(classes, (counts.sum() / (len(classes) * counts)).tolist(), strict=True))


def weight_tensor(weights: Mapping[str, float] | None, device: torch.device) -> Tensor | None:
    """The weights [classes] as `torch.nn.functional.cross_entropy` takes them.

    >>> weight_tensor({"robin": 2.0, "wren": 0.5}, torch.device("cpu"))
    tensor([2.0000, 0.5000])
    """
    return None if weights is None else torch.tensor(list(weights.values()), device=device)


def weighted_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None, smoothing: float) -> Tensor:
    """The mean over the images of the cross-entropy, each part multiplied by the weight of its class.

    It is divided by the number of images, and not by the sum of their weights as PyTorch does for class numbers: an
    image counts the same whatever else is in its batch, and in its process.

    Args:
        logits: [B, classes].
        labels: class numbers [B], or shares [B, classes].
        weights: [classes].
        smoothing: of the labels.

    >>> logits, weights = torch.zeros(2, 2), torch.tensor([1.0, 3.0])
    >>> loss = [weighted_cross_entropy(logits, torch.tensor(labels), weights, 0.0) for labels in ([0, 0], [1, 1])]
    >>> float(loss[1] / loss[0])
    3.0
    """
    if weights is None:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)
    total = F.cross_entropy(logits, labels, weights, reduction="sum", label_smoothing=smoothing)
    return total / len(labels)


def describe(weights: Mapping[str, float]) -> str:
    """One line about the weights, for the user.

    >>> describe({"robin": 2.0, "wren": 0.5})
    'of the classes in the training loss: 0.5 (wren) to 2 (robin)'
    """
    least, most = (choose(weights, key=weights.__getitem__) for choose in (min, max))
    return f"of the classes in the training loss: {weights[least]:.3g} ({least}) to {weights[most]:.3g} ({most})"
