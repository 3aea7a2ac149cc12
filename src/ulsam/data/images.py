"""Any image file a person may have, as an upright 8-bit RGB image, or one line that says why not."""

import contextlib
import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ulsam.base.errors import MachineError, UlsamError
from ulsam.base.file_signatures import kind_of
from ulsam.base.reading import machine_errors, machine_fault, open_regular
from ulsam.data.image_channels import bands_of, gray_of, lacking, rgb_array
from ulsam.data.image_colors import as_rgb
from ulsam.data.image_structure import MAX_SCANNED, MAX_SCANS, count_scans, plain_jpeg, plain_png, tags_fit
from ulsam.data.image_turns import TURNS, turned

try:
    import simplejpeg
except ImportError:  # Pillow gives the same values, only slower
    simplejpeg = None

MAX_PIXELS = 89_000_000
"""Largest width * height that is read: 267 MB as RGB. More is refused from the header, before anything is decoded."""

MAX_BYTES = 1_000_000_000
"""The largest file that is read: more than `MAX_PIXELS` take with four channels of 16 bits, stored as they are."""

LONGEST = 100
"""The longest side that is read, in multiples of the other one, refused likewise: images are resized by their shorter
side, which would make gigabytes of a line one pixel wide."""

TAGS = "corrupt (its tags ask for more bytes than the file has)"
LONGEST_TEXT = 10_000_000
"""The largest file that is read of those that hold their pixels as text (PBM, PGM, PPM)."""

JPEG = b"\xff\xd8\xff"  # how a JPEG file begins

Image.init()
FORMATS = tuple({"JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000"} & Image.OPEN.keys())
"""Formats that are read, by Pillow's names (AVIF since Pillow 11.3); none that starts another program, as EPS does."""

_DAMAGE = (
    OSError,  # unidentified, truncated, decoder failed; the file system's own errors
    SyntaxError,  # broken PNG and TIFF structure
    ValueError,  # bad sizes, unsupported modes, oversized text chunks
    ArithmeticError,  # sizes and rationals out of range
    LookupError,  # a tag or table entry that is not there
    EOFError,
    TypeError,  # a header tag of the wrong type
    AttributeError,  # a decoder that was never set up because its header was broken
    AssertionError,  # Pillow asserts on a few header fields
    RuntimeError,  # NotImplementedError of exotic variants; AVIF and WebP decoders
    MemoryError,  # see `_memory_is_full`
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)

Pixels = NDArray[np.uint8]
"""A decoded image, [H, W, 3], or [H, W, C] where other channels were asked for."""

Decoded = TypeVar("Decoded")

Reduction = Callable[[int, int], int]
"""By which of 1, 2, 4, 8 an image of this width and height is reduced when it is decoded."""


class UnreadableImage(UlsamError):
    """An image file that cannot be read; the message is one line, ``path: reason``."""


def read_image(path: str | os.PathLike[str] | BinaryIO) -> Image.Image:
    """Read one image as upright 8-bit RGB.

    The content decides on the format (one of `FORMATS`), the file's name does not. Of an animation the first frame is
    read. EXIF rotation is undone; EXIF that cannot be parsed turns nothing. Transparency is laid over white. 16-bit
    gray is divided by 256. Gray of 32-bit integers within 0..255 is taken as it is, otherwise its own range, from the
    smallest value to the largest, becomes 0..255, because such files do not state theirs. Float gray is taken as 0..1,
    0..255 or 0..65535, the smallest of these that holds its largest value.

    Args:
        path: a file's path, or a seekable binary stream, read from its start and left open.

    Returns:
        A `PIL.Image.Image` of mode RGB with its pixels loaded; no file stays open.

    Raises:
        UnreadableImage: the file is missing, may not be read, is empty, truncated, corrupt, larger than `MAX_PIXELS`
            or `MAX_BYTES`, longer than `LONGEST` allows, no image, or no regular file.
        MachineError: it cannot be read because the machine lacks memory or open files, or its disk or network fails.

    >>> import io
    >>> stream = io.BytesIO()
    >>> Image.new("CMYK", (4, 3)).save(stream, "jpeg")
    >>> image = read_image(stream)
    >>> image.mode, image.size
    ('RGB', (4, 3))
    """
    return _decoded(path, _read)


