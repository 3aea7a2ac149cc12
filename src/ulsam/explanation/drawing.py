"""What panels and the report draw with: one color map, fonts, and maps laid over images."""

from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFont

from ulsam.data.image_channels import shown
from ulsam.data.images import Pixels

COLORS = "viridis"
"""Perceptually uniform, and readable without seeing colors."""

STRENGTH = 0.64
"""Share of a map's color where it lies on an image, whose grays make up the rest."""

ColorBytes = NDArray[np.uint8]


@cache
def palette() -> ColorBytes:
    """The colors of values from 0 to 1, [256, 3]."""
    from matplotlib import colormaps

    colors: ColorBytes = (colormaps[COLORS](np.arange(256), bytes=True))[:, :3]
    return colors


@cache
def font(size: int, weight: Literal["", "-Bold"] = "") -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib, in pixels."""
    from matplotlib import get_data_path

    return ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", f"DejaVuSans{weight}.ttf"), size)


def fitting(text: str, width: float, size: int, weight: Literal["", "-Bold"] = "") -> str:
    """The text, or as much of its two ends as is no wider than so many pixels, with an ellipsis between them.

    >>> fitting("wren", 200, 12), fitting("a very long name of a bird", 100, 12)
    ('wren', 'a very l…f a bird')
    """
    face = font(size, weight)
    if face.getlength(text) <= width:
        return text
    low, high = 0, len(text) - 1  # of the letters that are kept
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if face.getlength(_cut(text, middle)) <= width else (low, middle - 1)
    return _cut(text, low)


def ramp(width: int, height: int) -> Image.Image:
    """A vertical color scale, its largest value on top."""
    values = np.linspace(255, 0, height).astype(np.uint8)
    return Image.fromarray(np.broadcast_to(palette()[values][:, None], (height, width, 3)).copy())


def gradient() -> str:
    """The colors from 0 to 1 as the stops of a CSS gradient.

    >>> gradient()[:18], gradient().count(",")
    ('#440154, #481e70, ', 12)
    """
    return ", ".join("#" + bytes(palette()[step]).hex() for step in np.linspace(0, 255, 13).astype(int))


def grayed(pixels: Pixels, width: int) -> Image.Image:
    """The image in gray and of that width, for maps to be laid over."""
    return resized(pixels, width).convert("L")


def resized(pixels: Pixels, width: int) -> Image.Image:
    """The image at another width."""
    height = max(1, round(width * pixels.shape[0] / pixels.shape[1]))
    return Image.fromarray(shown(pixels)).resize((width, height), Image.Resampling.BICUBIC)


def colored(values: NDArray[np.floating], size: tuple[int, int]) -> ColorBytes:
    """A map [h, w] of values from 0 to 1 as colors [height, width, 3], bilinearly enlarged to a width and height."""
    large = Image.fromarray(np.ascontiguousarray(values, np.float32)).resize(size, Image.Resampling.BILINEAR)
    colors: ColorBytes = palette()[(np.asarray(large).clip(0, 1) * 255).round().astype(np.uint8)]
    return colors


def overlaid(gray: Image.Image, values: NDArray[np.floating]) -> Image.Image:
    """A map of values from 0 to 1 on an image of :func:`grayed`."""
    colors = Image.fromarray(colored(values, gray.size))
    return Image.blend(gray.convert("RGB"), colors, STRENGTH)


def _cut(text: str, kept: int) -> str:
    tail = kept // 2
    return f"{text[: kept - tail]}…{text[len(text) - tail :]}"
