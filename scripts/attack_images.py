"""Image files that somebody made to cost much, to hang, or to be read in two ways: both readers, each file alone.

The readers are simplejpeg with Pillow behind it, and Pillow alone. Each file is read, or refused in one line, within
2 seconds and 500 MB, and both readers agree. An image of more than 31 megapixels may take 16 bytes a pixel instead, and
its share of time: Pillow decodes into 4 bytes a pixel, some formats by way of 4 or 8 more, and 3 are handed over.
"""

import functools
import hashlib
import io
import re
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from attack import alone
from PIL import Image, ImageDraw, PngImagePlugin

from ulsam.data import images

SECONDS, MEGABYTES, LARGE = 2.0, 500.0, 31e6  # pixels
#: How to store the image, by name.
FORMATS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "jpeg": ("RGB", "JPEG", {}),
    "jpeg-progressive": ("RGB", "JPEG", {"progressive": True}),
    "jpeg-gray": ("L", "JPEG", {}),
    "jpeg-cmyk": ("CMYK", "JPEG", {}),
    "jpeg-444": ("RGB", "JPEG", {"subsampling": 0, "quality": 100}),
    "jpeg-restarts": ("RGB", "JPEG", {"restart_marker_blocks": 1}),
    "mpo": ("RGB", "MPO", {"save_all": True}),
    "png": ("RGB", "PNG", {}),
    "png-alpha": ("RGBA", "PNG", {}),
    "png-palette": ("P", "PNG", {}),
    "png-16": ("I;16", "PNG", {}),
    "png-1": ("1", "PNG", {}),
    "png-animated": ("RGB", "PNG", {"save_all": True}),
    "gif": ("P", "GIF", {}),
    "gif-animated": ("P", "GIF", {"save_all": True}),
    "webp": ("RGB", "WEBP", {}),
    "webp-lossless": ("RGBA", "WEBP", {"lossless": True}),
    "webp-animated": ("RGB", "WEBP", {"save_all": True}),
    "tiff": ("RGB", "TIFF", {}),
    "tiff-lzw": ("RGB", "TIFF", {"compression": "tiff_lzw"}),
    "tiff-deflate": ("RGB", "TIFF", {"compression": "tiff_deflate"}),
    "tiff-jpeg": ("RGB", "TIFF", {"compression": "jpeg"}),
    "tiff-packbits": ("RGB", "TIFF", {"compression": "packbits"}),
    "tiff-float": ("F", "TIFF", {}),
    "tiff-int": ("I", "TIFF", {}),
    "tiff-big": ("RGB", "TIFF", {"big_tiff": True}),
    "bmp": ("RGB", "BMP", {}),
    "bmp-palette": ("P", "BMP", {}),
    "ppm": ("RGB", "PPM", {}),
    "pbm": ("1", "PPM", {}),
    "avif": ("RGB", "AVIF", {}),
    "jpeg2000": ("RGB", "JPEG2000", {}),
}


def attack(count: int = 0, seed: int = 0) -> tuple[dict[str, Any], list[str]]:
    """Every kind once; ``count`` is not used."""
    fell, read, worst = [], 0, {"seconds": 0.0, "megabytes": 0.0}
    kinds = 0
    simplejpeg = images.simplejpeg
    for name, content in _kinds(np.random.default_rng(seed)):
        kinds += 1
        answers = []
        for reader in (simplejpeg, None):
            images.simplejpeg = reader
            answer = alone(functools.partial(_read, content), 30.0)
            size = re.match(r"read \((\d+), (\d+), 3\)", answer["found"])
            answer["pixels"] = int(size[1]) * int(size[2]) if size else 0
            answers.append(answer["found"])
            label = f"{name}, {len(content)} bytes, {'simplejpeg' if reader else 'Pillow'}"
            larger = max(1.0, answer["pixels"] / LARGE)
            if answer["seconds"] > SECONDS * larger or answer["megabytes"] > MEGABYTES * larger:
                fell.append(f"{label}: {answer['seconds']:.1f} s, {answer['megabytes']:.0f} MB: {answer['found']}")
            for key in worst:
                worst[key] = max(worst[key], round(answer[key], 2))
        if len(set(answers)) > 1 or not answers[0].startswith(("read ", "UnreadableImage: <stream>: ")):
            fell.append(f"{name}: {answers}")
        read += answers[0].startswith("read ")
    return {"kinds": kinds, "read": read, "refused": kinds - read, "worst": worst}, fell