def whole(width: int, height: int) -> int:
    """The `Reduction` that leaves every image as it is."""
    return 1


def read_pixels(
    path: str | os.PathLike[str] | BinaryIO,
    reduction: Reduction = whole,
    *,
    max_pixels: int = MAX_PIXELS,
    channels: int = 3,
) -> Pixels:
    """Read one image as :func:`read_image` does, as an array, and faster where it is an ordinary JPEG.

    Without the package simplejpeg, Pillow reads these too, to the same values. Only a damaged one, which simplejpeg
    leaves to Pillow to be read at full size, is then read at the scale that was asked for.

    Args:
        path: as of :func:`read_image`.
        reduction: asked for the scale of a JPEG (gray or RGB); all else is read at full size.
        max_pixels: pixels, width * height, that are read; `MAX_PIXELS` at most.
        channels: 3 for RGB, 1 for gray, which is the luma of RGB; any other number takes the channels as they are
            stored: see `ulsam.data.image_channels.bands_of`.

    Returns:
        A uint8 array [H, W, channels], writable. In RGB at full size its values are those of :func:`read_image`.

    Raises:
        UnreadableImage, MachineError: as of :func:`read_image`; or the image has not so many channels.

    >>> stream = io.BytesIO()
    >>> Image.new("RGB", (40, 30)).save(stream, "jpeg")
    >>> read_pixels(stream).shape, read_pixels(stream, lambda width, height: 4).shape
    ((30, 40, 3), (8, 10, 3))
    """
    return _decoded(path, lambda content: _pixels(content, reduction, max_pixels, channels))


def image_pixels(path: str | os.PathLike[str] | BinaryIO, *, max_pixels: int = MAX_PIXELS) -> int:
    """Width * height of an image, by its header alone.

    Raises:
        UnreadableImage, MachineError: as of :func:`read_image`, as far as the header shows it.

    >>> stream = io.BytesIO()
    >>> Image.new("RGB", (40, 30)).save(stream, "png")
    >>> image_pixels(stream)
    1200
    """
    return _decoded(path, lambda content: _header(content, max_pixels))


def jpeg_of(pixels: Pixels, quality: int) -> bytes:
    """An image as a JPEG file, with half the colors' resolution.

    >>> jpeg_of(np.zeros((8, 8, 3), np.uint8), 85)[:2].hex()
    'ffd8'
    """
    if simplejpeg is None:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "jpeg", quality=quality, subsampling="4:2:0")
        return buffer.getvalue()
    content: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, "RGB", "420")
    return content


def _decoded(path: str | os.PathLike[str] | BinaryIO, decode: Callable[[bytes], Decoded]) -> Decoded:
    """What ``decode`` makes of the content of a file or stream.

    The whole file is read first, so that an error of the file system cannot pass for one of the image.
    """
    content = b""
    try:
        with machine_errors(_name(path)):
            content = _content(path)
        if not content:
            raise EOFError("empty file (zero bytes)")
        return decode(content)
    except MachineError:
        raise
    except _DAMAGE as error:
        if isinstance(error, MemoryError) and _memory_is_full():
            raise MachineError(f"cannot read {_name(path)}: {machine_fault(error)}") from error
        read = content.startswith((JPEG, b"\x89PNG")) or (content[8:12] == b"avif" and "AVIF" in FORMATS)
        kind = None if read or isinstance(error, UnreadableImage) else kind_of(content)
        raise UnreadableImage(f"{_name(path)}: {kind or _reason(error)}") from error


def _content(path: str | os.PathLike[str] | BinaryIO) -> bytes:
    if isinstance(path, str | os.PathLike):
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > MAX_BYTES:
                raise UnreadableImage(f"larger than {MAX_BYTES} bytes, the most that is read")
            return file.read()
    path.seek(0)
    return path.read()


