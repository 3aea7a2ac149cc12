"""A contact sheet of what augmentation does to training images."""

import io
import random
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ulsam.base.errors import UlsamError
from ulsam.data.image_channels import shown
from ulsam.data.images import UnreadableImage, read_pixels
from ulsam.training.config import TrainConfig
from ulsam.training.parts import spec_of_run, train_transform

ROWS, COLUMNS = 8, 7
_GAP = 4


def augmentation_sheet(paths: Sequence[str], config: TrainConfig) -> bytes:
    """A PNG: a row an image, `ROWS` of them spread evenly, first the whole image, then what training makes of it.

    A rectangle that is erased is gray: training sets it to the mean.

    Raises:
        UlsamError: none of these images can be read, or they have other channels than RGB or gray.
    """
    spec = spec_of_run(config, ("class",))
    look = train_transform(config, spec)
    if look.channels not in (1, 3):
        raise UlsamError(f"the sheet shows RGB or gray images, not those of {look.channels} channels")
    height, width = spec.input_size[1:]
    count = min(ROWS, len(paths))
    rows = []
    for place in range(count):
        try:
            pixels = read_pixels(paths[place * len(paths) // count], channels=look.channels)
        except UnreadableImage:
            continue
        image = Image.fromarray(shown(pixels))
        image.thumbnail((width, height))
        row = [np.asarray(image)]
        generator = random.Random(place)
        for _ in range(COLUMNS - 1):
            tensor, erased = look(pixels, generator)
            made = tensor.numpy().copy()
            if erased is not None:
                made[erased.top : erased.top + erased.height, erased.left : erased.left + erased.width] = 128
            row.append(shown(made))
        rows.append(row)
    if not rows:
        raise UlsamError("none of the images for the sheet could be read")
    sheet = np.full((len(rows) * (height + _GAP), COLUMNS * (width + _GAP), 3), 255, np.uint8)
    for top, row in enumerate(rows):
        for left, cell in enumerate(row):
            y, x = top * (height + _GAP), left * (width + _GAP)
            sheet[y : y + cell.shape[0], x : x + cell.shape[1]] = cell
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, "png")
    return buffer.getvalue()
