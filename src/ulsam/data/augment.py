"""From decoded images to the model's input: random crop, flip, colors, erasing; resize and center crop to measure.

Images are uint8 arrays [H, W, C] up to the batch; :class:`Normalize` makes the float input, a batch at once. Every
random choice is drawn from the one `random.Random` that comes with the image.
"""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from ulsam.base.errors import UlsamError
from ulsam.data.image_channels import opened_pixels
from ulsam.data.images import Pixels
from ulsam.data.preprocessing import Preprocessing, power_of_two

ASPECT = (3 / 4, 4 / 3)
"""Least and largest width / height of a random crop (Szegedy et al. 2015, section 6)."""

GREY = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in luma (ITU-R BT.601)."""


class Rectangle(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int


class Transform(Protocol):
    """What makes a decoded image fit a batch."""

    normalize: "Normalize"
    channels: int

    def reduction(self, width: int, height: int) -> int:
        """By which of 1, 2, 4, 8 an image of this size may be reduced when it is decoded."""

    def __call__(self, pixels: Pixels, generator: random.Random) -> tuple[Tensor, Rectangle | None]:
        """The image at the model's size, uint8 [H, W, C], and what is to be erased of it once it is normalized."""


class Normalize:
    """Bytes [B, H, W, C] to the model's float input [B, C, H, W] in channels_last: (bytes / 255 - mean) / std.

    >>> look = Normalize([0.5] * 3, [0.25] * 3)
    >>> look(torch.tensor([0, 255, 51], dtype=torch.uint8).reshape(1, 1, 1, 3)).flatten()
    tensor([-2.0000,  2.0000, -1.2000])
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        spread = torch.tensor(std, dtype=torch.float64)
        self.scale = (1 / (255 * spread)).float()
        self.shift = (-torch.tensor(mean, dtype=torch.float64) / spread).float()

    def __call__(self, images: Tensor) -> Tensor:
        batch, height, width, channels = images.shape
        if channels != len(self.scale):
            raise UlsamError(f"the model takes images of {len(self.scale)} channels, not {channels}")
        # a row at a time: an inner loop over three channels would be slow
        scale, shift = (row.repeat(width).to(images.device) for row in (self.scale, self.shift))
        rows = images.reshape(batch, height, width * channels).float().mul_(scale).add_(shift)
        return rows.view(batch, height, width, channels).permute(0, 3, 1, 2)


class TrainTransform:
    """Random resized crop, flip, color jitter or a policy of timm's, random erasing.

    Args:
        input_size: channels, height and width of the model's input.
        mean, std: of the normalization, a channel.
        interpolation: bilinear or bicubic; always with antialiasing.
        crop_scale: least and largest area of the crop, as shares of the image's.
        hflip: probability of a horizontal flip.
        color_jitter: see :func:`jittered`; 0 is off. A policy switches it off, but for one of three augmentations (3a).
        rand_augment: timm's policy string, e.g. ``rand-m7-n2-mstd0.5``; None is off.
        random_erasing: probability that a rectangle is set to the mean.

    Raises:
        UlsamError: timm does not know the policy.
    """

    def __init__(
        self,
        input_size: tuple[int, int, int],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str,
        crop_scale: tuple[float, float],
        hflip: float,
        color_jitter: float,
        rand_augment: str | None,
        random_erasing: float,
    ) -> None:
        self.size, self.interpolation = input_size[1:], interpolation
        self.crop_scale, self.hflip, self.erasing = crop_scale, hflip, random_erasing
        self.normalize = Normalize(mean, std)
        self.channels = input_size[0]
        self.policy = None
        if rand_augment:
            look = {"interpolation": interpolation, "mean": tuple(mean), "std": tuple(std)}
            self.policy = _policy(input_size, rand_augment, look)
        self.jitter = 0.0 if rand_augment and "3a" not in rand_augment else color_jitter

    def reduction(self, width: int, height: int) -> int:
        """The most that leaves the smallest crop which can be drawn at least as large as the model's input.

        >>> look = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear"}
        >>> plain = {"hflip": 0.5, "color_jitter": 0, "rand_augment": None, "random_erasing": 0}
        >>> transform = TrainTransform((3, 160, 160), crop_scale=(0.25, 1.0), **look, **plain)
        >>> transform.reduction(500, 375), transform.reduction(2000, 1500)
        (1, 4)
        """
        least = min(width, height, math.sqrt(self.crop_scale[0] * width * height * ASPECT[0]))
        return power_of_two(least / max(self.size))

    def __call__(self, pixels: Pixels, generator: random.Random) -> tuple[Tensor, Rectangle | None]:
        top, left, height, width = random_crop(pixels.shape[1], pixels.shape[0], self.crop_scale, generator)
        crop = torch.from_numpy(pixels)[None, top : top + height, left : left + width].permute(0, 3, 1, 2)
        images = F.interpolate(crop, self.size, mode=self.interpolation, antialias=True)
        if generator.random() < self.hflip:
            images = images.flip(3)
        image = images[0].permute(1, 2, 0)
        if self.policy:
            random.seed(generator.getrandbits(64))  # timm draws from these two
            np.random.seed(generator.getrandbits(32))
            image = torch.from_numpy(np.array(self.policy(Image.fromarray(image.numpy()))))
        if self.jitter:
            image = jittered(image, self.jitter, generator)
        erased = random_erasing(*self.size, generator) if generator.random() < self.erasing else None
        return image, erased


class EvalTransform:
    """timm's evaluation transform: resize, center crop, normalize.

    Called with an image, it gives the model's input: float [C, H, W].
    """

    def __init__(
        self,
        input_size: tuple[int, int, int],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str,
        crop_pct: float,
    ) -> None:
        self.normalize = Normalize(mean, std)
        self.preprocessing = Preprocessing(input_size[1:], interpolation, crop_pct, tuple(mean), tuple(std))
        self.reduction, self.channels = self.preprocessing.reduction, self.preprocessing.channels

    def pixels(self, pixels: Pixels) -> Tensor:
        """The image at the model's size, uint8 [H, W, C]."""
        return torch.from_numpy(self.preprocessing.crop(pixels))

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = opened_pixels(image, self.channels)
        if pixels is None:
            raise UlsamError(f"the model takes images of {self.channels} channels, not of mode {image.mode}")
        return self.normalize(self.pixels(pixels)[None])[0]


