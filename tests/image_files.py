"""An image of which every turn looks different, as a file."""

import io

from PIL import Image

COLORS = {"red": (250, 20, 20), "green": (20, 240, 20), "blue": (20, 20, 245)}


def scene(size: tuple[int, int] = (30, 20)) -> Image.Image:
    """Red above left, green above right, blue below: every turn of it looks different."""
    image = Image.new("RGB", size, COLORS["blue"])
    half = (size[0] // 2, size[1] // 2)
    image.paste(COLORS["red"], (0, 0, *half))
    image.paste(COLORS["green"], (half[0], 0, size[0], half[1]))
    return image


def encoded(image: Image.Image, format: str, **options: object) -> io.BytesIO:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream
