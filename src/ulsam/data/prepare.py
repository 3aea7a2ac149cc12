"""Official archives as image folders: Food-101, Stanford Dogs and CUB-200-2011, each with its official split.

Home pages:
    Food-101: https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/
    Stanford Dogs: http://vision.stanford.edu/aditya86/ImageNetDogs/
    CUB-200-2011: https://www.vision.caltech.edu/datasets/cub_200_2011/
"""

import dataclasses
import gzip
import io
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, cast

from ulsam.base.errors import UlsamError
from ulsam.base.extras import extra
from ulsam.base.files import check_empty, check_readable, whole_folder
from ulsam.base.logs import progress

Split = dict[str, str]
"""``CLASS/FILE`` of an image to ``train`` or ``test``."""


@dataclasses.dataclass(frozen=True)
class DatasetArchive:
    """How a data set is published.

    Attributes:
        title: the name people know it by.
        archives: the files to download.
        root: the folder that everything in the archive lies in, or ``""``.
        images: where the class folders are, below `root`.
        lists: the files that hold the split, below `root`.
        read: from the contents of `lists` to the split.
        counts: official numbers of train images, test images and classes.
    """

    title: str
    archives: tuple[str, ...]
    root: str
    images: str
    lists: tuple[str, ...]
    read: Callable[[Sequence[bytes]], Split]
    counts: dict[str, int]


def _read_food101(lists: Sequence[bytes]) -> Split:
    """meta/train.txt and meta/test.txt: a line ``class/id`` each."""
    return {
        f"{line.strip()}.jpg": split
        for split, content in zip(("train", "test"), lists, strict=True)
        for line in content.decode().splitlines()
        if line.strip()
    }


def _read_dogs(lists: Sequence[bytes]) -> Split:
    """train_list.mat and test_list.mat: MATLAB files whose cell array ``file_list`` holds ``class/file``."""
    from scipy.io import loadmat

    return {
        str(cell.item()): split
        for split, content in zip(("train", "test"), lists, strict=True)
        for cell in loadmat(io.BytesIO(content), variable_names=["file_list"])["file_list"].ravel()
    }


def _read_cub200(lists: Sequence[bytes]) -> Split:
    """images.txt: ``id class/file``; train_test_split.txt: ``id is_train``."""
    names, is_train = (dict(line.split() for line in text.decode().splitlines() if line.strip()) for text in lists)
    return {name: {"1": "train", "0": "test"}[is_train[number]] for number, name in names.items()}


OFFICIAL = {
    "food101": DatasetArchive(
        title="Food-101",
        archives=("food-101.tar.gz",),
        root="food-101",
        images="images",
        lists=("meta/train.txt", "meta/test.txt"),
        read=_read_food101,
        counts={"train": 75750, "test": 25250, "classes": 101},
    ),
    "dogs": DatasetArchive(
        title="Stanford Dogs",
        archives=("images.tar", "lists.tar"),
        root="",
        images="Images",
        lists=("train_list.mat", "test_list.mat"),
        read=_read_dogs,
        counts={"train": 12000, "test": 8580, "classes": 120},
    ),
    "cub200": DatasetArchive(
        title="CUB-200-2011",
        archives=("CUB_200_2011.tgz",),
        root="CUB_200_2011",
        images="images",
        lists=("images.txt", "train_test_split.txt"),
        read=_read_cub200,
        counts={"train": 5994, "test": 5794, "classes": 200},
    ),
}


def prepare(
    name: str,
    archives: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
) -> dict[str, int]:
    """Write ``out/train/CLASS/FILE`` and ``out/test/CLASS/FILE`` by the official split of a data set.

    Class folders and files keep the names they have in the archive. The archive decides on no path: only regular files
    at the one place where the data set keeps its images are read, links and all else are passed over. All is written
    to a hidden folder beside `out`, which takes the name `out` when it is complete.

    Args:
        name: ``food101``, ``dogs`` or ``cub200``.
        archives: the official archives, or the folders they were unpacked to.
        out: the folder to make; it may exist if it is empty.

    Returns:
        How many images and classes were written: ``{"train": ..., "test": ..., "classes": ...}``.

    Raises:
        UlsamError: unknown name; an archive that is missing, damaged or another one; `out` is not empty; an image of
            the split that is not in the archive (the first is named); no scipy to read the lists of ``dogs``; a disk
            that is full.
    """
    if name not in OFFICIAL:
        raise UlsamError(f"no data set is called {name}; there are {', '.join(OFFICIAL)}")
    official = OFFICIAL[name]
    sources = [Path(path) for path in ([archives] if isinstance(archives, str | os.PathLike) else archives)]
    for source in sources:
        if not source.exists():
            raise UlsamError(f"no such file or folder: {source}; {_expected(official)}")
    if name == "dogs":
        with extra("dogs", "the lists of Stanford Dogs are MATLAB files, which are read with"):
            import scipy.io  # noqa: F401
    out = Path(os.path.abspath(out))
    check_empty(out)
    try:
        with whole_folder(out) as partial:
            return _write(official, sources, partial)
    except OSError as error:
        raise UlsamError(f"cannot make {out}: {error}") from error