def _memory_is_full() -> bool:
    """Whether there is no room for two of the largest images: otherwise a file asked for more than any image needs."""
    try:
        bytearray(8 * MAX_PIXELS)
    except MemoryError:
        return True
    return False


def _pixels(content: bytes, reduction: Reduction, max_pixels: int, channels: int) -> Pixels:
    """Decode; raises whatever Pillow raises."""
    if channels not in (1, 3):
        return _tolerant(content, lambda plain: _read_bands(plain, max_pixels, channels))
    pixels = _rgb(content, reduction, max_pixels)
    return pixels if channels == 3 else gray_of(pixels)


def _rgb(content: bytes, reduction: Reduction, max_pixels: int) -> Pixels:
    if simplejpeg is None:
        return rgb_array(_read(content, reduction, max_pixels))
    found = _jpeg(content, reduction, max_pixels) if content.startswith(JPEG) else None
    return rgb_array(_read(content, max_pixels=max_pixels)) if found is None else found


def _opened(content: bytes) -> Image.Image:
    """The image in a file's content, not yet decoded.

    Where Ultralytics is imported, Pillow's `open` is its own, which looks for a reader of HEIF in what is no image.
    """
    try:
        return Image.open(io.BytesIO(content), formats=FORMATS)
    except ImportError as error:
        raise UnidentifiedImageError("cannot identify the image") from error