def _read(content: bytes) -> str:
    pixels = images.read_pixels(io.BytesIO(content))
    return f"read {pixels.shape} {hashlib.sha256(pixels).hexdigest()[:12]}"


def _kinds(random: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    for name, (mode, kind, options) in FORMATS.items():
        if kind in Image.SAVE:
            yield from _damaged(name, _stored(_picture(), mode, kind, **options), random)
    yield from _sizes()
    yield from _metadata()
    yield from _others()


def _picture(size: tuple[int, int] = (120, 90)) -> Image.Image:
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    ImageDraw.Draw(image).ellipse((10, 10, 60, 50), fill=(200, 30, 90))
    return image


def _stored(image: Image.Image, mode: str, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    if options.get("save_all"):
        options["append_images"] = [image.rotate(90).convert(mode)]
    (image.convert("L").convert(mode) if mode in ("F", "I", "I;16") else image.convert(mode)).save(
        stream, kind, **options
    )
    return stream.getvalue()


def _damaged(name: str, content: bytes, random: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    half, middle = len(content) // 2, bytearray(content)
    yield name, content
    yield f"{name} cut in half", content[:half]
    yield f"{name} cut in its header", content[:20]
    yield f"{name} twice", 2 * content
    yield f"{name} with a megabyte behind it", content + bytes(10**6)
    middle[half : half + 40] = bytes(len(middle[half : half + 40]))
    yield f"{name} with zeros in its middle", bytes(middle)
    for turn, first in enumerate((0, 0, len(content) // 3)):
        changed = bytearray(content)
        for place in random.integers(first, min(len(content), first + 400), 6):
            changed[place] = random.integers(256)
        yield f"{name} with changed bytes {turn}", bytes(changed)
    huge = bytearray(content)
    for place in random.integers(4, min(len(content), 120), 2):
        huge[place : place + 4] = b"\xff\xff\xff\x7f"
    yield f"{name} with huge numbers in its header", bytes(huge)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, *chunks: bytes, depth: int = 8, color: int = 2, data: bytes = b"") -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _zeros(count: int) -> bytes:
    packer = zlib.compressobj(9)
    return b"".join([*(packer.compress(bytes(10**6)) for _ in range(count // 10**6)), packer.flush()])


def _jpeg_of(width: int, height: int, content: bytes) -> bytes:
    changed = bytearray(content)
    frame = next(place for kind in b"\xc0\xc2" if (place := changed.find(bytes([0xFF, kind]))) > 0)
    changed[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(changed)


def _sizes() -> Iterator[tuple[str, bytes]]:
    """Sizes that are claimed or hold, and pixels that compress well."""
    plain, progressive = (_stored(_picture(), "RGB", "JPEG", progressive=one) for one in (False, True))
    for width, height in ((65_500, 65_500), (9_400, 9_400), (65_500, 1_300), (65_500, 1), (1, 1)):
        yield f"jpeg that claims {width}x{height}", _jpeg_of(width, height, plain)
        yield f"progressive jpeg that claims {width}x{height}", _jpeg_of(width, height, progressive)
    last, end = progressive.rindex(b"\xff\xda"), progressive.rindex(b"\xff\xd9")
    for scans, size in ((99, (4_000, 4_000)), (20, (9_400, 9_400)), (5_000, (7_000, 7_000)), (60, (120, 90))):
        repeated = progressive[:last] + progressive[last:end] * (scans - 9) + progressive[end:]
        yield f"jpeg of {scans} scans {size}", _jpeg_of(*size, repeated)
    for side in (9_400, 40_000, 2**31 - 1):
        yield f"png that claims {side} squared", _png(side, side, data=_zeros(10**6))
        yield f"16-bit png that claims {side} squared", _png(side, side, depth=16, color=6, data=_zeros(10**6))
    yield "png of 89 megapixels", _png(9_400, 9_400, data=_zeros(9_400 * 28_201 + 10**6))
    yield "1-bit png of 89 megapixels", _png(9_400, 9_400, depth=1, color=0, data=_zeros(9_400 * 1_176 + 10**6))
    yield "png with far too many pixels in it", _png(10, 10, data=_zeros(300 * 10**6))
    yield "png of one line", _png(60_000, 1, data=_zeros(10**6))
    gray = Image.new("L", (9_400, 9_400))
    for kind, options in (
        ("TIFF", {"compression": "tiff_deflate"}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("GIF", {}),
        ("JPEG", {}),
    ):
        yield f"{kind} of 88 megapixels of gray {options}", _stored(gray, "L", kind, **options)
    yield "TIFF of 49 megapixels", _stored(Image.new("RGB", (7_000, 7_000)), "RGB", "TIFF", compression="tiff_deflate")
    yield (
        "float TIFF of 49 megapixels",
        _stored(Image.new("F", (7_000, 7_000)), "F", "TIFF", compression="tiff_deflate"),
    )
    yield "WebP of 67 megapixels", _stored(Image.new("RGB", (8_192, 8_192)), "RGB", "WEBP", lossless=True, method=0)
    yield "gif that claims 65535 squared", b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + bytes(100)
    for kind in (b"P6", b"P5", b"P4", b"P3", b"P1"):
        yield f"{kind.decode()} that claims 99999 squared", kind + b" 99999 99999 255 " + bytes(1000)
    yield "PPM of text with a long comment", b"P3\n#" + b"x" * 5_000_000 + b"\n2 2 255\n" + b"1 2 3 " * 4
    yield "PPM of text of 4 megapixels", b"P3 2000 2000 255\n" + b"1 " * 12_000_000
    rows = struct.pack("<IIIIiiHHIIiiII", 99, 0, 54, 40, 9, -(2**31), 1, 24, *[0] * 6)
    yield "BMP that claims 2**31 rows", b"BM" + rows
    yield (
        "run-length BMP of jumps",
        (b"BM" + struct.pack("<IIIIiiHHIIiiII", 99, 0, 1078, 40, 9_000, 9_000, 1, 8, 1, 0, 0, 0, 256, 0) + bytes(1024))
        + b"\x00\x02\xff\xff" * 200_000,
    )


def _metadata() -> Iterator[tuple[str, bytes]]:
    """What is not pixels."""
    row = zlib.compress(10 * (b"\0" + bytes(30)))
    text = zlib.compress(bytes(50_000_000), 9)
    yield "png of compressed text", _png(10, 10, _chunk(b"zTXt", b"a\0\0" + text), data=row)
    yield "png of compressed international text", _png(10, 10, _chunk(b"iTXt", b"a\0\1\0\0\0" + text), data=row)
    yield "png of a compressed profile", _png(10, 10, _chunk(b"iCCP", b"a\0\0" + text), data=row)
    yield "png of 70 texts", _png(10, 10, *[_chunk(b"tEXt", b"a\0" + b"x" * 10**6)] * 70, data=row)
    yield "png of 100,000 chunks", _png(10, 10, *[_chunk(b"abCd", b"")] * 100_000, data=row)
    yield "png with a wrong checksum in a text", _png(10, 10, _chunk(b"tEXt", b"a\0b")[:-1] + b"!", data=row)
    yield "png with a wrong checksum in its pixels", _png(10, 10, data=row)[:-16] + bytes(4) + _chunk(b"IEND", b"")
    yield "png with a name for a chunk of another length", _png(10, 10, b"\x7f\xff\xff\xfftEXt", data=row)
    animation = _chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))
    yield "png that announces 2**31 frames", _png(10, 10, animation, data=row)
    wild = b"\x0f\x01\x02\x00\xff\xff\xff\x7f" + bytes(4)
    for count in (1, 5_000):
        tags = b"II*\0\x08\0\0\0" + struct.pack("<H", count) + count * wild
        exif = b"\xff\xe1" + struct.pack(">H", min(65_533, len(tags) + 8)) + b"Exif\0\0" + tags[:65_525]
        jpeg = _stored(_picture(), "RGB", "JPEG")
        yield f"jpeg with {count} wild tags", jpeg[:2] + exif + jpeg[2:]
        yield f"jpeg with {count} wild tags 60 times", jpeg[:2] + 60 * exif + jpeg[2:]
        yield f"tiff of {count} wild tags", tags
        yield f"png with {count} wild tags", _png(10, 10, _chunk(b"eXIf", tags), data=row)
    loop = b"II*\0\x08\0\0\0\1\0" + struct.pack("<HHII", 0x8769, 4, 1, 8) + struct.pack("<I", 8)
    yield "tiff whose directory follows itself", loop
    jpeg = _stored(_picture(), "RGB", "JPEG")
    yield (
        "jpeg whose tags follow themselves",
        (jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(loop) + 8) + b"Exif\0\0" + loop + jpeg[2:]),
    )
    yield "jpeg with 2,000 comments", jpeg[:2] + 2_000 * (b"\xff\xfe\xff\xff" + bytes(65_533))[:3000] + jpeg[2:]
    yield "jpeg with 20,000 empty comments", jpeg[:2] + 20_000 * b"\xff\xfe\0\2" + jpeg[2:]
    yield "jpeg with 10 MB of fill bytes", jpeg[:2] + b"\xff" * 10_000_000 + jpeg[2:]
    yield "jpeg with 60 kB of fill bytes before a zero", jpeg[:2] + b"\xff" * 60_000 + b"\0" + jpeg[2:]
    yield "jpeg with 10 MB of other bytes in its header", jpeg[:20] + b"x" * 10_000_000 + jpeg[20:]
    yield "jpeg with tags behind a fill byte", jpeg[:2] + b"\xff" + 60 * exif + jpeg[2:]
    yield "jpeg with 100 MB behind its end", jpeg + bytes(100_000_000)
    yield "jpeg with a megabyte of begun scans behind its end", jpeg + 300_000 * b"\xff\xda\0\2"
    gif = _stored(_picture((8, 8)), "P", "GIF")
    frame = gif[13 + 3 * 256 : -1]
    yield "gif of 50,000 frames", gif[:-1] + 50_000 * frame + b";"
    yield "gif with 20 MB of comments", gif[:-1] + b"!\xfe" + 80_000 * (b"\xff" + bytes(255)) + b"\0;"
    note = PngImagePlugin.PngInfo()
    note.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="' + "3" * 100_000 + '"/>')
    stream = io.BytesIO()
    _picture().save(stream, "PNG", pnginfo=note)
    yield "png whose turn is a number of 100,000 digits", stream.getvalue()


def _others() -> Iterator[tuple[str, bytes]]:
    """What is no image, or another one than it seems."""
    jpeg, png = _stored(_picture(), "RGB", "JPEG"), _stored(_picture(), "RGB", "PNG")
    yield "nothing", b""
    yield "a byte", b"\xff"
    yield "10 MB of noise", np.random.default_rng(0).bytes(10**7)
    yield "10 MB of zeros", bytes(10**7)
    yield "postscript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch /tmp/x) (w) file\n"
    yield "svg", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    yield "xml that grows", b'<!DOCTYPE a [<!ENTITY b "' + b"x" * 10**5 + b'"><!ENTITY c "&b;&b;">]><a>&c;</a>'
    yield "a pickle", b"\x80\x04cos\nsystem\n(S'true'\ntR."
    yield "zip", b"PK\x03\x04" + bytes(100)
    yield "pdf", b"%PDF-1.7\n1 0 obj\n"
    yield "an icon", b"\0\0\1\0\1\0\xff\xff\0\0\1\0\x20\0\xff\xff\xff\x7f\x16\0\0\0" + png
    yield "photoshop", b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 2**30, 2**30, 8, 3) + bytes(50)
    yield "jpeg behind a png's first bytes", png[:8] + jpeg
    yield "png behind a jpeg's first bytes", jpeg[:3] + png
    yield "jpeg of a start and an end", b"\xff\xd8\xff\xd9"
    yield "jpeg without tables", jpeg[:2] + jpeg[jpeg.index(b"\xff\xc0") :]
    yield "jpeg of tables alone", jpeg[: jpeg.index(b"\xff\xc0")] + b"\xff\xd9"
    yield "jpeg with 255 colors", jpeg.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\x03\x05\x08")
    yield "jpeg 2000 without an image", b"\0\0\0\x0cjP  \r\n\x87\n\0\0\0\x14ftypjp2 \0\0\0\0jp2 "
    yield "avif without an image", b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf\0\0\0\0"
    yield "webp that claims to be long", b"RIFF\xff\xff\xff\x7fWEBPVP8X\n\0\0\0" + b"\xff" * 10
    yield "heif", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
