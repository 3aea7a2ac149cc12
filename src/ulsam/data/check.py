"""What is wrong with an image folder, or a table of images: broken, duplicate and leaked images, odd classes."""

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ulsam.base.errors import UlsamError
from ulsam.base.logs import progress
from ulsam.data.folder import imbalance_note
from ulsam.data.images import Pixels, UnreadableImage, read_pixels
from ulsam.data.labelled import labelled
from ulsam.data.splits import is_no_class

NEAR = 12
"""Bits of 256 in which the difference hashes of two images differ at most if they may be the same image."""

ALIKE = 12.0
"""And the mean difference of their thumbnails, in steps of 0 to 255."""

MAX_COMPARED = 60_000
"""Images that are compared with each other by their looks; of more, only identical ones are found."""

FEW = 5  # images of a class that are too few to learn from
_SIDE = 16


class ImagePair(NamedTuple):
    """Two images that look the same."""

    first: str
    second: str
    identical: bool  # pixel for pixel


@dataclass(frozen=True)
class Checked:
    """What was found.

    Attributes:
        splits: by their names, "all" of a folder without any: the number of images of each class.
        images: of each split; fewer than the sum over its classes, where an image may have several labels.
        sides: least, median and largest of the images' shorter sides, in pixels; None if none could be read.
        broken: why an image cannot be read, a line each.
        duplicates: pairs within one split and one class.
        leaks: pairs of images of two splits.
        conflicts: pairs of one split whose classes, or labels, differ.
        notes: what else is noteworthy, a line each.
        refused: why training on it is refused; None if it is not.
    """

    splits: Mapping[str, Mapping[str, int]]
    images: Mapping[str, int]
    sides: tuple[int, int, int] | None
    broken: tuple[str, ...]
    duplicates: tuple[ImagePair, ...]
    leaks: tuple[ImagePair, ...]
    conflicts: tuple[ImagePair, ...]
    notes: tuple[str, ...]
    refused: str | None = None


class _ImageFacts(NamedTuple):
    side: int
    digest: bytes
    hash: NDArray[np.uint64]  # [4]
    thumbnail: NDArray[np.int16]


