"""Folders of images: which classes there are, which images, which split."""

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ulsam.base.errors import UlsamError
from ulsam.base.logs import WARNING, say
from ulsam.data.sample_list import Sample, SampleList

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".j2k"),
)
"""File name endings (lower case) that mark an image; what is inside decides how it is read."""

UNREAD_SUFFIXES = (".heic", ".heif", ".jxl", ".svg", ".psd", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2")
"""Those that mark an image of a kind that is not read."""

_LAYOUT = "expected one subfolder of images for each class, e.g. {root}/robin/1.jpg and {root}/wren/1.jpg"


@dataclasses.dataclass(frozen=True)
class Folder:
    """What `scan` found.

    Attributes:
        root: the folder that holds the class folders.
        classes: class names, sorted; only those with at least one image.
        samples: (path, class index) by class, then by path within the class; with ``sets`` (path, number of its set).
        ignored: files that were passed over, because their name is no image's name or they lie in no class folder.
        empty: names of class folders without an image.
        sets: where an image may have several labels: which classes each set of labels has, [sets, classes].
    """

    root: Path
    classes: tuple[str, ...]
    samples: SampleList
    ignored: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()
    sets: NDArray[np.bool_] | None = None

    def words(self, label: int) -> str:
        """The label of a sample, or its labels, in words."""
        if self.sets is None:
            return self.classes[label]
        return ";".join(self.classes[number] for number in np.flatnonzero(self.sets[label]))

    def counts(self) -> list[int]:
        """How many images each class has; one of several labels counts for each."""
        if self.sets is None:
            return class_counts(self.samples, len(self.classes))
        return (np.bincount(self.samples.labels, minlength=len(self.sets)) @ self.sets).tolist()


def scan(root: str | os.PathLike[str], min_classes: int = 2) -> Folder:
    """List the classes and images of an image folder, in an order that depends on names alone.

    Each direct subfolder is a class; its images lie at any depth below it. Names with a leading dot are hidden and
    skipped. Links to files and class folders that are links are followed; linked folders further down are not, they
    are listed in `ignored`. Nothing is opened: whether an image can be read shows when it is read.

    Args:
        root: the folder of class folders.
        min_classes: fewest classes that are accepted; 1 for a folder that is only measured on.

    Raises:
        UlsamError: no such folder, no class folders, no images, fewer classes than `min_classes`, or a folder that
            may not be listed.

    >>> import tempfile
    >>> root = Path(tempfile.mkdtemp())
    >>> for name in ("robin/1.jpg", "wren/a/2.PNG", "wren/notes.txt"):
    ...     (root / name).parent.mkdir(parents=True, exist_ok=True)
    ...     (root / name).touch()
    >>> folder = scan(root)
    >>> folder.classes, [label for _, label in folder.samples], len(folder.ignored)
    (('robin', 'wren'), [0, 1], 1)
    """
    root = Path(root)
    names = subfolders(root)
    if not names:
        raise UlsamError(f"{root} has no class folders: {_LAYOUT.format(root=root)}")
    ignored = [str(root / name) for name in sorted(os.listdir(root)) if name not in names and not _hidden(name)]
    classes: list[str] = []

    def found() -> Iterator[Sample]:
        for name in names:
            paths, passed = images_below(root / name)
            ignored.extend(passed)
            yield from ((path, len(classes)) for path in paths)
            classes.extend([name] if paths else [])

    samples = SampleList(found())
    if not classes:
        others = _others(path for path in ignored if os.path.dirname(path) != str(root))
        raise UlsamError(
            f"no image in any of the {len(names)} class folders of {root}: {others or _LAYOUT.format(root=root)}"
        )
    if len(classes) < min_classes:
        raise UlsamError(
            f"{root} holds images of {len(classes)} class ({', '.join(classes)}), at least {min_classes} are needed:"
            f" {_LAYOUT.format(root=root)}"
        )
    empty = tuple(name for name in names if name not in set(classes))
    return Folder(root, tuple(classes), samples, tuple(ignored), empty)


def split(samples: Sequence[Sample], fraction: float, seed: int) -> tuple[SampleList, SampleList]:
    """Hold out a fraction of every class, the same one for the same samples, fraction and seed on any machine.

    A class of two images or more keeps at least one and holds out at least one; a class of one keeps it. Which
    images are held out depends on their position within the class, not on where the folder lies.

    Args:
        samples: (path, class index) pairs.
        fraction: part of each class to hold out, between 0 and 1, both excluded.
        seed: any integer.

    Returns:
        (kept, held out), each in the order of `samples`.

    Raises:
        UlsamError: `fraction` out of range, or no class has two images.

    >>> kept, held_out = split([(f"{n}.jpg", n % 2) for n in range(10)], 0.4, seed=0)
    >>> len(kept), len(held_out), sorted(label for _, label in held_out)
    (6, 4, [0, 0, 1, 1])
    """
    listed = SampleList(samples)
    chosen = held_out(listed.labels, fraction, seed)
    return listed.take(np.flatnonzero(~chosen)), listed.take(np.flatnonzero(chosen))


def held_out(
    labels: NDArray[np.int32], fraction: float, seed: int, fold: tuple[int, int] | None = None
) -> NDArray[np.bool_]:
    """Which images :func:`split` holds out, [N], by the class of each image, [N].

    Args:
        labels, fraction, seed: as of :func:`split`.
        fold: K and N, in place of the fraction: the Kth of N parts of each class. Each image is in one of the parts; a
            class of one image keeps it.

    Raises:
        UlsamError: as of :func:`split`.

    >>> held_out(np.zeros(5, np.int32), 0.4, seed=0).sum()
    np.int64(2)
    >>> sum(held_out(np.zeros(5, np.int32), 0.4, seed=0, fold=(k, 3)) for k in (1, 2, 3)).tolist()
    [1, 1, 1, 1, 1]
    """
    if not 0 < fraction < 1:
        raise UlsamError(f"the fraction to hold out must lie between 0 and 1, both excluded: got {fraction}")
    by_class = np.argsort(labels, kind="stable")
    sizes = np.bincount(labels)
    chosen = np.zeros(len(labels), bool)
    for label, numbers in enumerate(np.split(by_class, np.cumsum(sizes)[:-1])):
        first, last = 0, min(max(int(len(numbers) * fraction + 0.5), 1), len(numbers) - 1)
        if fold is not None and len(numbers) > 1:
            first, last = ((fold[0] - 1) * len(numbers) // fold[1], fold[0] * len(numbers) // fold[1])
        draws = [hashlib.sha256(f"{seed}/{label}/{position}".encode()).digest() for position in range(len(numbers))]
        chosen[[number for _, number in sorted(zip(draws, numbers, strict=True))[first:last]]] = True
    if not chosen.any():
        raise UlsamError("nothing to hold out: no class has two images or more")
    return chosen


def class_counts(samples: Sequence[Sample], n_classes: int) -> list[int]:
    """Images of each class, by class index.

    >>> class_counts([("a", 0), ("b", 2), ("c", 2)], 3)
    [1, 0, 2]
    """
    return np.bincount(SampleList(samples).labels, minlength=n_classes).tolist()


def imbalance_note(classes: Sequence[str], counts: Sequence[int]) -> str | None:
    """One line if the largest class has at least 5 times the images of the smallest, else None.

    >>> imbalance_note(["robin", "wren"], [12, 400])
    'imbalanced: 12 (robin) to 400 (wren) images a class, ratio 33; consider `sampler=balanced`'
    >>> imbalance_note(["robin", "wren"], [12, 40]) is None
    True
    """
    few, many = min(counts), max(counts)
    if many < 5 * few or many == 0:
        return None
    ratio = f", ratio {many / few:.0f}" if few else ""
    smallest, largest = classes[counts.index(few)], classes[counts.index(many)]
    return f"imbalanced: {few} ({smallest}) to {many} ({largest}) images a class{ratio}; consider `sampler=balanced`"


def _hidden(name: str) -> bool:
    return name.startswith(".")


def _cannot_list(error: OSError) -> UlsamError:
    return UlsamError(f"cannot list the folder {error.filename}: {(error.strerror or str(error)).lower()}")


def subfolders(root: str | os.PathLike[str]) -> list[str]:
    """Names of the direct subfolders that are not hidden, sorted.

    Raises:
        UlsamError: no such folder, or one that may not be listed.

    >>> import tempfile
    >>> subfolders(tempfile.mkdtemp())
    []
    """
    root = Path(root)
    try:
        if not root.exists():
            raise UlsamError(f"no such folder: {root}")
        if not root.is_dir():
            raise UlsamError(f"not a folder: {root}; name the folder that holds the class folders")
        with os.scandir(root) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not _hidden(entry.name))
    except OSError as error:
        raise _cannot_list(error) from error


def holds_images(folder: str | os.PathLike[str]) -> bool:
    """Whether images lie directly in a folder, by their names.

    Raises:
        UlsamError: the folder may not be listed.

    >>> import tempfile
    >>> holds_images(tempfile.mkdtemp())
    False
    """
    try:
        with os.scandir(folder) as entries:
            return any(one.name.lower().endswith(IMAGE_SUFFIXES) and one.is_file() for one in entries)
    except OSError as error:
        raise _cannot_list(error) from error


def images_below(folder: str | os.PathLike[str]) -> tuple[list[str], list[str]]:
    """(images, files passed over) at any depth below a folder, each sorted by relative path; as :func:`scan`.

    Raises:
        UlsamError: a folder that may not be listed.
    """

    def stop(error: OSError) -> None:
        raise _cannot_list(error) from error

    images, passed = [], []
    for base, folders, files in os.walk(folder, onerror=stop):
        folders[:] = [name for name in folders if not _hidden(name)]
        passed += [path for name in folders if os.path.islink(path := os.path.join(base, name))]
        for name in files:
            path = os.path.join(base, name)
            if _is_image(path):
                images.append(path)
            elif not _hidden(name):
                passed.append(path)
    return sorted(images, key=_order), sorted(passed, key=_order)


def image_paths(names: Sequence[str]) -> list[str]:
    """Image files as they are named, and all images below each folder named.

    Raises:
        UlsamError: a folder without an image, or one that may not be listed.

    >>> image_paths(["b.jpg", "a.jpg"])
    ['b.jpg', 'a.jpg']
    """
    paths: list[str] = []
    for name in names:
        found, passed = images_below(name) if os.path.isdir(name) else ([name], [])
        if not found:
            others = _others(passed)
            raise UlsamError(f"no images in the folder {name}{others and ': '}{others}")
        if note := unread_note(passed):
            say(f"note    {name}: {note}", level=WARNING)
        paths += found
    return paths


def unread_note(files: Iterable[str]) -> str:
    """What to do about files that are images by name, of kinds that are not read; empty if there are none.

    >>> unread_note(["birds/1.HEIC", "birds/2.heic", "birds/notes.txt"])
    '2 .heic files are passed over: convert them to JPEG'
    """
    endings = Counter(ending for path in files if (ending := os.path.splitext(path)[1].lower()) in UNREAD_SUFFIXES)
    kinds = ", ".join(f"{count} {ending} file{'s' * (count > 1)}" for ending, count in sorted(endings.items()))
    return f"{kinds} {'are' if endings.total() > 1 else 'is'} passed over: convert them to JPEG" if kinds else ""


def _others(files: Iterable[str]) -> str:
    """What files are that were looked through for images, in vain; nothing to say if there are none."""
    endings = Counter(os.path.splitext(path)[1].lower() for path in files)
    if not endings:
        return ""
    ending, count = endings.most_common(1)[0]
    remedy = ", which are not read: convert them to JPEG" if ending in UNREAD_SUFFIXES else ", and no images by name"
    return f"it holds {count} files {ending or 'without an ending'}{remedy}"


def _is_image(path: str) -> bool:
    """By its name; a dangling link counts, so that it is reported when read, a pipe or a device does not."""
    stem, suffix = os.path.splitext(os.path.basename(path))
    if suffix.lower() not in IMAGE_SUFFIXES or _hidden(stem):
        return False
    return os.path.isfile(path) or not os.path.exists(path)


def _order(path: str) -> str:
    return Path(path).as_posix()
