"""Classify images: the same reading and the same answers, whatever computes the model."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from ulsam.base.errors import NotFinite, UlsamError
from ulsam.data.addresses import fetch, is_address
from ulsam.data.images import Pixels, UnreadableImage, read_pixels
from ulsam.data.preprocessing import Preprocessing

Logits = NDArray[np.float32]
"""What a model outputs, [B, classes]."""

Image = str | os.PathLike[str] | BinaryIO | Pixels
"""A file, its address (http:// or https://), a binary stream that holds one, or RGB bytes [H, W, 3]; [H, W, C] for a
model of other channels."""

NOT_FINITE = "the model outputs numbers that are not finite (NaN or infinity)"


@dataclass(frozen=True)
class Prediction:
    """One image's most probable classes, best first; or why it could not be read.

    Of a model that gives several labels an image, ``classes`` are the labels that it has, which may be none.
    """

    path: str
    classes: tuple[tuple[str, float], ...] = ()  # name, probability
    error: str | None = None


def predict(
    images: Iterable[Image],
    logits: Callable[[Pixels], Logits],
    preprocessing: Preprocessing,
    classes: Sequence[str],
    *,
    top: int | None = None,
    batch: int = 32,
    thresholds: Sequence[float] | None = None,
) -> Iterator[Prediction]:
    """Classify images, in their order; an unreadable one gives a prediction with an error.

    Args:
        images: of any size. What is no file is called ``<image N>``, counted from 0.
        logits: of bytes [B, H, W, C] at the model's size.
        preprocessing: that brings them to this size.
        classes: names of the outputs.
        top: classes to name for each image; by default 5. With ``thresholds`` by default those that reach theirs; and
            if a number is given, so many of the most probable ones, whatever their thresholds.
        batch: images at once.
        thresholds: of each class, where an image may have several labels.

    Raises:
        NotFinite: the model's outputs are not finite.
        UlsamError: it has another number of outputs than of classes, ``top`` or ``batch`` is below 1, or what is given
            is no image at all.

    >>> look = Preprocessing((1, 1), "bilinear", 1.0, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    >>> def redness(images):
    ...     return images[:, 0, 0, :2].astype(np.float32)
    >>> list(predict([np.uint8([[[250, 0, 0]]]), "missing.jpg"], redness, look, ["red", "green"], top=1))
    [Prediction(path='<image 0>', classes=(('red', 1.0),), error=None), \
Prediction(path='missing.jpg', classes=(), error='missing.jpg: no such file or directory')]
    """
    for what, value in (("top", top), ("batch", batch)):
        if value is not None and value < 1:
            raise UlsamError(f"`{what}` must be 1 or more, not {value}")
    if isinstance(images, str | bytes):
        raise UlsamError("images are several: give a list, of one image too")
    return _predictions(images, logits, preprocessing, classes, top, batch, thresholds)


def _predictions(
    images: Iterable[Image],
    logits: Callable[[Pixels], Logits],
    preprocessing: Preprocessing,
    classes: Sequence[str],
    top: int | None,
    batch: int,
    thresholds: Sequence[float] | None,
) -> Iterator[Prediction]:
    numbered = enumerate(images)
    while chunk := list(itertools.islice(numbered, batch)):
        names = [_name(image, number) for number, image in chunk]
        inputs, errors = [], {}
        for place, (_, image) in enumerate(chunk):
            try:
                inputs.append(preprocessing.crop(_pixels(image, preprocessing)))
            except UnreadableImage as error:
                errors[place] = str(error)
        found: Iterator[NDArray[np.float32]] = iter(())
        if inputs:
            outputs = logits(np.stack(inputs))
            check_outputs(outputs.shape, classes)
            found = iter(probabilities(outputs, thresholds))
        for place, name in enumerate(names):
            if place in errors:
                yield Prediction(name, error=errors[place])
            else:
                yield Prediction(name, chosen(next(found), classes, top, thresholds))


def check_outputs(shape: Sequence[int], classes: Sequence[str]) -> None:
    """Raise unless outputs of this shape are [B, classes].

    Raises:
        UlsamError: they are not.

    >>> check_outputs((16, 2), ["sun", "wind"])
    """
    if list(shape[1:]) != [len(classes)]:
        raise UlsamError(
            f"the model gives {list(shape[1:])} outputs an image, and its spec names {len(classes)} classes"
        )


def chosen(
    shares: NDArray[np.float32], classes: Sequence[str], top: int | None, thresholds: Sequence[float] | None
) -> tuple[tuple[str, float], ...]:
    """The classes of one image with their probabilities, best first; ``top`` and ``thresholds`` as for :func:`predict`.

    >>> chosen(np.float32([0.25, 0.75, 0.5]), ["sun", "wind", "rain"], None, [0.5, 0.5, 0.75])
    (('wind', 0.75),)
    """
    if thresholds is None or top is not None:
        return ranked(shares, classes, top or 5)
    return ranked(shares, classes, len(classes), shares >= np.asarray(thresholds))


def ranked(
    shares: NDArray[np.float32], classes: Sequence[str], top: int, allowed: NDArray[np.bool_] | None = None
) -> tuple[tuple[str, float], ...]:
    """The ``top`` most probable classes of one image, of those ``allowed``, with their probabilities, best first.

    >>> ranked(np.float32([0.25, 0.75]), ["cat", "dog"], 1)
    (('dog', 0.75),)
    """
    best = np.argsort(-shares, kind="stable")[:top]
    return tuple((classes[index], float(shares[index])) for index in best if allowed is None or allowed[index])


def probabilities(logits: Logits, thresholds: Sequence[float] | None) -> Logits:
    """Of the classes, [B, classes]: a softmax, or a sigmoid of each where an image may have several labels.

    Raises:
        NotFinite: a logit is not finite.
    """
    return softmax(logits) if thresholds is None else sigmoid(logits)


def sigmoid(logits: Logits) -> Logits:
    """The probability of each label, [B, classes].

    Raises:
        NotFinite: a logit is not finite.

    >>> sigmoid(np.float32([[0, 1000, -1000]])).tolist()
    [[0.5, 1.0, 0.0]]
    """
    if not np.isfinite(logits).all():
        raise NotFinite(NOT_FINITE)
    found: Logits = np.exp(-np.logaddexp(0, -logits.astype(np.float64))).astype(np.float32)
    return found


def softmax(logits: Logits) -> Logits:
    """Probabilities of the classes, [B, classes].

    Raises:
        NotFinite: a logit is not finite.

    >>> softmax(np.float32([[0, 0], [1000, 0]])).tolist()
    [[0.5, 0.5], [1.0, 0.0]]
    """
    if not np.isfinite(logits).all():
        raise NotFinite(NOT_FINITE)
    shares = np.exp(logits - logits.max(1, keepdims=True))
    return shares / shares.sum(1, keepdims=True)


def _pixels(image: Image, preprocessing: Preprocessing) -> Pixels:
    if isinstance(image, np.ndarray):
        channels = preprocessing.channels
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != channels or not image.size:
            what = "RGB bytes" if channels == 3 else "bytes"
            raise UlsamError(
                f"an image in memory is {what}, uint8 [H, W, {channels}], not {image.dtype} {list(image.shape)}"
            )
        return image
    if not isinstance(image, str | os.PathLike) and not hasattr(image, "read"):
        raise UlsamError(
            f"an image is a path, a binary stream or RGB bytes [H, W, 3], not {type(image).__name__}; "
            "io.BytesIO(...) makes a stream of a file's content"
        )
    source = fetch(image) if is_address(image) else image
    return read_pixels(source, preprocessing.reduction, channels=preprocessing.channels)


def _name(image: Image, number: int) -> str:
    return os.fspath(image) if isinstance(image, str | os.PathLike) else f"<image {number}>"
