"""Name what is in pictures: the same reading and the same answers, whatever computes the net."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from ulsam.data.pictures import Pixels, UnreadablePicture, read_pixels
from ulsam.data.preprocessing import Preprocessing
from ulsam.errors import UlsamError

Logits = NDArray[np.float32]
"""What a net puts out, [B, classes]."""

Picture = str | os.PathLike[str] | BinaryIO | Pixels
"""A file, a binary stream that holds one, or RGB bytes [H, W, 3]."""

NOT_FINITE = "the net puts out numbers that are not finite (NaN or infinity)"


class NotFinite(UlsamError):
    """A net puts out NaN or infinity."""


@dataclass(frozen=True)
class Prediction:
    """One picture's most probable classes, best first; or why it could not be read."""

    path: str
    classes: tuple[tuple[str, float], ...] = ()  # name, probability
    error: str | None = None


def predict(
    pictures: Iterable[Picture],
    logits: Callable[[Pixels], Logits],
    preprocessing: Preprocessing,
    classes: Sequence[str],
    *,
    top: int = 5,
    batch: int = 32,
) -> Iterator[Prediction]:
    """Name what is in pictures, in their order; an unreadable one gives a prediction with an error.

    Args:
        pictures: of any size. What is no file is called ``<picture N>``, counted from 0.
        logits: of RGB bytes [B, H, W, 3] at the net's size.
        preprocessing: that brings them to this size.
        classes: names of the outputs.
        top: classes to name for each picture.
        batch: pictures at once.

    Raises:
        NotFinite: the net's outputs are not finite.
        UlsamError: ``top`` or ``batch`` is below 1, or what is given is no picture at all.

    >>> look = Preprocessing((1, 1), "bilinear", 1.0, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    >>> def redness(images):
    ...     return images[:, 0, 0, :2].astype(np.float32)
    >>> list(predict([np.uint8([[[250, 0, 0]]]), "missing.jpg"], redness, look, ["red", "green"], top=1))
    [Prediction(path='<picture 0>', classes=(('red', 1.0),), error=None), \
Prediction(path='missing.jpg', classes=(), error='missing.jpg: no such file or directory')]
    """
    for what, value in (("top", top), ("batch", batch)):
        if value < 1:
            raise UlsamError(f"{what} must be 1 or more, not {value}")
    if isinstance(pictures, str | bytes):
        raise UlsamError("pictures are several: give a list, of one picture too")
    return _predictions(pictures, logits, preprocessing, classes, top, batch)


def _predictions(
    pictures: Iterable[Picture],
    logits: Callable[[Pixels], Logits],
    preprocessing: Preprocessing,
    classes: Sequence[str],
    top: int,
    batch: int,
) -> Iterator[Prediction]:
    numbered = enumerate(pictures)
    while chunk := list(itertools.islice(numbered, batch)):
        names = [_name(picture, number) for number, picture in chunk]
        images, errors = [], {}
        for place, (_, picture) in enumerate(chunk):
            try:
                images.append(preprocessing.crop(_pixels(picture, preprocessing)))
            except UnreadablePicture as error:
                errors[place] = str(error)
        shares = iter(softmax(logits(np.stack(images))) if images else np.empty((0, len(classes)), np.float32))
        for place, name in enumerate(names):
            if place in errors:
                yield Prediction(name, error=errors[place])
            else:
                yield Prediction(name, ranked(next(shares), classes, top))


def ranked(shares: NDArray[np.float32], classes: Sequence[str], top: int) -> tuple[tuple[str, float], ...]:
    """The ``top`` most probable classes of one picture with their probabilities, best first.

    >>> ranked(np.float32([0.25, 0.75]), ["cat", "dog"], 1)
    (('dog', 0.75),)
    """
    best = np.argsort(-shares, kind="stable")[:top]
    return tuple((classes[index], float(shares[index])) for index in best)


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


def _pixels(picture: Picture, preprocessing: Preprocessing) -> Pixels:
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
            raise UlsamError(
                f"a picture in memory is RGB bytes, uint8 [H, W, 3], not {picture.dtype} {list(picture.shape)}"
            )
        return picture
    if not isinstance(picture, str | os.PathLike) and not hasattr(picture, "read"):
        raise UlsamError(
            f"a picture is a path, a binary stream or RGB bytes [H, W, 3], not {type(picture).__name__}; "
            "io.BytesIO(...) makes a stream of a file's content"
        )
    return read_pixels(picture, preprocessing.reduction)


def _name(picture: Picture, number: int) -> str:
    return os.fspath(picture) if isinstance(picture, str | os.PathLike) else f"<picture {number}>"