def random_crop(width: int, height: int, scale: tuple[float, float], generator: random.Random) -> Rectangle:
    """A crop of random area and aspect within an image (Szegedy et al. 2015, section 6), as torchvision draws it.

    The area is uniform in ``scale``, a share of the image's, and the logarithm of width / height uniform in `ASPECT`.
    What does not fit is drawn again; after ten times it is the largest centered crop of an aspect within `ASPECT`.

    >>> random_crop(100, 10, (0.9, 1.0), random.Random(0))
    Rectangle(top=0, left=43, height=10, width=13)
    """
    low, high = (math.log(aspect) for aspect in ASPECT)
    for _ in range(10):
        area = generator.uniform(*scale) * width * height
        aspect = math.exp(generator.uniform(low, high))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top, left = generator.randint(0, height - crop_height), generator.randint(0, width - crop_width)
            return Rectangle(top, left, crop_height, crop_width)
    crop_width = min(width, max(1, round(height * ASPECT[1])))
    crop_height = min(height, max(1, round(width / ASPECT[0])))
    return Rectangle((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)


def random_erasing(height: int, width: int, generator: random.Random) -> Rectangle | None:
    """The rectangle that random erasing takes out of an image (Zhong et al. 2017), with timm's ranges.

    The area is 0.02 to 1/3 of the image's, the logarithm of height / width uniform between 0.3 and 1/0.3. None where
    ten draws do not fit.
    """
    for _ in range(10):
        area = generator.uniform(0.02, 1 / 3) * height * width
        aspect = math.exp(generator.uniform(math.log(0.3), -math.log(0.3)))
        box_height, box_width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if box_height < height and box_width < width:
            top, left = generator.randint(0, height - box_height), generator.randint(0, width - box_width)
            return Rectangle(top, left, box_height, box_width)
    return None


def jittered(image: Tensor, strength: float, generator: random.Random) -> Tensor:
    """Random brightness, contrast and saturation, in random order, as torchvision's ``ColorJitter`` draws them.

    Each factor is uniform in 1 - ``strength`` (0 at least) to 1 + ``strength``: brightness scales the values, contrast
    their distance from the mean gray of the image, saturation that from each pixel's own gray.

    Args:
        image: uint8 [H, W, 3].

    Returns:
        A new tensor like it.
    """
    kinds = ["brightness", "contrast", "saturation"]
    generator.shuffle(kinds)
    planes = image.permute(2, 0, 1).contiguous().float()
    for kind in kinds:
        factor = generator.uniform(max(0.0, 1 - strength), 1 + strength)
        planes.mul_(factor) if kind == "brightness" else _blend(planes, factor, kind == "contrast")
        planes.clamp_(0, 255)
    rounded = torch.from_numpy(planes.round_().numpy().astype(np.uint8))  # NumPy converts faster, PyTorch interleaves
    return torch.stack(list(rounded), -1)


def _blend(planes: Tensor, factor: float, with_mean: bool) -> None:
    """Move float [3, H, W] from gray, each pixel's own or the mean of all, by ``factor``, in place."""
    gray = torch.mul(planes[0], GREY[0]).add_(planes[1], alpha=GREY[1]).add_(planes[2], alpha=GREY[2])
    if with_mean:
        gray = torch.tensor(float(gray.numpy().mean()))  # PyTorch's sum depends on the number of threads
    torch.lerp(gray, planes, factor, out=planes)


def _policy(input_size: tuple[int, int, int], name: str, look: dict[str, Any]) -> Callable[[Image.Image], Image.Image]:
    """timm's transform for an augmentation policy, from image to image."""
    try:
        policy: Callable[[Image.Image], Image.Image] = create_transform(
            input_size, is_training=True, auto_augment=name, color_jitter=None, separate=True, **look
        )[1]
    except (AssertionError, ValueError, KeyError) as error:
        raise UlsamError(f"unknown policy `rand_augment={name}`; write e.g. rand-m7-n2-mstd0.5") from error
    return policy
