"""Files that cost much more than their bytes are refused before they are decoded; odd metadata costs no image."""

import io
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from decoding import images_without_simplejpeg
from ulsam.data import images
from ulsam.data.image_structure import MAX_SCANS, count_scans, plain_jpeg, tags_fit
from ulsam.data.images import UnreadableImage, read_pixels

SCENE = Image.fromarray(np.arange(40 * 30 * 3, dtype=np.uint32).reshape(30, 40, 3).astype(np.uint8))
UPSIDE_DOWN = b'<x:xmpmeta><rdf:Description tiff:Orientation="3"/></x:xmpmeta>'


@pytest.fixture(params=["simplejpeg", "Pillow"])
def reader(request: pytest.FixtureRequest) -> ModuleType:
    """The reading of images with and without the package simplejpeg, which is not required."""
    return images_without_simplejpeg() if request.param == "Pillow" else images


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    began = time.process_time()
    yield
    assert time.process_time() - began < 3


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def read(content: bytes, reader: ModuleType = images) -> np.ndarray:
    pixels = reader.read_pixels(io.BytesIO(content))
    assert np.array_equal(pixels, np.asarray(reader.read_image(io.BytesIO(content))))
    return pixels


# scans


def with_scans(content: bytes, scans: int, size: tuple[int, int] | None = None) -> bytes:
    """A JPEG whose last scan stands there so often that it has so many; its header may claim another size."""
    last, end = content.rindex(b"\xff\xda"), content.rindex(b"\xff\xd9")
    changed = bytearray(content[:last] + content[last:end] * (scans - content.count(b"\xff\xda") + 1) + content[end:])
    if size:
        frame = next(place for kind in b"\xc0\xc2" if (place := changed.find(bytes([0xFF, kind]))) > 0)
        changed[frame + 5 : frame + 9] = struct.pack(">HH", *size[::-1])
    return bytes(changed)


@pytest.mark.parametrize("options", [{"progressive": True}, {"progressive": False}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_scans_beyond_any_use_are_refused(options: dict[str, bool], mode: str, reader: ModuleType) -> None:
    content = encoded(SCENE.convert(mode), "JPEG", **options)
    assert count_scans(content) < 19
    read(content, reader)
    for scans in (MAX_SCANS + 1, 5_000):
        message = f"^<stream>: {scans} scans of 1200 pixels, and at most 100 are"
        with pytest.raises(reader.UnreadableImage, match=message):
            read(with_scans(content, scans), reader)


def test_large_images_have_fewer_scans(reader: ModuleType) -> None:
    content = encoded(SCENE, "JPEG", progressive=True)
    message = "41 scans of 49000000 pixels, and at most 40 are decoded: store it as"
    with pytest.raises(reader.UnreadableImage, match=message):
        read(with_scans(content, 41, (7000, 7000)), reader)


def test_scans_inside_a_thumbnail_or_behind_the_end_do_not_count(reader: ModuleType) -> None:
    """A preview in the header, a second image behind the first one, data that looks like a scan."""
    content = encoded(SCENE, "JPEG", quality=95, comment=b"\xff\xda" * 200)
    assert count_scans(content + 300 * b"\xff\xda\0\2") == 1
    read(content, reader)
    read(content + 300 * b"\xff\xda\0\2", reader)


def test_restarts_and_fill_bytes_are_no_scans() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8))
    content = encoded(noise, "JPEG", quality=100, restart_marker_blocks=1)
    assert count_scans(content[:-2] + b"\xff\xff\xd9" + b"\xff\xda" * 200) == 1


# what stands between the segments of a JPEG


@pytest.mark.parametrize(
    "between",
    [b"\xff" * 3_000_000, b"\xff" * 3_000_000 + b"\0", b"x" * 3_000_000, b"\xff\xd8" * 1_000_000],
    ids=["ff", "ff 00", "x", "d8"],
)
def test_bytes_between_the_segments_of_a_header_cost_nothing(between: bytes, reader: ModuleType) -> None:
    content = encoded(SCENE, "JPEG")
    place = 4 + int.from_bytes(content[4:6])
    assert np.array_equal(read(content[:place] + between + content[place:], reader), read(content, reader))


def test_tags_behind_a_fill_byte_count() -> None:
    wild = b"II*\0\x08\0\0\0" + struct.pack("<H", 5_000) + 5_000 * (b"\x0f\x01\x02\x00\xff\xff\xff\x7f" + bytes(4))
    exif = b"\xff\xe1" + struct.pack(">H", len(wild) + 8) + b"Exif\0\0" + wild
    content = encoded(SCENE, "JPEG")
    assert plain_jpeg(content[:2] + b"\xff" + 60 * exif + content[2:]) == content


def test_pixels_as_text_are_read_up_to_a_size() -> None:
    content = b"P3 200 200 255\n" + b"1 " * 120_000
    assert (read(content) == 1).all()
    with pytest.raises(UnreadableImage, match="text of more than 10000000 bytes: store its pixels as bytes"):
        read(content + b" " * 10_000_000)


# texts and checksums of PNG


def chunk(kind: bytes, data: bytes, checksum: int | None = None) -> bytes:
    checksum = zlib.crc32(kind + data) if checksum is None else checksum
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def with_chunks(content: bytes, *chunks: bytes, behind: bool = False) -> bytes:
    place = content.rindex(b"IEND") - 4 if behind else content.index(b"IDAT") - 4
    return content[:place] + b"".join(chunks) + content[place:]


