"""Images of any mode as 8-bit RGB."""

import numpy as np
from PIL import Image


def as_rgb(image: Image.Image) -> Image.Image:
    """A loaded image of any mode as RGB, the image itself if it is, by the rules of `ulsam.data.images.read_image`.

    >>> as_rgb(Image.new("LA", (1, 1), (0, 0))).getpixel((0, 0))
    (255, 255, 255)
    """
    if image.mode == "F" or image.mode.startswith("I"):
        return _gray(image).convert("RGB")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    over = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")


def _gray(image: Image.Image) -> Image.Image:
    """Gray of more than 8 bits (modes I;16*, I, F) as mode L; the rule is in `read_image`."""
    values = np.asarray(image)
    if image.mode == "F":
        values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
        scale = next((s for top, s in ((1.0, 255.0), (255.0, 1.0)) if values.max() <= top), 1 / 256)
        gray = np.rint(values * scale).clip(0, 255)
    elif image.mode == "I" and image.format == "TIFF":  # Pillow opens a 16-bit PGM as mode I too
        low, high = int(values.min()), int(values.max())
        gray = values
        if low < 0 or high > 255:
            gray = np.rint((values - float(low)) * (255 / max(1, high - low)))
    else:
        gray = values >> 8
    key = image.info.get("transparency")
    if isinstance(key, int):
        gray = np.where(values == key, 255, gray)
    return Image.fromarray(gray.astype(np.uint8))
