"""A CSV of image paths and classes as an image folder."""

import os
import re
import shutil
from pathlib import Path

from ulsam.base.errors import UlsamError, a_few
from ulsam.base.files import check_empty, whole_folder
from ulsam.base.logs import progress
from ulsam.data.label_table import LABELS, PATHS, columns, image_file, read_cells
from ulsam.data.split_column import row_split


def prepare_table(table: str | os.PathLike[str], out: str | os.PathLike[str]) -> dict[str, int]:
    """Copy the images that a CSV names to ``out/CLASS/FILE``, or with a column of splits to ``out/SPLIT/CLASS/FILE``.

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
    check_empty(out)
    header, rows = read_cells(table)
    layout = columns(header, [row for _, row in rows], table)
    if layout is None or layout.label is None or layout.sets:
        raise UlsamError(
            f"{table} needs a header with a column for the path ({', '.join(PATHS[:3])}, ...) and one for the class "
            f"({', '.join(LABELS[:3])}, ...); it has {a_few(header) if header else 'none'}"
        )
    copies: dict[Path, Path] = {}
    for number, row in rows:
        path, label = row[layout.path].strip(), row[layout.label].strip()
        if not label or label.startswith(".") or Path(label).name != label or "\\" in label:
            raise UlsamError(f"{table}, row {number}: {label!r} is no name of a folder")
        split = row_split(table, number, row, layout.split)
        source = image_file(table.parent, path)
        if source is None:
            raise UlsamError(f"{table}, row {number}: no image {table.parent / path}")
        target = Path(split or "", label, re.sub(r"[/\\:]", "_", os.path.relpath(source, table.parent).lstrip("./\\")))
        if target in copies:
            raise UlsamError(f"{table}, row {number}: {path} was there before")
        copies[target] = Path(source)
    try:
        with whole_folder(out) as part:
            for target, source in progress(copies.items(), unit=" images"):
                (part / target).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, part / target)
    except OSError as error:
        raise UlsamError(f"cannot make {out}: {error}") from error
    return {"images": len(copies), "classes": len({target.parent.name for target in copies})}
