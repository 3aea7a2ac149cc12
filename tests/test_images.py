"""Every kind of image file, good and bad, is read as RGB or named in one line."""

import functools
import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from image_files import COLORS, encoded, scene
from ulsam.base.errors import UlsamError
from ulsam.data.image_turns import TURNS
from ulsam.data.images import UnreadableImage, read_image, read_pixels


def assert_is_scene(image: Image.Image, tolerance: int = 40) -> None:
    assert image.mode == "RGB"
    assert image.size == (30, 20)
    for name, place in (("red", (7, 5)), ("green", (22, 5)), ("blue", (7, 15)), ("blue", (22, 15))):
        assert np.abs(np.subtract(image.getpixel(place), COLORS[name])).max() <= tolerance, (name, place)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000"])
def test_reads_each_format(format: str, tmp_path: Path) -> None:
    assert_is_scene(read_image(encoded(scene(), format)))
    misnamed = tmp_path / "image.txt"
    misnamed.write_bytes(encoded(scene(), format).getvalue())
    assert_is_scene(read_image(misnamed))
    assert_is_scene(read_image(str(misnamed)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_rotation_is_undone(format: str, orientation: int) -> None:
    turn = TURNS.get(orientation)
    inverse = {
        Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90,
        Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270,
    }
    stored = scene() if turn is None else scene().transpose(inverse.get(turn, turn))
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert_is_scene(read_image(encoded(stored, format, exif=exif)))


def test_exif_rotation_as_a_camera_writes_it() -> None:
    """Orientation 6: the camera was turned so that row 0 of the file is the right-hand side of the scene."""
    stored = Image.new("RGB", (2, 1), "red")
    stored.putpixel((1, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = read_image(encoded(stored, "PNG", exif=exif))
    assert upright.size == (1, 2)
    assert [upright.getpixel((0, y)) for y in (0, 1)] == [(255, 0, 0), (0, 0, 255)]


@pytest.mark.parametrize(
    "block", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 9]
)
def test_broken_exif_turns_nothing(block: bytes) -> None:
    assert_is_scene(read_image(encoded(scene(), "JPEG", exif=block)))


def test_cmyk_is_converted() -> None:
    assert_is_scene(read_image(encoded(scene().convert("CMYK"), "JPEG")))
    assert_is_scene(read_image(encoded(scene().convert("CMYK"), "TIFF")))


def test_palette_gray_and_one_bit() -> None:
    assert_is_scene(read_image(encoded(scene().quantize(8), "PNG")))
    assert read_image(encoded(Image.new("L", (3, 2), 77), "PNG")).getpixel((1, 1)) == (77, 77, 77)
    bits = Image.new("1", (9, 2))
    bits.putpixel((8, 1), 1)
    read = read_image(encoded(bits, "PNG"))
    assert (read.getpixel((8, 1)), read.getpixel((0, 0))) == ((255, 255, 255), (0, 0, 0))


def test_transparency_is_laid_over_white() -> None:
    half_red = Image.new("RGBA", (2, 1), (255, 0, 0, 128))
    half_red.putpixel((1, 0), (0, 0, 0, 0))
    for format in ("PNG", "TIFF"):
        read = read_image(encoded(half_red, format))
        assert np.abs(np.subtract(read.getpixel((0, 0)), (255, 127, 127))).max() <= 1
        assert read.getpixel((1, 0)) == (255, 255, 255)
    gray = read_image(encoded(Image.new("LA", (1, 1), (0, 0)), "PNG"))
    assert gray.getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    for format in ("PNG", "GIF"):
        read = read_image(encoded(palette, format, transparency=0))
        assert [read.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (200, 100, 50)]
    keyed = read_image(encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG", transparency=(1, 2, 3)))
    assert keyed.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_gray_is_scaled_not_clipped(format: str) -> None:
    ramp = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    read = np.asarray(read_image(encoded(Image.fromarray(ramp), format)))
    assert np.array_equal(read[..., 0], ramp // 256)
    dark = np.full((4, 4), 200, np.uint16)
    assert np.asarray(read_image(encoded(Image.fromarray(dark), format))).max() == 0


def test_16_bit_gray_with_a_transparent_key() -> None:
    values = np.array([[0, 32768, 65535]], np.uint16)
    read = read_image(encoded(Image.fromarray(values), "PNG", transparency=32768))
    assert [read.getpixel((x, 0))[0] for x in range(3)] == [0, 255, 255]


def test_16_bit_pgm() -> None:
    pgm = b"P5 2 1 65535\n" + struct.pack(">2H", 0x8000, 0xFFFF)
    assert [read_image(io.BytesIO(pgm)).getpixel((x, 0))[0] for x in (0, 1)] == [128, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3, 200, 90], [3, 200, 90]),
        ([0, 150, 300], [0, 128, 255]),
        ([-100, 0, 155], [0, 100, 255]),
        ([1000, 1100, 3550], [0, 10, 255]),
        ([-(2**31), 0, 2**31 - 1], [0, 128, 255]),
        ([700, 700, 700], [0, 0, 0]),
    ],
)
def test_32_bit_gray_beyond_8_bits_is_scaled_by_its_own_range(values: list[int], expected: list[int]) -> None:
    read = read_image(encoded(Image.fromarray(np.array([values], np.int32)), "TIFF"))
    assert [read.getpixel((x, 0))[0] for x in range(3)] == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0, 0.5, 1], [0, 128, 255]), ([0, 100, 255], [0, 100, 255]), ([256, 25600, 51200], [1, 100, 200])],
)
def test_float_gray(values: list[float], expected: list[int]) -> None:
    read = read_image(encoded(Image.fromarray(np.array([values], np.float32)), "TIFF"))
    assert [read.getpixel((x, 0))[0] for x in range(3)] == expected