def mismatch(name: str, counts: dict[str, int]) -> str | None:
    """One line if the counts that `prepare` returned are not the official ones of data set `name`, else None.

    >>> mismatch("cub200", {"train": 5994, "test": 5790, "classes": 200})
    'CUB-200-2011 officially has 5994 train and 5794 test images of 200 classes: the archive is not the official one'
    >>> mismatch("cub200", {"train": 5994, "test": 5794, "classes": 200}) is None
    True
    """
    official = OFFICIAL[name]
    if counts == official.counts:
        return None
    return "{} officially has {train} train and {test} test images of {classes} classes: {}".format(
        official.title, "the archive is not the official one", **official.counts
    )


def _expected(official: DatasetArchive) -> str:
    return f"{official.title} is made from {' and '.join(official.archives)}, or the folders they unpack to"


def _write(official: DatasetArchive, sources: Sequence[Path], folder: Path) -> dict[str, int]:
    """Unpack to ``folder/train`` and ``folder/test``; an archive may end with its lists, so sorting comes second."""
    unsorted = folder / "unsorted"
    found, lists = _unpack(official, sources, unsorted)
    for wanted in official.lists:
        if wanted not in lists:
            raise UlsamError(f"no {wanted} in {_names(sources)}: {_expected(official)}")
    split = _read(official, [lists[wanted] for wanted in official.lists])
    missing = [image for image in split if image not in found]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UlsamError(
            f"{missing[0]}{more} of the official split not found in {_names(sources)}, cut off or not the official"
            f" archive: {_expected(official)}"
        )
    for image, part in split.items():
        target = folder / part / image
        target.parent.mkdir(parents=True, exist_ok=True)
        (unsorted / image).rename(target)
    shutil.rmtree(unsorted)
    parts = list(split.values())
    classes = {image.split("/")[0] for image in split}
    return {"train": parts.count("train"), "test": parts.count("test"), "classes": len(classes)}


def _unpack(official: DatasetArchive, sources: Sequence[Path], folder: Path) -> tuple[set[str], dict[str, bytes]]:
    """Copy every image to ``folder/CLASS/FILE``; returns their ``CLASS/FILE`` and the contents of the lists."""
    images: set[str] = set()
    lists: dict[str, bytes] = {}
    total = official.counts["train"] + official.counts["test"]
    with progress(total=total, unit=" images", desc=official.title, leave=True) as bar:
        for source in sources:
            files = _folder_files if source.is_dir() else _archive_files
            try:
                for path, file in files(official, source):
                    if wanted := next((name for name in official.lists if f"/{path}".endswith(f"/{name}")), None):
                        lists[wanted] = file.read()
                    elif image := _image(official, path):
                        target = folder / image
                        target.parent.mkdir(parents=True, exist_ok=True)
                        with open(target, "wb") as copy:
                            shutil.copyfileobj(file, copy)
                        images.add(image)
                        bar.update()
            except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
                raise UlsamError(f"{source} is cut off, damaged or no tar archive: download it again") from error
    return images, lists


def _folder_files(official: DatasetArchive, folder: Path) -> Iterator[tuple[str, BinaryIO]]:
    """Files of an unpacked archive that may matter, open, by their path below `official.root`."""
    base = folder / official.root if (folder / official.root).is_dir() else folder
    patterns = [f"{official.images}/*/*", *official.lists, *(f"*/{name}" for name in official.lists)]
    for pattern in patterns:
        for path in sorted(base.glob(pattern)):
            if path.is_file():
                with open(path, "rb") as file:
                    yield path.relative_to(base).as_posix(), file


def _archive_files(official: DatasetArchive, archive: Path) -> Iterator[tuple[str, BinaryIO]]:
    """Regular files of an archive, open, in its order, by their path below `official.root`."""
    inside = f"{official.root}/" if official.root else ""
    check_readable(archive, "archive")
    with tarfile.open(archive) as tar:
        for member in tar:
            path = member.name.removeprefix("./")
            file = tar.extractfile(member) if member.isreg() and path.startswith(inside) else None
            if file:
                yield path.removeprefix(inside), cast(BinaryIO, file)


def _image(official: DatasetArchive, path: str) -> str | None:
    """``CLASS/FILE`` if the path is where the data set keeps its images and cannot lead anywhere else."""
    inside = f"{official.images}/"
    parts = path.removeprefix(inside).split("/")
    plain = all(part and not part.startswith(".") and Path(part).name == part for part in parts)
    return "/".join(parts) if path.startswith(inside) and len(parts) == 2 and plain else None


def _read(official: DatasetArchive, lists: Sequence[bytes]) -> Split:
    """The split; whatever the reader of a damaged list raises becomes one line."""
    try:
        split = official.read(lists)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UlsamError(f"{' or '.join(official.lists)} is damaged ({reason}): {_expected(official)}") from error
    if not split:
        raise UlsamError(f"{' and '.join(official.lists)} name no images: {_expected(official)}")
    return split


def _names(sources: Sequence[Path]) -> str:
    return " and ".join(map(str, sources))
