"""Folders that are laid out otherwise than `ulsam train` reads them: what they are, and what to do."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ulsam.base.errors import UlsamError
from ulsam.data.folder import IMAGE_SUFFIXES
from ulsam.data.label_table import columns, read_cells
from ulsam.data.prepare import OFFICIAL
from ulsam.data.splits import find_splits, mistaken_splits, split_of


def advice(root: str | os.PathLike[str]) -> str | None:
    """What a folder is that holds no class folders at the right level, and the remedy; None for a proper one.

    Raises:
        UlsamError: there is no such folder, or it may not be listed.
    """
    root = Path(root)
    splits = find_splits(root)
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    for name, official in OFFICIAL.items():
        base = root / official.root if official.root and (root / official.root).is_dir() else root
        if all((base / file).exists() for file in official.lists):
            return f"{official.title} as it is published: ulsam prepare {name} {root} OUT"
    if yolo := _yolo(root, {path.name.lower() for path in folders}):
        return yolo
    if mistaken := mistaken_splits(root):
        return mistaken
    if splits:
        return None
    if not folders and _holds_images(root):
        return _table(root) or f"images without class folders: did you mean {root.resolve().parent}?"
    if len(folders) == 1 and not _holds_images(folders[0]):
        (only,) = folders
        if split_of(only.name):
            return f"{only.name} lies alone in it: did you mean {only}?"
        if find_splits(only) or any(map(_holds_images, _folders(only))):
            return f"the class folders lie one level deeper: did you mean {only}?"
    return None if any(map(_holds_images, folders)) else _table(root)


def misread(root: str | os.PathLike[str]) -> str | None:
    """What a folder is of which a wrong part would be taken for the classes, and the remedy; None for others.

    Raises:
        UlsamError: there is no such folder, it may not be listed, or two folders claim the same split.
    """
    return mistaken_splits(root)


@contextmanager
def with_advice(root: str | os.PathLike[str]) -> Iterator[None]:
    """Within it an UlsamError about the folder ends with :func:`advice`, if there is any."""
    try:
        yield
    except UlsamError as error:
        found = advice(root) if os.path.isdir(root) else None
        if found is None:
            raise
        raise UlsamError(f"{str(error).partition(': expected')[0]}; {found}") from error


def check_layout(root: str | os.PathLike[str]) -> None:
    """Raise UlsamError with :func:`advice`, if there is any."""
    if found := advice(root):
        raise UlsamError(f"{os.fspath(root)}: {found}")


def _yolo(root: Path, folders: set[str]) -> str | None:
    """Whether the folder holds boxes for YOLO: images/ beside labels/ with a .txt for each image."""
    inside = [root / name for name in folders if (root / name / "labels").is_dir()]
    places = [root] if {"images", "labels"} <= folders else inside
    for place in places:
        if (place / "images").is_dir() and next((place / "labels").rglob("*.txt"), None):
            return (
                "images with boxes, as YOLO detects objects: train a detector on them, see ulsam.ultralytics; to "
                "classify, put each image into a folder of its class"
            )
    return None


def _table(root: Path) -> str | None:
    """Whether a CSV file in the folder names images and their classes."""
    for file in sorted(root.glob("*.csv")):
        try:
            header, _ = read_cells(file)
        except UlsamError:  # it is about something else
            continue
        if (found := columns(header)) and found.label is not None:
            path, label = header[found.path], header[found.label]
            return f"labels in {file.name}, columns {path} and {label}: name the file itself, {file}"
    return None


def _folders(path: Path) -> list[Path]:
    return [one for one in path.iterdir() if one.is_dir() and not one.name.startswith(".")]


def _holds_images(path: Path) -> bool:
    """Whether images lie directly in a folder."""
    with os.scandir(path) as entries:
        return any(one.name.lower().endswith(IMAGE_SUFFIXES) and one.is_file() for one in entries)
