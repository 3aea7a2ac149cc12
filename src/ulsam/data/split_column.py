"""The column of a table that gives the split of each image: which one it is, and how its values are read."""

import os
from collections.abc import Sequence
from typing import NamedTuple

from ulsam.base.errors import UlsamError
from ulsam.data.splits import split_of

NAMES = (
    *("split", "dataset_split", "data_split", "train_test_split", "subset", "partition", "phase"),
    *("set", "image_set", "fold", "stage", "usage"),
)
FLAGS = {
    **dict.fromkeys(("is_valid", "is_val", "is_validation"), ("val", "train")),
    **{"is_test": ("test", "train"), "is_train": ("train", "val"), "is_training": ("train", "val")},
}
"""What such columns are called; those of True and False with the splits that these two mean."""

_TRUE, _FALSE = {"true", "1", "1.0", "yes"}, {"false", "0", "0.0", "no"}


class SplitColumn(NamedTuple):
    """The place of the column, and its name in lower case."""

    place: int
    name: str


def split_column(
    names: Sequence[str], cells: Sequence[Sequence[str]], table: str | os.PathLike[str] = "the table"
) -> tuple[SplitColumn | None, list[str]]:
    """The column of splits, and the names of others that are called like one and are not read.

    A column ``split`` is one whatever it holds. Others of `NAMES` need a value that names a split, those of `FLAGS`
    True and False. Under any other name a column is one if all its values name splits, at least two of them.

    Args:
        names: of all columns, in lower case, with ``_`` for blanks; "" for those that hold something else.
        cells: the rows.
        table: its name, for messages.

    Raises:
        UlsamError: two columns give splits, and none is called ``split``.

    >>> split_column(["path", "subset", "fold"], [["a.jpg", "Training", "0"], ["b.jpg", "test", "1"]])
    (SplitColumn(place=1, name='subset'), ['fold'])
    >>> split_column(["path", "is_valid"], [["a.jpg", "True"], ["b.jpg", "False"]])
    (SplitColumn(place=1, name='is_valid'), [])
    """
    called = [SplitColumn(place, name) for place, name in enumerate(names) if name in NAMES or name in FLAGS]
    found = [one for one in called if one.name == "split"][:1]
    if not found:
        found = [one for place, name in enumerate(names) if _gives_splits(one := SplitColumn(place, name), cells)]
    if len(found) > 1:
        raise UlsamError(
            f"{table}: columns {found[0].name} and {found[1].name} both give splits: keep one, or call one split"
        )
    chosen = found[0] if found else None
    return chosen, [one.name for one in called if chosen is None or one.name != chosen.name]


def _gives_splits(column: SplitColumn, cells: Sequence[Sequence[str]]) -> bool:
    if not column.name or not cells:
        return False
    if column.name not in (*NAMES, *FLAGS) and not split_of(cells[0][column.place]):
        return False
    values = {row[column.place].strip().lower() for row in cells}
    if column.name in FLAGS:
        return bool(values & _TRUE and values & _FALSE) and values <= _TRUE | _FALSE
    splits = set(map(split_of, values))
    return splits != {None} if column.name in NAMES else None not in splits and len(splits) > 1


def row_split(table: str | os.PathLike[str], number: int, row: Sequence[str], column: SplitColumn | None) -> str | None:
    """The split that a row of cells names; None for a table without splits.

    Raises:
        UlsamError: the name of no split.

    >>> row_split("labels.csv", 2, ["a.jpg", "wren", "Valid"], SplitColumn(2, "split"))
    'val'
    >>> row_split("labels.csv", 2, ["a.jpg", "wren", "0"], SplitColumn(2, "is_valid"))
    'train'
    """
    if column is None:
        return None
    cell = row[column.place].strip()
    if column.name in FLAGS:
        return FLAGS[column.name][cell.lower() in _FALSE]
    split = split_of(cell)
    if split is None:
        raise UlsamError(f"{table}, row {number}: the {column.name} is {cell!r}, not one of train, val, test")
    return split


def split_note(column: SplitColumn | None, unread: Sequence[str]) -> list[str]:
    """What to say about the columns that :func:`split_column` found, a line each.

    >>> split_note(SplitColumn(1, "subset"), ["fold"])
    ['column subset gives the splits', 'column fold is not read']
    >>> split_note(None, ["fold"])
    ['column fold is not read: a column split holds train, val or test']
    """
    notes = [f"column {column.name} gives the splits"] if column and column.name != "split" else []
    why = "" if column else ": a column split holds train, val or test"
    return [*notes, *(f"column {name} is not read{why}" for name in unread)]
