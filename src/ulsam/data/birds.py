"""Drawn birds whose classes differ in field marks alone: wing bars, breast spots, bill, tail and eye ring.

The marks differ in size and spatial frequency, and where each lies is known for every picture. Everything else (colours,
pose, place, light, background, leaves in front) varies at random and is the same for all classes, so that colour and
coarse layout tell nothing. Lengths are fractions of the body length, which is 0.44 to 0.57 of the picture's side.
"""

import colorsys
import dataclasses
import itertools
import json
import math
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ulsam.errors import UlsamError

VERSION = 1
"""Of the drawing: it rises when a picture of a given seed changes."""

Spots = Literal["coarse", "fine", "none"]
Bill = Literal["short", "long", "hooked"]
Tail = Literal["square", "forked"]
Box = tuple[int, int, int, int]
Colour = tuple[int, int, int]
Points = NDArray[np.float64]

MIN_SIZE = 32
_OVERSAMPLE = 3
_BARRED = 0.40  # length of wing under bars and gaps, the same for any number of bars
_SPOT_PERIOD = {"coarse": 0.15, "fine": 0.075}
_WORDS = {
    "wing_bars": {2: "broadbar", 5: "finebar", 0: "plainwing"},
    "spots": {"coarse": "spotted", "fine": "speckled", "none": "plain"},
    "bill": {"short": "shortbill", "long": "longbill", "hooked": "hookbill"},
    "tail": {"square": "", "forked": "forktail"},
    "eye_ring": {False: "", True: "ringeye"},
}


@dataclasses.dataclass(frozen=True)
class Marks:
    """The field marks of one class.

    Attributes:
        wing_bars: bars across the wing: 2 broad ones, 5 fine ones on the same area, or 0.
        spots: on the breast: coarse, fine (half the spacing and size, the same area in all), or none.
        bill: short, long or hooked.
        tail: square or forked.
        eye_ring: a pale ring around the eye.

    >>> Marks(wing_bars=5).bar_period
    0.08
    """

    wing_bars: int = 2
    spots: Spots = "coarse"
    bill: Bill = "short"
    tail: Tail = "square"
    eye_ring: bool = False

    @property
    def bar_period(self) -> float | None:
        """From one wing bar to the next, in body lengths; None without bars."""
        return _BARRED / self.wing_bars if self.wing_bars else None

    @property
    def spot_period(self) -> float | None:
        """From one breast spot to the next, in body lengths; None without spots."""
        return _SPOT_PERIOD.get(self.spots)

    @property
    def name(self) -> str:
        """A name for the class, e.g. ``broadbar-spotted-shortbill``."""
        words = (_WORDS[field][value] for field, value in dataclasses.asdict(self).items())
        return "-".join(word for word in words if word)
