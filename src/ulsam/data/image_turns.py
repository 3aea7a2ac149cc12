"""How an image is turned upright, by the orientation that EXIF states."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ImageBytes = NDArray[np.uint8]

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation (tag 0x0112, table in EXIF 2.3 section 4.6.4) -> the turn that makes the image upright."""

_TURNED: dict[Image.Transpose, Callable[[ImageBytes], ImageBytes]] = {
    Image.Transpose.FLIP_LEFT_RIGHT: lambda pixels: pixels[:, ::-1],
    Image.Transpose.ROTATE_180: lambda pixels: pixels[::-1, ::-1],
    Image.Transpose.FLIP_TOP_BOTTOM: lambda pixels: pixels[::-1],
    Image.Transpose.TRANSPOSE: lambda pixels: pixels.swapaxes(0, 1),
    Image.Transpose.ROTATE_270: lambda pixels: np.rot90(pixels, 3),
    Image.Transpose.TRANSVERSE: lambda pixels: pixels.swapaxes(0, 1)[::-1, ::-1],
    Image.Transpose.ROTATE_90: lambda pixels: np.rot90(pixels),
}


def turned(pixels: ImageBytes, turn: Image.Transpose | None) -> ImageBytes:
    """The image [H, W, C] after a turn.

    >>> turned(np.uint8([[[1], [2]]]), TURNS[3])[0, :, 0].tolist()
    [2, 1]
    """
    return pixels if turn is None else np.ascontiguousarray(_TURNED[turn](pixels))
