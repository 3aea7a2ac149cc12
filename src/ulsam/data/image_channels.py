"""Images of one channel, and of other numbers than three, as arrays."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MAX_CHANNELS = 64
"""The most channels that images are read with."""

_STRIPE = 1 << 22  # pixels
_BANDS = ("LA", "RGBA", "CMYK")  # modes whose bands can be taken one by one


def rgb_array(image: Image.Image) -> NDArray[np.uint8]:
    """The pixels [H, W, 3] of an RGB image, a stripe at a time: Pillow would hand out a large one in two copies.

    >>> rgb_array(Image.new("RGB", (4, 2))).shape
    (2, 4, 3)
    """
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    step = max(1, _STRIPE // image.width)
    for top in range(0, image.height, step):
        bottom = min(top + step, image.height)
        stripe = image if bottom - top == image.height else image.crop((0, top, image.width, bottom))
        pixels[top:bottom] = np.asarray(stripe)
    return pixels


def gray_of(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Luma (ITU-R BT.601) of RGB bytes [H, W, 3], as [H, W, 1]: gray stays as it is.

    >>> gray_of(np.uint8([[[7, 7, 7], [255, 0, 0]]]))[0, :, 0].tolist()
    [7, 76]
    """
    return np.array(Image.fromarray(pixels).convert("L"))[:, :, None]


def bands_of(image: Image.Image, channels: int) -> NDArray[np.uint8] | None:
    """The channels of an image as they are stored, [H, W, channels]; None where it has another number of them.

    They are the bands of an image of mode LA, RGBA or CMYK, or the pages of a TIFF, each gray, of 8 or 16 bits, and of
    one size. 16 bits are divided by 256.

    >>> bands_of(Image.new("RGBA", (1, 1), (1, 2, 3, 0)), 4).tolist()
    [[[1, 2, 3, 0]]]
    >>> bands_of(Image.new("RGB", (1, 1)), 4)
    """
    if image.mode in _BANDS:
        return np.array(image) if len(image.getbands()) == channels else None
    if image.format != "TIFF":
        return None
    pages: list[NDArray[np.uint8]] = []
    for number in range(channels + 1):
        try:
            image.seek(number)
        except EOFError:
            break
        if image.mode != "L" and not image.mode.startswith("I;16"):
            return None
        values = np.asarray(image)
        pages.append(values if image.mode == "L" else (values >> 8).astype(np.uint8))
    if len(pages) != channels or len({page.shape for page in pages}) != 1:
        return None
    return np.stack(pages, -1)


def opened_pixels(image: Image.Image, channels: int) -> NDArray[np.uint8] | None:
    """The pixels [H, W, channels] of an image that another program has opened; None where it has not as many.

    >>> opened_pixels(Image.new("RGB", (2, 1), "white"), 1).shape
    (1, 2, 1)
    """
    if channels not in (1, 3):
        return bands_of(image, channels)
    pixels = np.array(image.convert("RGB"))
    return pixels if channels == 3 else gray_of(pixels)


def shown(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """RGB bytes [H, W, 3] to look at, of an image [H, W, 1 or 3].

    >>> shown(np.uint8([[[7]]])).tolist()
    [[[7, 7, 7]]]
    """
    return pixels.repeat(3, 2) if pixels.shape[2] == 1 else pixels


def lacking(channels: int) -> str:
    """What to say of an image that has not so many channels.

    >>> lacking(5)
    'it does not have 5 channels: store them as a TIFF of 5 gray pages'
    """
    modes = {2: ", or as gray with alpha", 4: ", or as RGBA or CMYK"}
    return (
        f"it does not have {channels} channels: store them as a TIFF of {channels} gray pages{modes.get(channels, '')}"
    )
