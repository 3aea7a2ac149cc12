"""What an image file holds beside its pixels, and what its pixels would cost, from its structure alone.

Whoever made the file may have made it to cost much: each of these functions takes time in proportion to its bytes.
"""

import re
import struct
import zlib
from collections.abc import Iterator

MAX_SCANS = 100
"""Scans of a JPEG that are decoded at most; ordinary progressive ones have 10, in four colors 18."""

MAX_SCANNED = 2_000_000_000
"""Scans of a JPEG times its pixels that are decoded at most: 22 scans of the largest image. Pillow takes about 3 ns
for each, even where the scan changes nothing."""

_MAX_SEGMENTS = 1000  # of a JPEG before its first scan; a color profile, the largest of them, takes up to 255
_MAX_FILL = 1000  # bytes between them, each of which Pillow reads on its own
_LARGEST_BLOCK = 65_536  # of a PNG's texts: as much as a JPEG has room for
_LARGEST_EXIF = 1_000_000
_PNG = b"\x89PNG\r\n\x1a\n"
_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_TURNED_BY = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")  # texts that say which side of an image is up
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")  # in the data of a scan FF 00 and restarts are no markers
_SEGMENT = re.compile(rb"\xff([^\x00\xff\xd0-\xd9])")  # a marker that a length follows
_TAG_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}


def count_scans(content: bytes, pixels: int = 0) -> int:
    """How many scans the first image of a JPEG file has; more than there are only where both counts may be decoded.

    Source: ITU-T T.81, annex B.

    >>> count_scans(b"\\xff\\xd8" + 101 * b"\\xff\\xda\\x00\\x02" + b"\\xff\\xd9" + b"\\xff\\xda")
    101
    """
    scans = content.count(b"\xff\xda")
    if scans <= MAX_SCANS and scans * pixels <= MAX_SCANNED:
        return scans  # what lies behind the image may look like scans, too
    scans, place = 0, 2
    while marker := _MARKER.search(content, place):
        kind, place = marker[1][0], marker.end()
        if kind == 0xD9:  # end of the image
            break
        scans += kind == 0xDA
        if kind not in (0x01, 0xD8):  # these alone have no length
            place += int.from_bytes(content[place : place + 2])
    return scans


def plain_jpeg(content: bytes) -> bytes:
    """A JPEG file; without metadata that would cost far more to read than it has bytes.

    >>> plain_jpeg(b"\\xff\\xd8\\xff\\xda")
    b'\\xff\\xd8\\xff\\xda'
    """
    segments: list[tuple[int, int]] = []
    end, fill = 2, 0
    exif = b""
    unsound = False
    for start, end in _segments(content):
        fill += start - (segments[-1][1] if segments else 2)
        segments.append((start, end))
        if content[start + 1] == 0xE1 and content.startswith(b"Exif\0\0", start + 4):
            exif += content[start + 10 : end]
        elif content[start + 1] == 0xE2 and content.startswith(b"MPF\0", start + 4):
            unsound |= not tags_fit(content[start + 8 : end], cut_off=True)
    unsound |= len(segments) > _MAX_SEGMENTS or fill > _MAX_FILL
    if not unsound and tags_fit(exif, cut_off=True):
        return content
    # APP0 (JFIF) and APP14 (Adobe) say how colors are stored
    kept = [content[a:b] for a, b in segments if content[a + 1] in (0xE0, 0xEE) or content[a + 1] < 0xE0]
    return b"".join([content[:2], *kept, content[end:]])


def _segments(content: bytes) -> Iterator[tuple[int, int]]:
    """Where the segments before a JPEG's first scan begin and end; what lies between them is passed over."""
    place = 2
    while (marker := _SEGMENT.search(content, place)) and marker.end() + 2 <= len(content):
        kind, length = marker[1][0], int.from_bytes(content[marker.end() : marker.end() + 2])
        place = marker.end()
        if kind < 0xC0 or kind == 0xDA or length < 2:
            return
        place += length
        yield marker.end() - 2, place


def tags_fit(block: bytes, cut_off: bool = False) -> bool:
    """Whether the tags of a TIFF file, or of an EXIF block, make readers copy no more than four times its bytes.

    Readers copy the value of each tag, and 65,535 tags may all have the whole file as theirs.

    Args:
        block: from its byte order on.
        cut_off: values end where the block does, as readers of EXIF take them, who skip such a tag.

    Source: TIFF 6.0, section 2; BigTIFF.

    >>> wild = b"\\x0f\\x01\\x02\\x00\\xff\\xff\\xff\\x7f" + bytes(4)
    >>> one, five = (b"II*\\x00\\x08\\x00\\x00\\x00" + bytes([n, 0]) + n * wild for n in (1, 5))
    >>> tags_fit(one), tags_fit(one, cut_off=True), tags_fit(five, cut_off=True)
    (False, True, False)
    """
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None or len(block) < 16:
        return True
    if block[2:4] in (b"+\0", b"\0+"):
        place, head, entry = struct.unpack_from(f"{order}Q", block, 8)[0], f"{order}Q", f"{order}HHQ8x"
    else:
        place, head, entry = struct.unpack_from(f"{order}L", block, 4)[0], f"{order}H", f"{order}HHL4x"
    if place + struct.calcsize(head) > len(block):
        return True
    count, size = struct.unpack_from(head, block, place)[0], struct.calcsize(entry)
    place += struct.calcsize(head)
    count = min(count, (len(block) - place) // size)
    entries = struct.iter_unpack(entry, block[place : place + count * size])
    sizes = (_TAG_SIZES.get(kind, 1) * number for _, kind, number in entries)
    return sum(min(size, len(block)) if cut_off else size for size in sizes) <= 4 * len(block)


def plain_png(content: bytes, metadata: bool) -> bytes:
    """A PNG file without what is not pixels; any other file as it is.

    Text chunks that are too long, and checksums that are wrong, would cost the whole image otherwise. Animations lose
    all but their first frame.

    Args:
        content: of the file.
        metadata: whether sound EXIF and XMP stay, which say which side is up.

    Source: PNG (third edition), section 5.
    """
    if not content.startswith(_PNG):
        return content
    kept, place = [_PNG], len(_PNG)
    while place + 12 <= len(content):
        length, kind = int.from_bytes(content[place : place + 4]), content[place + 4 : place + 8]
        end = place + 12 + length
        most = _LARGEST_EXIF if kind == b"eXIf" else _LARGEST_BLOCK
        if kind in _PIXELS or kind[:1].isupper() or (metadata and length <= most and _turns(content, place)):
            kept.append(content[place:end])
        elif not kind.isalpha():
            break
        place = end
        if kind == b"IEND":
            return b"".join(kept)
    return b"".join([*kept, content[place:]])


def _turns(content: bytes, place: int) -> bool:
    """Whether the chunk of a PNG at this place is whole, and may say which side of the image is up."""
    length, kind = int.from_bytes(content[place : place + 4]), content[place + 4 : place + 8]
    data = content[place + 8 : place + 8 + length]
    sound = zlib.crc32(kind + data).to_bytes(4) == content[place + 8 + length : place + 12 + length]
    return sound and (kind == b"eXIf" or (kind in (b"tEXt", b"zTXt", b"iTXt") and data.startswith(_TURNED_BY)))
