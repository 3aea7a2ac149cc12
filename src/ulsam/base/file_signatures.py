"""What a file is that was taken for another one, by its first bytes: its name, and what to do with it."""

_CONVERT = "convert it to JPEG or PNG"
_KINDS = (  # where, what stands there, the format, the remedy
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes it", "only weights of PyTorch are read"),
    (4, b"TFL3", "a TFLite model", "name the model that it was made from"),
    (0, b"\xff\xd8\xff", "an image (JPEG)", "it was named in another file's place"),
    (0, b"\x89PNG\r\n\x1a\n", "an image (PNG)", "it was named in another file's place"),
    (0, b"%PDF", "a PDF document", _CONVERT),
    (0, b"8BPS", "a Photoshop file", _CONVERT),
    (0, b"\xff\x0a", "JPEG XL", _CONVERT),
    (4, b"JXL ", "JPEG XL", _CONVERT),
    (0, b"version https://git-lfs", "a pointer of Git LFS to the file", "get the file itself by git lfs pull"),
    (0, b"<svg", "an SVG drawing", _CONVERT),
    (0, b"<?xml", "an XML file", "name the file that was meant"),
    (0, b"<!doctype html", "a web page", "the download failed: get the file again"),
    (0, b"<html", "a web page", "the download failed: get the file again"),
)
_HEIF = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_AVIF = (b"avif", b"avis")


def kind_of(content: bytes) -> str | None:
    """The format of a file and the remedy, by its first 64 bytes or more; None where that is not known.

    >>> kind_of(b"\\0\\0\\0\\x18ftypheic\\0\\0\\0\\0mif1heic")
    'HEIC, which is not read: convert it to JPEG or PNG'
    >>> kind_of(b"a text")
    """
    if content[4:8] == b"ftyp":  # ISO 14496-12: the size of the box, then the major brand, a version, all brands
        brands = [content[place : place + 4] for place in (8, *range(16, min(int.from_bytes(content[:4]), 64), 4))]
        if any(brand in _AVIF for brand in brands):
            return "AVIF, which this version of Pillow does not read: pip install 'pillow>=11.3', or " + _CONVERT
        name = "HEIC" if any(brand in _HEIF for brand in brands) else "a video, or another MP4 file"
        return f"{name}, which is not read: {_CONVERT}"
    start = content[:64].lstrip(b"\xef\xbb\xbf \r\n\t") if content[:1] not in (b"\xff", b"\x89") else content
    for place, magic, name, remedy in _KINDS:
        if start[place : place + len(magic)].lower() == magic.lower():
            return f"{name}: {remedy}"
    return None