def _jpeg(content: bytes, reduction: Reduction, max_pixels: int) -> Pixels | None:
    """An ordinary JPEG, upright; None for any other, and at the least doubt, to be read or refused by Pillow.

    Pillow's decoder is the same library (libjpeg-turbo), so that the values are the same, but it decodes in small
    pieces into four bytes a pixel.
    """
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(content)
        _check_size(width, height, max_pixels)
        _check_scans(content, width * height)
        if colors not in ("YCbCr", "RGB", "Gray"):
            return None
        turn = _stored_turn(content) if _may_be_turned(content) else None
        factor = reduction(width, height)
        least = {"min_width": -(-width // factor), "min_height": -(-height // factor), "min_factor": factor}
        pixels: Pixels = simplejpeg.decode_jpeg(content, **least)  # strict: any warning is an error
    except _DAMAGE:
        return None
    return turned(pixels, turn)


def _may_be_turned(content: bytes) -> bool:
    """Whether a JPEG's header holds metadata (APP1: EXIF, XMP), or anything that is not quite regular."""
    place = 2
    while content[place] == 0xFF and content[place + 1] in _SEGMENTS:
        place += 2 + int.from_bytes(content[place + 2 : place + 4])
    return content[place : place + 2] != b"\xff\xda"  # start of scan


_SEGMENTS = frozenset([*range(0xC0, 0xD0), 0xDB, 0xDD, 0xE0, *range(0xE2, 0xF0), 0xFE])
"""Second bytes of markers, APP1 aside, that a length follows (ITU-T T.81, table B.1)."""


def _stored_turn(content: bytes) -> Image.Transpose | None:
    """What makes the JPEG upright, by its metadata."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TURNS.get(_orientation(Image.open(io.BytesIO(plain_jpeg(content)), formats=("JPEG",))))


def _read(content: bytes, reduction: Reduction = whole, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode, an ordinary JPEG at the scale asked for, turn upright and convert; raises whatever Pillow raises."""
    return _tolerant(content, lambda plain: _read_plain(plain, reduction, max_pixels))


def _tolerant(content: bytes, read: Callable[[bytes], Decoded]) -> Decoded:
    """What is read of a file without the parts that only hinder, once more without metadata where these do."""
    plain = plain_png(content, metadata=True)
    bare = plain_png(content, metadata=False)
    if plain != bare:
        with contextlib.suppress(*_DAMAGE):  # or it is the metadata that cannot be read
            return read(plain)
    return read(plain_jpeg(bare) if bare.startswith(JPEG) else bare)


def _header(content: bytes, max_pixels: int) -> int:
    """Width * height; raises whatever Pillow raises."""
    plain = plain_png(content, metadata=False)
    plain = plain_jpeg(plain) if plain.startswith(JPEG) else plain
    if not tags_fit(plain):
        raise UnreadableImage(TAGS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        width, height = _opened(plain).size
    _check_size(width, height, max_pixels)
    return width * height


def _read_plain(content: bytes, reduction: Reduction, max_pixels: int) -> Image.Image:
    with _loaded(content, reduction, max_pixels) as (stored, turn):
        image = as_rgb(stored)
    return image if turn is None else image.transpose(turn)


def _read_bands(content: bytes, max_pixels: int, channels: int) -> Pixels:
    with _loaded(content, whole, 3 * max_pixels // max(3, channels)) as (stored, turn):
        pixels = bands_of(stored, channels)
    if pixels is None:
        raise UnreadableImage(lacking(channels))
    return turned(pixels, turn)


@contextlib.contextmanager
def _loaded(
    content: bytes, reduction: Reduction, max_pixels: int
) -> Iterator[tuple[Image.Image, Image.Transpose | None]]:
    """The image as it is stored, and what makes it upright."""
    if not tags_fit(content):
        raise UnreadableImage(TAGS)
    if content[:2] in (b"P1", b"P2", b"P3") and len(content) > LONGEST_TEXT:
        raise UnreadableImage(f"text of more than {LONGEST_TEXT} bytes: store its pixels as bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on metadata: the image is read or it is not
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        stored = _opened(content)
        _check_size(*stored.size, max_pixels)
        if stored.format in ("JPEG", "MPO"):
            _check_scans(content, stored.width * stored.height)
        if stored.format in ("JPEG", "MPO") and stored.mode in ("RGB", "L"):
            factor = reduction(*stored.size)
            stored.draft(None, (stored.width // factor, stored.height // factor))
        stored.load()
        yield stored, TURNS.get(_orientation(stored))


def _check_size(width: int, height: int, max_pixels: int) -> None:
    """Raise unless an image of this size is read."""
    if width * height > max_pixels:
        raise UnreadableImage(f"larger than {max_pixels} pixels, the most that is read")
    if max(width, height) > LONGEST * min(width, height):
        raise UnreadableImage(f"one side is more than {LONGEST} times as long as the other")


def _check_scans(content: bytes, pixels: int) -> None:
    """Raise where a JPEG of so many pixels has so many scans that decoding them all would take very long."""
    scans = count_scans(content, pixels)
    if scans > MAX_SCANS or scans * pixels > MAX_SCANNED:
        cap = min(MAX_SCANS, MAX_SCANNED // pixels)
        raise UnreadableImage(f"{scans} scans of {pixels} pixels, and at most {cap} are decoded: store it as baseline")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation 1..8; 1 where there is none or the EXIF block is broken."""
    exif = image.info.get("exif")
    if isinstance(exif, bytes) and not tags_fit(exif.removeprefix(b"Exif\0\0"), cut_off=True):
        return 1
    try:
        value = image.getexif().get(0x0112, 1)
    except _DAMAGE:
        return 1
    return value if isinstance(value, int) else 1


def _name(path: str | os.PathLike[str] | BinaryIO) -> str:
    """How a message calls the file: its path, quoted where that would not print on one line."""
    name = os.fspath(path) if isinstance(path, str | os.PathLike) else str(getattr(path, "name", "<stream>"))
    return name if name.isprintable() else ascii(name)


def _reason(error: BaseException) -> str:
    """An exception of Pillow or the file system in a few words."""
    text = " ".join(str(error).split())
    if isinstance(error, UnreadableImage):
        return text
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a known format, or cut off within its header"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"larger than {MAX_PIXELS} pixels, the most that is read"
    if isinstance(error, MemoryError):
        return "corrupt (it asks for more memory than any image needs)"
    if "truncated" in text.lower() or (isinstance(error, EOFError) and "empty" not in text):
        return "truncated"
    if isinstance(error, EOFError):
        return text
    return f"corrupt ({text or type(error).__name__})"
