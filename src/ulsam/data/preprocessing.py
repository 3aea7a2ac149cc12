"""From a decoded image to a model's input, by NumPy and Pillow alone: resize, center crop, normalize."""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ulsam.base.errors import UlsamError
from ulsam.data.image_channels import MAX_CHANNELS
from ulsam.data.images import Pixels

MAX_SIDE = 4096
"""The longest side of a model's input that a file may ask for."""


@dataclass(frozen=True)
class Preprocessing:
    """timm's evaluation transform, pixel for pixel.

    The shorter side is resized to the model's size over ``crop_pct``, and the center is cut out; what lies beyond the
    image is black.

    Args:
        size: H, W of the model's input.
        interpolation: by which images are resized, as timm names it.
        crop_pct: share of the resized image's side that the crop keeps.
        mean, std: of each channel, for images scaled to 0..1; there are as many channels.

    >>> look = Preprocessing((2, 2), "bilinear", 0.5, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    >>> pixels = np.repeat(np.uint8([0, 51, 255, 255])[:, None, None], 4, 1).repeat(3, 2)
    >>> look.crop(pixels)[:, :, 0].tolist()
    [[51, 51], [255, 255]]
    >>> look.normalize(look.crop(pixels)[None])[0, 0].round(3).astype(float).round(3).tolist()
    [[-1.2, -1.2], [2.0, 2.0]]
    """

    size: tuple[int, int]
    interpolation: str
    crop_pct: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def channels(self) -> int:
        """Of the images: 3 is RGB, 1 gray."""
        return len(self.mean)

    def reduction(self, width: int, height: int) -> int:
        """By which of 1, 2, 4, 8 a JPEG may be reduced when it is decoded.

        It is the most that leaves the image twice the size it is resized to: below that, every pixel counts.
        """
        return power_of_two(min(width, height) / (2 * max(self.size) / self.crop_pct))

    def crop(self, pixels: Pixels) -> Pixels:
        """The image [H, W, C], of any size, at the model's size.

        Raises:
            UlsamError: it has other channels.
        """
        if pixels.ndim != 3 or pixels.shape[2] != self.channels:
            raise UlsamError(f"the model takes images [H, W, {self.channels}], not {list(pixels.shape)}")
        if self.channels == 3:
            return self._crop(pixels)
        return np.stack([self._crop(plane) for plane in np.moveaxis(pixels, 2, 0)], -1)

    def _crop(self, pixels: Pixels) -> Pixels:
        image = Image.fromarray(pixels)
        height, width = self.size
        # torchvision rounds these two cases, and the crop, each in its own way
        if height == width:
            short, long = int(height / self.crop_pct), max(image.size)
            long = int(short * long / min(image.size))
            resized = (short, long) if image.width <= image.height else (long, short)
        else:
            ratio = min(image.height / int(height / self.crop_pct), image.width / int(width / self.crop_pct))
            resized = (round(image.width / ratio), round(image.height / ratio))
        if resized != image.size:
            image = image.resize(resized, Image.Resampling[self.interpolation.upper()])
        left, top = _margin(image.width, width), _margin(image.height, height)
        return np.array(image.crop((left, top, left + width, top + height)))

    def normalize(self, images: Pixels) -> NDArray[np.float32]:
        """Bytes [B, H, W, C] to float [B, C, H, W]: (bytes / 255 - mean) / std."""
        spread = np.array(self.std)
        scale, shift = (1 / (255 * spread)).astype(np.float32), (-np.array(self.mean) / spread).astype(np.float32)
        return np.ascontiguousarray((images.astype(np.float32) * scale + shift).transpose(0, 3, 1, 2))

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read :meth:`to_json`'s line.

        Raises:
            UlsamError: it is none.

        >>> look = Preprocessing((64, 64), "bicubic", 0.875, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        >>> Preprocessing.from_json(look.to_json()) == look
        True
        """
        try:
            found: dict[str, Any] = json.loads(text)
            height, width = map(int, found.pop("size"))
            mean, std = (tuple(map(float, found.pop(name))) for name in ("mean", "std"))
            made = cls((height, width), mean=mean, std=std, **found)
            sound = min(height, width) >= 1 and max(height, width) <= MAX_SIDE and 0.1 <= made.crop_pct <= 1.5
            sound &= (
                1 <= len(mean) == len(std) <= MAX_CHANNELS and all(map(math.isfinite, (*mean, *std))) and min(std) > 0
            )
            if not sound or made.interpolation.upper() not in Image.Resampling.__members__:
                raise ValueError(made)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UlsamError(f"no preprocessing of images: {type(error).__name__} {error}") from error
        return made


def power_of_two(limit: float) -> int:
    """The largest of 1, 2, 4, 8 that is not above ``most``, 1 at least.

    >>> [power_of_two(limit) for limit in (0.5, 3.9, 100)]
    [1, 2, 8]
    """
    return next((factor for factor in (8, 4, 2) if factor <= limit), 1)


def _margin(side: int, wanted: int) -> int:
    """Where a centered piece of ``wanted`` pixels begins; below 0 where the side is shorter."""
    return round((side - wanted) / 2) if side >= wanted else -((wanted - side) // 2)
