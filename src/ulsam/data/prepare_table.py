"""A CSV of image paths and classes as an image folder."""

import csv
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from ulsam.base.errors import UlsamError, a_few
from ulsam.base.files import check_empty, check_readable, whole_folder
from ulsam.base.logs import progress
from ulsam.data.folder import IMAGE_SUFFIXES, SPLITS

PATHS = ("path", "file", "filename", "file_name", "filepath", "image_path", "image", "image_id", "img", "id")
LABELS = ("label", "class_name", "class", "category", "species", "breed", "target", "class_index")


def columns(header: Sequence[str]) -> tuple[int, int, int | None] | None:
    """The places of path, class and, if there is one, split in the header of a table; None if it has no such columns.

    >>> columns(["Id", "Breed"]), columns(["split", "label", "file name"]), columns(["x", "y"])
    ((0, 1, None), (2, 1, 0), None)
    """
    names = [re.sub(r"\W+", "_", name.strip("\ufeff ").lower()) for name in header]
    path, label = (next((names.index(one) for one in known if one in names), None) for known in (PATHS, LABELS))
    if path is None or label is None:
        return None
    return path, label, names.index("split") if "split" in names else None


def prepare_table(table: str | os.PathLike[str], out: str | os.PathLike[str]) -> dict[str, int]:
    """Copy the images that a CSV names to ``out/CLASS/FILE``, or with a column ``split`` to ``out/SPLIT/CLASS/FILE``.

    All is written to a hidden folder beside ``out``, which takes the name ``out`` when it is complete.

    Args:
        table: a CSV with a header, in which one of `PATHS` is an image's path from the table's folder on, with or
            without its ending, and one of `LABELS` its class.
        out: the folder to make; it may exist if it is empty.

    Returns:
        How many images and classes were written: ``{"images": ..., "classes": ...}``.

    Raises:
        UlsamError: no such columns, a class that is no name of a folder, an unknown split, an image that is missing or
            named twice, or a folder that cannot be made.
    """
    table, out = Path(table), Path(os.path.abspath(out))
    check_readable(table, "table")
    check_empty(out)
    with open(table, encoding="utf-8-sig", errors="replace", newline="") as opened:
        rows = [row for row in csv.reader(opened) if row]
    found = columns(rows[0]) if rows else None
    if found is None:
        raise UlsamError(
            f"{table} needs a header with a column for the path ({', '.join(PATHS[:3])}, ...) and one for the class "
            f"({', '.join(LABELS[:3])}, ...); it has {a_few(rows[0]) if rows else 'none'}"
        )
    copies: dict[Path, Path] = {}
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(rows[0]):
            raise UlsamError(f"{table}, row {number}: {len(row)} values, and the header has {len(rows[0])}")
        path, label = row[found[0]].strip(), row[found[1]].strip()
        split = None if found[2] is None else SPLITS.get(row[found[2]].strip().lower())
        if not label or label.startswith(".") or Path(label).name != label or "\\" in label:
            raise UlsamError(f"{table}, row {number}: {label!r} is no name of a folder")
        if found[2] is not None and split is None:
            raise UlsamError(f"{table}, row {number}: the split is {row[found[2]]!r}, not one of {', '.join(SPLITS)}")
        source = _image(table.parent, path)
        if source is None:
            raise UlsamError(f"{table}, row {number}: no image {table.parent / path}")
        target = Path(split or "", label, re.sub(r"[/\\:]", "_", os.path.relpath(source, table.parent).lstrip("./\\")))
        if target in copies:
            raise UlsamError(f"{table}, row {number}: {path} was there before")
        copies[target] = source
    try:
        with whole_folder(out) as part:
            for target, source in progress(copies.items(), unit=" images"):
                (part / target).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, part / target)
    except OSError as error:
        raise UlsamError(f"cannot make {out}: {error}") from error
    return {"images": len(copies), "classes": len({target.parent.name for target in copies})}


def _image(folder: Path, path: str) -> Path | None:
    """The file that a path means, with or without its ending."""
    names = [path] if path.lower().endswith(IMAGE_SUFFIXES) else [f"{path}{ending}" for ending in IMAGE_SUFFIXES]
    return next((folder / name for name in names if (folder / name).is_file()), None)