LONG = zlib.compress(bytes(2_000_000))
XMP = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + UPSIDE_DOWN)
CHUNKS = {
    "long compressed text": [chunk(b"zTXt", b"Comment\0\0" + LONG)],
    "long international text": [chunk(b"iTXt", b"Comment\0\1\0\0\0" + LONG)],
    "many texts": [chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1_000_000)))] * 70,
    "a wrong checksum": [chunk(b"tEXt", b"Comment\0hello", 7)],
    "a wrong checksum of a time": [chunk(b"tIME", bytes(7), 7)],
    "a long color profile": [chunk(b"iCCP", b"name\0\0" + LONG)],
    "a cut gamma": [chunk(b"gAMA", b"\0")],
    "a cut resolution": [chunk(b"pHYs", b"\0\1")],
    "a broken animation": [chunk(b"acTL", b"\0"), chunk(b"fcTL", bytes(3))],
    "text that is not compressed": [chunk(b"zTXt", b"Comment\0\0nothing of the kind")],
    "a compression that is none": [chunk(b"zTXt", b"Comment\0\7" + LONG)],
    "exif that is none": [chunk(b"eXIf", b"II*\0\xff\xff\xff\xff")],
    "an unknown chunk": [chunk(b"abCd", bytes(99), 1)],
}


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("case", CHUNKS)
def test_what_is_not_pixels_costs_no_png(case: str, behind: bool) -> None:
    content = encoded(SCENE, "PNG")
    assert np.array_equal(read(with_chunks(content, *CHUNKS[case], behind=behind)), np.asarray(SCENE))
    turned = read(with_chunks(with_chunks(content, XMP), *CHUNKS[case], behind=behind))
    assert np.array_equal(turned, np.asarray(SCENE)[::-1, ::-1])


def test_orientation_that_cannot_be_read_turns_nothing() -> None:
    broken = [chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LONG[:60_000]), chunk(b"zTXt", _PROFILE + LONG)]
    for one in broken:
        assert np.array_equal(read(with_chunks(encoded(SCENE, "PNG"), one)), np.asarray(SCENE))


_PROFILE = b"Raw profile type exif\0\0"


def test_damaged_pixels_still_cost_the_image() -> None:
    content = bytearray(encoded(SCENE, "PNG"))
    content[content.index(b"IDAT") + 30] ^= 1
    with pytest.raises(UnreadableImage):
        read(bytes(content))


def test_transparency_and_palette_stay() -> None:
    palette = SCENE.quantize(4)
    content = encoded(palette, "PNG", transparency=0)
    changed = with_chunks(content, *CHUNKS["many texts"])
    assert np.array_equal(read(changed), read(content))


def test_a_text_that_pillow_can_write_is_read() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "x" * 2_000_000, zip=True)
    assert np.array_equal(read(encoded(SCENE, "PNG", pnginfo=info)), np.asarray(SCENE))


# metadata whose reading costs far more than its bytes


def bomb(tags: int, each: int) -> bytes:
    """An EXIF block whose tags all have most of it as their value."""
    entries = b"".join(struct.pack("<HHLL", 1000 + number, 7, each, 8) for number in range(tags))
    return b"II*\0" + struct.pack("<LH", 8, tags) + entries + bytes(4)


def test_tags_are_added_up() -> None:
    assert not tags_fit(bomb(5000, 50_000))
    big = struct.pack("<2sHHHQQ", b"II", 43, 8, 0, 16, 1) + struct.pack("<HHQQ", 700, 7, 10**12, 0) + bytes(8)
    assert not tags_fit(big)
    assert tags_fit(encoded(SCENE, "TIFF"))
    for end in range(40):
        tags_fit(big[:end])


def test_metadata_that_costs_too_much_is_left_alone(reader: ModuleType) -> None:
    block = bomb(5000, 60_000)  # 300 MB in 60 kB
    jpeg = encoded(SCENE, "JPEG")
    part = b"\xff\xe1" + struct.pack(">H", len(block) + 8) + b"Exif\0\0" + block
    pages = b"\xff\xe2" + struct.pack(">H", len(block) + 6) + b"MPF\0" + block
    for changed in (part, part + 100 * (b"\xff\xe1\xff\xffExif\0\0" + bytes(65_527)), pages, 500_000 * b"\xff\xfe\0\2"):
        assert np.array_equal(read(jpeg[:2] + changed + jpeg[2:], reader), read(jpeg, reader))
    for format in ("PNG", "WEBP"):
        assert read(encoded(SCENE, format, exif=b"Exif\0\0" + block), reader).shape == (30, 40, 3)
    with pytest.raises(reader.UnreadableImage, match="its tags ask for more bytes than the file has"):
        read(block, reader)


def test_a_sound_jpeg_stays_as_it_is() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a bird"
    content = encoded(SCENE, "JPEG", exif=exif, icc_profile=bytes(200_000), comment=b"x")
    assert plain_jpeg(content) is content


def test_what_lies_behind_a_large_jpeg_is_no_scan_of_it(tmp_path: Path) -> None:
    """As in photos that hold a film, too."""
    content = io.BytesIO()
    Image.new("L", (7000, 7000)).save(content, "JPEG")
    path = tmp_path / "motion.jpg"
    path.write_bytes(content.getvalue() + 50 * b"\xff\xda\x00\x08")
    assert read_pixels(str(path), lambda width, height: 8).shape[:2] == (875, 875)


def test_one_tag_that_is_cut_off_does_not_turn_an_image(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20))
    exif = image.getexif()
    exif[0x0112], exif[0x010F] = 6, "make"
    block = exif.tobytes()
    order = "<" if block[6:8] == b"II" else ">"
    at = block.index(struct.pack(f"{order}HH", 0x010F, 2)) + 4
    image.save(tmp_path / "turned.jpg", exif=block[:at] + struct.pack(f"{order}L", 60_000) + block[at + 4 :])
    assert read_pixels(str(tmp_path / "turned.jpg"), lambda width, height: 1).shape[:2] == (40, 20)