def test_float_gray_with_nan() -> None:
    read = read_image(encoded(Image.fromarray(np.array([[np.nan, 1, np.inf]], np.float32)), "TIFF"))
    assert [read.getpixel((x, 0))[0] for x in range(3)] == [0, 255, 0]


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_gives_its_first_frame(format: str) -> None:
    later = [Image.new("RGB", (30, 20), color) for color in ("black", "white")]
    assert_is_scene(read_image(encoded(scene(), format, save_all=True, append_images=later)))


def test_bad_files_are_named_with_a_reason(tmp_path: Path) -> None:
    good = encoded(scene((200, 150)), "JPEG").getvalue()
    cases = {
        "empty.jpg": (b"", "empty file (zero bytes)"),
        "cut.jpg": (good[: len(good) // 2], "truncated"),
        "text.png": (b"hello, this is no image", "not an image in a known format, or cut off within its header"),
        "cut.png": (encoded(scene((200, 150)), "PNG").getvalue()[:120], "truncated"),
        "program.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "not an image"),
    }
    for name, (content, reason) in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UnreadableImage) as caught:
            read_image(path)
        assert str(caught.value).startswith(f"{path}: {reason}")
        assert isinstance(caught.value, UlsamError)
    with pytest.raises(UnreadableImage, match=r"gone\.jpg: no such file or directory"):
        read_image(tmp_path / "gone.jpg")
    with pytest.raises(UnreadableImage, match="is a directory"):
        read_image(tmp_path)
    strange = tmp_path / "two\nlines.jpg"
    strange.write_bytes(b"")
    with pytest.raises(UnreadableImage) as caught:
        read_image(strange)
    assert "\n" not in str(caught.value)


def test_a_file_handle_is_closed_and_the_file_may_be_deleted(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    scene().save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        image = read_image(path)
        path.unlink()
        image.load()
    assert_is_scene(image)


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "size", [(9_000, 9_889), (9_434, 9_434), (10_000, 12_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)]
)
def test_decompression_bombs_are_refused_from_the_header(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("the bomb was decoded"))
    with pytest.raises(UnreadableImage, match=r"^<stream>: larger than 89000000 pixels"):
        read_image(io.BytesIO(png_claiming(*size)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_lines_are_refused_from_the_header(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resized by their shorter side they would take gigabytes."""
    assert read_pixels(encoded(scene((400, 4)), kind)).shape == (4, 400, 3)
    lines = [encoded(Image.new("RGB", size), kind) for size in ((401, 4), (1, 60_000))]
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("the line was decoded"))
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *_, **__: pytest.fail("the line was decoded"))
    for line in lines:
        with pytest.raises(UnreadableImage, match=r"^<stream>: one side is more than 100 times as long as the other$"):
            read_pixels(line)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_fewer_pixels_may_be_the_most(kind: str) -> None:
    assert read_pixels(encoded(scene((30, 20)), kind), max_pixels=600).shape == (20, 30, 3)
    with pytest.raises(UnreadableImage, match=r"^<stream>: larger than 599 pixels, the most that is read$"):
        read_pixels(encoded(scene((30, 20)), kind), max_pixels=599)


def test_pillow_settings_and_warning_filters_stay_as_they_were() -> None:
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    read_image(encoded(scene(), "JPEG"))
    with pytest.raises(UnreadableImage):
        read_image(io.BytesIO(png_claiming(60_000, 60_000)))
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)) == before


@functools.cache
def victims() -> tuple[bytes, ...]:
    """A small file of each format and kind, to damage."""
    noise = Image.frombytes("RGB", (24, 17), np.random.default_rng(0).bytes(24 * 17 * 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a bird"
    files = [
        encoded(noise, "JPEG", exif=exif),
        encoded(noise, "JPEG", progressive=True),
        encoded(noise.convert("CMYK"), "JPEG"),
        encoded(noise, "PNG", exif=exif),
        encoded(noise.quantize(16), "PNG", transparency=0),
        encoded(Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8)), "PNG"),
        encoded(noise, "PNG", save_all=True, append_images=[scene((24, 17))]),
        encoded(noise, "GIF", save_all=True, append_images=[scene((24, 17))]),
        encoded(noise, "WEBP", exif=exif),
        encoded(noise.convert("RGBA"), "WEBP", lossless=True),
        encoded(noise, "BMP"),
        encoded(noise.quantize(16), "BMP"),
        encoded(noise, "TIFF", exif=exif),
        encoded(noise, "TIFF", compression="tiff_lzw"),
        encoded(noise, "TIFF", compression="jpeg"),
        encoded(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"),
        encoded(noise, "PPM"),
        encoded(noise, "AVIF"),
        encoded(noise, "JPEG2000"),
    ]
    return tuple(file.getvalue() for file in files)


def assert_reads_or_names(content: bytes) -> None:
    try:
        image = read_image(io.BytesIO(content))
    except UnreadableImage as error:
        assert str(error).startswith("<stream>: ")
        assert "\n" not in str(error)
    else:
        assert image.mode == "RGB"
        assert len(image.tobytes()) == 3 * image.width * image.height > 0


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_damaged_files_are_read_or_named(data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(victims())))
    near_start = st.integers(0, min(200, len(content)) - 1)
    places = st.lists(st.tuples(near_start | st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=6)
    for place, value in data.draw(places):
        content[place] = value
    cut = data.draw(st.none() | st.integers(0, len(content)))
    assert_reads_or_names(bytes(content[:cut]))


@pytest.mark.parametrize("number", range(19))
def test_truncation_anywhere(number: int) -> None:
    content = victims()[number]
    for end in range(0, len(content), max(1, len(content) // 40)):
        assert_reads_or_names(content[:end])


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_random_bytes(content: bytes) -> None:
    assert_reads_or_names(content)


@pytest.mark.parametrize("name", ["gone.jpg", "."])
def test_files_that_cannot_be_opened(tmp_path, name):
    with pytest.raises(UnreadableImage, match=r"no such file|is a directory"):
        read_pixels(tmp_path / name)
