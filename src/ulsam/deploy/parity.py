"""Whether an exported model puts out what the model does."""

import dataclasses
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ulsam.base.errors import UlsamError, first_line
from ulsam.base.eval_mode import eval_mode
from ulsam.data.bird_drawing import draw_bird
from ulsam.data.birds import MAX_SIZE, MIN_SIZE, class_marks
from ulsam.data.images import Pixels, UnreadableImage, read_pixels
from ulsam.data.preprocessing import Preprocessing
from ulsam.training.predict import Logits

TOLERANCE = 1e-3
"""Largest difference of a logit that is let pass, as a share of the largest logit.

Folding and another order of summation make about 1e-5. An image's first class can then change only where its two best
are nearer to each other than twice this."""

MOST_IMAGES, DRAWN_IMAGES, BATCH = 64, 16, 16


@dataclass(frozen=True)
class Parity:
    """How an exported model compares with the model itself.

    Attributes:
        images: that both saw.
        same: on how many of them both name the same class first.
        difference: largest one of any logit; NaN where a logit is none.
        largest: absolute value of any of the model's logits.
        drawn: whether the images were drawn birds.

    >>> print(Parity(16, 16, 2e-6, 3.5, drawn=True))
    16 drawn birds: the same first class for 16, largest difference of a logit 2.0e-06 (largest logit 3.5)
    """

    images: int
    same: int
    difference: float
    largest: float
    drawn: bool = False

    def __add__(self, other: "Parity") -> "Parity":
        return Parity(
            self.images + other.images,
            self.same + other.same,
            float(np.maximum(self.difference, other.difference)),  # which keeps NaN
            max(self.largest, other.largest),
        )

    def of(self, *, drawn: bool) -> "Parity":
        """The same, of drawn birds or of real images."""
        return dataclasses.replace(self, drawn=drawn)

    def within(self, tolerance: float) -> bool:
        """Whether no logit differs by more than this share of the largest one.

        >>> Parity(4, 4, 0.5, 10.0).within(0.1), Parity(4, 4, np.nan, 10.0).within(0.1)
        (True, False)
        """
        return self.difference <= tolerance * self.largest

    def check(self, format: str) -> None:
        """Raise unless the exported model may stand for the model.

        Raises:
            UlsamError: its logits differ by more than `TOLERANCE`.

        >>> Parity(16, 12, 0.25, 3.5).check("onnx")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ulsam.base.errors.UlsamError: the model for onnx puts out something else than the model: 16 images: ...
        """
        if not self.within(TOLERANCE):
            raise UlsamError(
                f"the model for {format} puts out something else than the model: {self}; nothing was written"
            )

    def __str__(self) -> str:
        return (
            f"{self.images} {'drawn birds' if self.drawn else 'images'}: the same first class for {self.same}, "
            f"largest difference of a logit {self.difference:.1e} (largest logit {self.largest:.3g})"
        )


def compared(
    model: nn.Module,
    run: Callable[[NDArray[Any]], Logits],
    look: Preprocessing,
    images: Sequence[Pixels],
    *,
    pixels: bool = True,
    one_by_one: bool = False,
) -> Parity:
    """Run the model and its exported form on the same images: the first one alone, the others in batches.

    Args:
        model: the model itself, on any device, not folded; in eval mode for the time being.
        run: the exported model, by default on bytes [B, H, W, 3].
        look: whose normalisation the model's input needs.
        images: all of one size.
        pixels: False if ``run`` takes normalised images.
        one_by_one: whether ``run`` takes one image at a time.

    Raises:
        UlsamError: ``run`` fails, or puts out another number of classes.
    """
    device = next(model.parameters()).device
    step = 1 if one_by_one else BATCH
    found = []
    for first in [0, *range(1, len(images), step)]:
        batch = np.stack(images[first : first + (step if first else 1)])
        normalised = look.normalise(batch)
        try:
            theirs = np.asarray(run(batch if pixels else normalised))
        except Exception as error:  # each engine has its own; a size may be fixed in the model, though left open
            size = "x".join(map(str, batch.shape[1:3]))
            raise UlsamError(
                f"the exported model fails on images of {size}: {first_line(error)}; nothing was written"
            ) from error
        with torch.no_grad(), eval_mode(model):
            ours = model(torch.from_numpy(normalised).to(device)).float().cpu().numpy()
        found.append(parity_of(theirs, ours))
    return sum(found[1:], found[0])


def parity_of(theirs: Logits, ours: Logits) -> Parity:
    """How the exported model's logits [B, classes] compare with the model's own for the same images.

    Raises:
        UlsamError: they are of another shape.

    >>> print(parity_of(np.float32([[0, 1], [3, 2]]), np.float32([[0, 1], [2, 2.5]])))
    2 images: the same first class for 1, largest difference of a logit 1.0e+00 (largest logit 2.5)
    """
    if theirs.shape != ours.shape:
        raise UlsamError(f"the exported model puts out {list(theirs.shape)}, the model {list(ours.shape)}")
    same = int((theirs.argmax(1) == ours.argmax(1)).sum())
    return Parity(len(ours), same, float(abs(theirs - ours).max()), float(abs(ours).max()))


def read_images(paths: Sequence[str | os.PathLike[str]], look: Preprocessing) -> list[Pixels]:
    """Up to `MOST_IMAGES` of these files, spread evenly, at the model's size; unreadable ones are left out.

    Raises:
        UlsamError: not one of them can be read.
    """
    chosen = [paths[number * len(paths) // MOST_IMAGES] for number in range(MOST_IMAGES)]
    images, reason = [], "there are none"
    for path in chosen if len(paths) > MOST_IMAGES else paths:
        try:
            images.append(look.crop(read_pixels(path, look.reduction)))
        except UnreadableImage as error:
            reason = str(error)
    if not images:
        raise UlsamError(f"no image to compare the exported model with the model on: {reason}")
    return images


def drawn_images(look: Preprocessing) -> list[Pixels]:
    """`DRAWN_IMAGES` birds at the model's size, each of another class."""
    size = min(max(*look.size, MIN_SIZE), MAX_SIZE)
    birds = [draw_bird(marks, size, random.Random(name))[0] for name, marks in class_marks(DRAWN_IMAGES)]
    return [look.crop(np.asarray(bird)) for bird in birds]
