"""Folders that are laid out otherwise than `ulsam train` reads them: what they are, and what to do."""

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ulsam.base.errors import UlsamError
from ulsam.data.boxes import boxes_advice
from ulsam.data.folder import holds_images, subfolders
from ulsam.data.label_table import columns, image_file, read_cells, read_table
from ulsam.data.prepare import OFFICIAL
from ulsam.data.splits import find_splits, has_classes, is_no_class, mistaken_splits, split_of


def advice(root: str | os.PathLike[str]) -> str | None:
    """What a folder is that holds no class folders at the right level, and the remedy; None for a proper one.

    Raises:
        UlsamError: there is no such folder, or it may not be listed.
    """
    root = Path(root)
    for name, official in OFFICIAL.items():
        base = root / official.root if official.root and (root / official.root).is_dir() else root
        if all((base / file).exists() for file in official.lists):
            return f"{official.title} as it is published: ulsam prepare {name} {root} OUT"
    if found := misread(root):
        return found
    folders = _folders(root)
    if find_splits(root):
        return None
    table = next((table for table, _ in _tables(root)), None)
    if not folders and (root / "config.yaml").is_file() and (root / "metrics.csv").is_file():
        return "the folder of a training run, which holds no images to learn from"
    if not folders and holds_images(root):
        return table or _parent(root)
    if len(folders) == 1 and split_of(folders[0].name) and not holds_images(folders[0]):
        return f"{folders[0].name} lies alone in it: did you mean {folders[0]}?"
    inside, place = folders, root
    while len(inside) == 1 and not holds_images(inside[0]):
        place, inside = inside[0], _folders(inside[0])
        if find_splits(place) or len([one for one in inside if holds_images(one)]) > 1:
            depth = len(place.relative_to(root).parts)
            levels = "one level" if depth == 1 else f"{depth} levels"
            return f"the class folders lie {levels} deeper: did you mean {place}?"
    return None if any(map(holds_images, folders)) else table


def misread(data: str | os.PathLike[str]) -> str | None:
    """What a folder is of which a wrong part would be taken for the classes, and the remedy; None for others.

    That is a folder of images with boxes, one of images and a table, or one with splits that are not read as such.

    Args:
        data: the folder; or a file, which may be the YAML of images with boxes.

    Raises:
        UlsamError: the folder may not be listed, or two folders claim the same split.
    """
    if found := boxes_advice(data):
        return found
    if not os.path.isdir(data):
        return None
    mistaken = mistaken_splits(data)
    if has_classes(data):  # then no table overrules them, and none needs to be read
        return mistaken
    return next((table for table, mixed in _tables(Path(data)) if mixed), mistaken)


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
    if found := advice(root) if os.path.isdir(root) else misread(root):
        raise UlsamError(f"{os.fspath(root)}: {found}")


def _tables(root: Path) -> Iterator[tuple[str, bool]]:
    """About each CSV in the folder that names images and their labels: the command, and whether folders mix labels."""
    for file in sorted(root.glob("*.[ct]sv")):
        rows = _rows(file)
        if not rows:
            continue
        place = next((place for place in _places(root) if image_file(place, rows[0][0])), None)
        pairs = {(os.path.dirname(path), label) for path, label in rows}
        mixed = place is not None and len(pairs) > len({folder for folder, _ in pairs})
        beside = f" --data-dir {shlex.quote(str(place))}" if place not in (None, root) else ""
        command = f"ulsam train {shlex.quote(str(file))}{beside}"
        yield f"labels in {file.name}: name the file itself, {command}", mixed


def _rows(file: Path) -> list[tuple[str, str]]:
    """The path and the label, or labels, of each row of a table; none if it is about something else."""
    try:
        header, cells = read_cells(file)
        found = columns(header)
        if found and found.label is None:  # a column for each class, if they hold 0 and 1
            return [(row.path.replace("\\", "/"), ";".join(row.labels)) for row in read_table(file).rows]
    except UlsamError:
        return []
    if found is None or found.label is None:
        return []
    return [(row[found.path].strip().replace("\\", "/"), row[found.label].strip()) for _, row in cells]


def _places(root: Path) -> Iterator[Path]:
    """Folders that the paths in a table may count from: this one, and those of two levels below."""
    yield root
    folders = _folders(root)
    yield from folders
    for folder in folders[:20]:
        yield from _folders(folder)


def _parent(root: Path) -> str:
    """About a folder of images alone: whether it is a class folder beside others."""
    parent = root.resolve().parent
    try:
        classes = [one for one in _folders(parent) if not is_no_class(one.name) and holds_images(one)]
    except UlsamError:  # closed to the user
        classes = []
    if len(classes) > 1 and not is_no_class(root.resolve().name):
        return f"images without class folders: did you mean {parent}?"
    return "images without class folders: sort them into one folder a class, or name a CSV of paths and labels"


def _folders(path: Path) -> list[Path]:
    return [path / name for name in subfolders(path)]
