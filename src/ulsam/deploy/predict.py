"""Classify images, whatever runs the model: PyTorch, or ONNX Runtime alone for an exported file."""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Union

import numpy as np
from numpy.typing import NDArray

from ulsam.data.folder import image_paths
from ulsam.deploy.classifier import open_classifier
from ulsam.training.predict import Image, Prediction
from ulsam.training.predict import predict as predict_images

if TYPE_CHECKING:
    from torch import nn

    from ulsam.model.spec import ModelSpec


def predict(
    model: Union["nn.Module", str, os.PathLike[str]],
    images: Iterable[Image],
    *,
    spec: "ModelSpec | None" = None,
    top: int | None = None,
    batch_size: int = 32,
    device: str | None = None,
    features: Callable[[NDArray[np.float32]], None] | None = None,
) -> Iterator[Prediction]:
    """Classify images, in their order; an unreadable one gives a prediction with an error.

    PyTorch is not imported for an exported file.

    Args:
        model: a model file, the name of a trained model of the package, NAME.onnx of `ulsam.export`; or a model in
            memory, on any device.
        images: files, folders of them, addresses (``https://``), binary streams, or RGB bytes [H, W, 3] of any size;
            read as they are needed.
        spec: of a model in memory, as of `ulsam.load`.
        top: classes to name for each image; by default 5. A model that gives several labels names those that reach
            their thresholds by default, and with a number so many of the most probable ones.
        batch_size: images at once.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``; by default the one that a model in memory is on, else the CPU.
            Of an exported file ``auto``, which is the CPU, or one that `ulsam.runtime.load` takes.
        features: is given the pooled features [B, F], float32, of the readable images of each batch, before their
            predictions; not for an exported file.

    Raises:
        UlsamError: no such model or device, a folder without images, what is no image at all, or ``top`` or
            ``batch_size`` below 1.
        NotFinite: the model's outputs are not finite.

    >>> import ulsam
    >>> spec = ulsam.make_spec("test_efficientnet", ["cat", "dog"])
    >>> [found.error for found in predict(ulsam.build(spec)[0], ["missing.jpg"], spec=spec)]
    ['missing.jpg: no such file or directory']
    """
    files = images if isinstance(images, str | bytes) else _files(images)
    opened = open_classifier(model, spec, device=device, features=features)
    return predict_images(
        files,
        opened.logits,
        opened.preprocessing,
        opened.classes,
        top=top,
        batch=batch_size,
        thresholds=opened.thresholds,
    )


def _files(images: Iterable[Image]) -> Iterator[Image]:
    """The images, with those in a folder in its place."""
    for image in images:
        if isinstance(image, str | os.PathLike) and os.path.isdir(image):
            yield from image_paths([os.fspath(image)])
        else:
            yield image
