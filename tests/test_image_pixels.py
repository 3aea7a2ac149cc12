"""Images as arrays of pixels, also at a reduced scale."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from image_files import encoded, scene
from ulsam.data.images import UnreadableImage, read_image, read_pixels

# as arrays, and at reduced scale


def jpeg(size: tuple[int, int] = (61, 47), mode: str = "RGB", **options) -> bytes:
    """A smooth image with edges, as a camera would store it."""
    y, x = np.mgrid[: size[1], : size[0]]
    planes = [128 + 90 * np.sin(x / 9 + k) * np.cos(y / (7 + k)) + 30 * (x > 20) for k in range(3)]
    image = Image.fromarray(np.stack(planes, -1).clip(0, 255).astype(np.uint8)).convert(mode)
    return encoded(image, "JPEG", **options).getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"quality": 5}])
def test_pixels_of_a_jpeg_are_those_of_the_image(mode, options):
    content = jpeg(mode=mode, **options)
    pixels = read_pixels(io.BytesIO(content))
    assert np.array_equal(pixels, np.asarray(read_image(io.BytesIO(content))))
    assert pixels.flags.writeable


def test_pixels_of_a_large_image_come_in_stripes_that_leave_none_out():
    image = Image.effect_noise((3_001, 2_999), 90).convert("RGB")
    stream = io.BytesIO()
    image.save(stream, "BMP")
    assert np.array_equal(read_pixels(stream), np.array(image))


def test_pixels_of_a_jpeg_stored_as_rgb():
    content = encoded(scene(), "JPEG", keep_rgb=True)
    assert np.array_equal(read_pixels(content), np.asarray(read_image(content)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_pixels_are_upright(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.open(io.BytesIO(jpeg())), format, exif=exif)
    assert np.array_equal(read_pixels(content), np.asarray(read_image(content)))


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_reduced_jpeg_is_the_image_made_smaller(factor, mode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = io.BytesIO(jpeg((400, 304), mode, quality=95, exif=exif))
    image = read_image(content)
    pixels = read_pixels(content, lambda width, height: factor)
    boxes = np.asarray(image.reduce(factor), float)
    assert pixels.shape == boxes.shape
    assert np.abs(boxes - pixels).mean() < 1.5


def test_a_reduced_jpeg_keeps_its_last_incomplete_pixels():
    pixels = read_pixels(io.BytesIO(jpeg((401, 303))), lambda width, height: 8)
    assert pixels.shape == (38, 51, 3)


def test_reduction_is_asked_with_the_size_and_of_ordinary_jpegs_alone():
    asked = []

    def reduction(width, height):
        asked.append((width, height))
        return 2

    assert read_pixels(io.BytesIO(jpeg((60, 40))), reduction).shape == (20, 30, 3)
    assert asked == [(60, 40)]
    assert read_pixels(io.BytesIO(jpeg((60, 40), "CMYK")), reduction).shape == (40, 60, 3)
    assert read_pixels(encoded(scene(), "PNG"), reduction).shape == (*scene().size[::-1], 3)
    assert asked == [(60, 40)]


XMP = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description tiff:Orientation="3"/></x:xmpmeta>'


@pytest.mark.parametrize(
    "before", [b"", b"\xff", b"\xff\xd0", b"\xff\xfe\x00\x06\xff\xda\xff\xda", b"\xff\xe5\x00\x02"]
)
@pytest.mark.parametrize("with_metadata", [False, True])
def test_metadata_is_found_wherever_it_stands_in_the_header(before, with_metadata):
    content = jpeg()
    metadata = b"\xff\xe1" + (len(XMP) + 2).to_bytes(2) + XMP if with_metadata else b""
    changed = io.BytesIO(content[:2] + before + metadata + content[2:])
    plain = np.asarray(read_image(io.BytesIO(content)))
    expected = np.asarray(read_image(changed))
    assert np.array_equal(expected, plain[::-1, ::-1] if with_metadata else plain)
    assert np.array_equal(read_pixels(changed), expected)


def read_or_reason(read, content):
    try:
        return np.asarray(read(io.BytesIO(content)))
    except UnreadableImage as error:
        return str(error)


def assert_read_alike(content):
    pixels, image = read_or_reason(read_pixels, content), read_or_reason(read_image, content)
    assert type(pixels) is type(image), (pixels, image)
    assert np.array_equal(pixels, image)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_truncated_jpeg_is_as_unreadable_as_ever(progressive):
    content = jpeg(progressive=progressive)
    reasons = set()
    for end in range(0, len(content), 7):
        assert_read_alike(content[:end])
        reasons.add(read_or_reason(read_pixels, content[:end]))
    assert "<stream>: truncated" in reasons


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_damaged_jpeg_is_read_or_refused_as_ever(data):
    content = bytearray(jpeg((40, 30), data.draw(st.sampled_from(["RGB", "L"])), exif=bytes(30)))
    for place in data.draw(st.lists(st.integers(2, len(content) - 1), min_size=1, max_size=3)):
        content[place] = data.draw(st.integers(0, 255))
    assert_read_alike(bytes(content))


def test_enormous_jpegs_are_refused_before_they_are_decoded():
    content = bytearray(jpeg())
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = b"\xea\x60\xea\x60"
    with pytest.raises(UnreadableImage, match="larger than 89000000 pixels"):
        read_pixels(io.BytesIO(content))