def check(
    data: str | os.PathLike[str], workers: int | None = None, *, data_dir: str | os.PathLike[str] | None = None
) -> Checked:
    """Read every image of an image folder or a table, and compare them all.

    Two images are identical if their pixels are. They look the same if their difference hashes are near (N. Krawetz,
    "Kind of like that", 2013, with 16 x 16 bits), and their thumbnails too: a copy of another size or quality, not one
    that is cropped or mirrored.

    Args:
        data: an image folder, with splits or without; or a CSV of paths and labels.
        workers: threads that read images; by default one a core.
        data_dir: where the paths in a CSV count from; by default its folder.

    Raises:
        UlsamError: as of `ulsam.data.labelled.labelled`.
    """
    source = labelled(data, data_dir=data_dir)
    folders = {name: source.read(name, min_classes=1) for name in source.splits or ("all",)}
    images = [(path, name, folder.words(label)) for name, folder in folders.items() for path, label in folder.samples]
    notes = [
        f"{name}/: {len(folder.ignored)} files are no images by name, such as {os.path.basename(folder.ignored[0])}"
        for name, folder in folders.items()
        if folder.ignored
    ]
    notes += [source.note] if source.note else []
    splits = {name: dict(zip(folder.classes, folder.counts(), strict=True)) for name, folder in folders.items()}
    broken: list[str] = []
    seen: dict[int, _ImageFacts] = {}
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        results = pool.map(_look, [path for path, _, _ in images])
        for number, result in enumerate(progress(results, total=len(images), unit=" images")):
            if isinstance(result, str):
                broken.append(result)
            else:
                seen[number] = result
    pairs = [(images[one], images[two], same) for one, two, same in _pairs(seen)]
    if len(seen) > MAX_COMPARED:
        notes.append(f"{len(seen)} images are too many to compare by their looks: only identical ones were looked for")
    kinds: dict[str, list[ImagePair]] = {"leak": [], "conflict": [], "duplicate": []}
    for one, two, same in pairs:
        kind = "leak" if one[1] != two[1] else "conflict" if one[2] != two[2] else "duplicate"
        kinds[kind].append(ImagePair(one[0], two[0], same))
    sides = sorted(one.side for one in seen.values())
    return Checked(
        splits,
        {name: len(folder.samples) for name, folder in folders.items()},
        (sides[0], sides[len(sides) // 2], sides[-1]) if sides else None,
        tuple(broken),
        tuple(kinds["duplicate"]),
        tuple(kinds["leak"]),
        tuple(kinds["conflict"]),
        (*notes, *class_notes(splits, several=source.several)),
        _refused(data, data_dir),
    )


def _refused(data: str | os.PathLike[str], data_dir: str | os.PathLike[str] | None) -> str | None:
    from ulsam.data.opening import open_data  # with PyTorch

    try:
        open_data(os.fspath(data), data_dir=None if data_dir is None else os.fspath(data_dir))
    except UlsamError as error:
        return str(error)
    return None


def class_notes(splits: Mapping[str, Mapping[str, int]], *, several: bool = False) -> list[str]:
    """What is odd about the classes and their numbers, a line each; ``several`` labels an image are never balanced.

    >>> class_notes({"train": {"Wren": 9, "wren ": 8, "new folder": 9}, "test": {"Wren": 2, "tit": 3}})
    ['classes that differ in case, blanks or signs alone: Wren, wren ', \
"classes that are called like no class: 'new folder'", 'classes of test/ that train/ lacks: tit', \
'classes of train/ that test/ lacks: wren , new folder']
    """
    notes = []
    first = next(iter(splits))
    names = list(dict.fromkeys(name for counts in splits.values() for name in counts))
    alike: dict[str, list[str]] = defaultdict(list)
    for name in names:
        alike[re.sub(r"[\W_]+", "", name).casefold() or name].append(name)
    for group in alike.values():
        if len(group) > 1:
            notes.append(f"classes that differ in case, blanks or signs alone: {', '.join(group)}")
    if odd := [name for name in names if is_no_class(name)]:
        notes.append(f"classes that are called like no class: {', '.join(map(repr, odd))}")
    for split, counts in list(splits.items())[1:]:
        for here, there, lacks in ((counts, splits[first], first), (splits[first], counts, split)):
            if missing := [name for name in here if name not in there]:
                whose = split if lacks == first else first
                notes.append(f"classes of {whose}/ that {lacks}/ lacks: {_some(missing)}")
    if few := [f"{name} ({count})" for name, count in splits[first].items() if count < FEW]:
        notes.append(f"classes with fewer than {FEW} images: {_some(few)}")
    if not several and (note := imbalance_note(list(splits[first]), list(splits[first].values()))):
        notes.append(note)
    return notes


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _look(path: str) -> _ImageFacts | str:
    try:
        pixels = read_pixels(path)
    except UnreadableImage as error:
        return str(error)
    content = pixels.tobytes()
    if path.lower().endswith((".tif", ".tiff")):  # its other pages and bands are not in the pixels
        content = Path(path).read_bytes()
    digest = hashlib.sha256(repr(pixels.shape).encode() + content).digest()
    return _ImageFacts(min(pixels.shape[:2]), digest, *difference_hash(pixels))


def difference_hash(pixels: Pixels) -> tuple[NDArray[np.uint64], NDArray[np.int16]]:
    """256 bits, whether each of 16 x 16 points of the image is darker than its right neighbor; and a thumbnail.

    >>> bits, thumbnail = difference_hash(np.tile(np.arange(0, 255, 5, np.uint8)[:, None], (51, 1, 3)))
    >>> int(np.bitwise_count(bits).sum()), thumbnail.shape
    (256, (8, 8, 3))
    """
    image = Image.fromarray(pixels)
    gray = np.asarray(image.convert("L").resize((_SIDE + 1, _SIDE), Image.Resampling.BOX), np.int16)
    bits = np.packbits(gray[:, 1:] > gray[:, :-1]).view(np.uint64)
    return bits, np.asarray(image.resize((8, 8), Image.Resampling.BOX), np.int16)


def _pairs(seen: Mapping[int, _ImageFacts]) -> Iterator[tuple[int, int, bool]]:
    """Numbers of images that look the same, the smaller one first, and whether they are identical."""
    numbers = sorted(seen)
    groups: dict[bytes, list[int]] = defaultdict(list)
    for number in numbers:
        groups[seen[number].digest].append(number)
    for group in groups.values():
        yield from ((group[0], other, True) for other in group[1:])
    distinct = [group[0] for group in groups.values() if np.ptp(seen[group[0]].thumbnail) > ALIKE]  # no plain colors
    if len(numbers) > MAX_COMPARED or not distinct:
        return
    hashes = np.stack([seen[number].hash for number in distinct])
    for row, number in enumerate(distinct[:-1]):
        distance = np.bitwise_count(hashes[row + 1 :] ^ hashes[row]).sum(1)
        for near in np.flatnonzero(distance <= NEAR):
            other = distinct[row + 1 + int(near)]
            if np.abs(seen[number].thumbnail - seen[other].thumbnail).mean() <= ALIKE:
                yield number, other, False


def entry(checked: Checked) -> dict[str, Any]:
    """All of it as JSON."""
    pairs = {name: [one._asdict() for one in getattr(checked, name)] for name in ("duplicates", "leaks", "conflicts")}
    return {
        "splits": {name: dict(counts) for name, counts in checked.splits.items()},
        "images": dict(checked.images),
        "shorter_side": checked.sides and dict(zip(("least", "median", "largest"), checked.sides, strict=True)),
        "broken": list(checked.broken),
        **pairs,
        "notes": list(checked.notes),
        "refused": checked.refused,
    }
