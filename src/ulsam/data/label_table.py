"""A CSV of image paths and labels, which is read in place of an image folder."""

import ast
import csv
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ulsam.base.errors import UlsamError, a_few
from ulsam.base.files import check_readable
from ulsam.base.reading import read_text
from ulsam.data.class_numbers import in_order
from ulsam.data.folder import IMAGE_SUFFIXES, Folder
from ulsam.data.sample_list import SampleList
from ulsam.data.split_column import SplitColumn, row_split, split_column, split_note

PATHS = (
    *("path", "file", "filename", "file_name", "filepath", "image_path", "image_name"),
    *("image", "image_id", "img", "id"),
)
LABELS = ("label", "class_name", "class", "category", "species", "breed", "target", "class_index")
SETS = ("labels", "tags", "classes", "attributes")
"""What the columns are called, in lower case: of paths, of one label an image, and of several."""

_SEPARATORS = ("[;|]", ",", r"\s")  # between labels; the first one that a column holds
_YES, _NO, _MINUS = {"1", "1.0", "true"}, {"0", "0.0", "false"}, {"-1", "-1.0"}


@dataclass(frozen=True)
class Columns:
    """The places of a table's columns; ``label`` is None where each class has a column of 0 and 1."""

    path: int
    label: int | None
    split: SplitColumn | None
    sets: bool = False  # whether ``label`` may hold several labels, or none
    unread: tuple[str, ...] = ()  # names of columns that are called like one of splits, and are none


@dataclass(frozen=True)
class Row:
    """An image of a table, and the number of its row as a spreadsheet counts."""

    number: int
    path: str
    labels: tuple[str, ...]
    split: str | None


@dataclass(frozen=True)
class LabelTable:
    """What :func:`read_table` found.

    Attributes:
        path: of the table.
        rows: its images.
        splits: train, val and test, those that a column names; empty without one.
        several: whether an image may have any number of labels; otherwise it has one.
        classes: where each has a column of its own, in that order.
        note: a line for the user about how it was read; None for one label an image, and splits in a column ``split``.
    """

    path: str
    rows: tuple[Row, ...]
    splits: tuple[str, ...]
    several: bool
    classes: tuple[str, ...] | None
    note: str | None


def is_table(data: str | os.PathLike[str]) -> bool:
    """Whether this is the name of a table, and no folder.

    >>> is_table("data/labels.csv"), is_table("data")
    (True, False)
    """
    return os.fspath(data).lower().endswith((".csv", ".tsv")) and not os.path.isdir(data)


def columns(
    header: Sequence[str], cells: Sequence[Sequence[str]] = (), table: str | os.PathLike[str] = "the table"
) -> Columns | None:
    """The places of the path, the labels and, if there is one, the split; None without path or labels.

    Args:
        header: the names of the columns.
        cells: the rows, which decide about a column of splits that is not called ``split``.
        table: its name, for messages.

    Raises:
        UlsamError: as of `ulsam.data.split_column.split_column`.

    >>> columns(["Id", "Breed"])
    Columns(path=0, label=1, split=None, sets=False, unread=())
    >>> found = columns(["split", "tags", "file name"])
    >>> (found.path, found.label, found.split.place, found.sets), columns(["x", "y"]), columns(["path"])
    ((2, 1, 0, True), None, None)
    >>> columns(["image", "sunny", "windy"])
    Columns(path=0, label=None, split=None, sets=False, unread=())
    """
    names = [re.sub(r"\W+", "_", name.strip().lower()) for name in header]
    path, label, sets = (
        next((names.index(one) for one in known if one in names), None) for known in (PATHS, LABELS, SETS)
    )
    if path is None:
        return None
    taken = (path, sets if label is None else label)
    split, unread = split_column([name if n not in taken else "" for n, name in enumerate(names)], cells, table)
    if label is None and sets is None:
        return Columns(path, None, split) if _class_columns(header, Columns(path, None, split)) else None
    return Columns(path, sets if label is None else label, split, label is None, tuple(unread))


def read_cells(table: str | os.PathLike[str]) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header of a CSV, and its rows by their numbers; commas, semicolons or tabs separate the values.

    Raises:
        UlsamError: no such file, no text in UTF-8, no CSV, or a row with another number of values than the header.
    """
    check_readable(table, "table")
    try:
        text = read_text(table).removeprefix("\ufeff")
        delimiter = max(",;\t", key=text.partition("\n")[0].count)
        numbered = enumerate(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), start=1)
        rows = [(number, row) for number, row in numbered if any(cell.strip() for cell in row)]
    except UnicodeDecodeError as error:
        raise UlsamError(f"{table} is no text in UTF-8: save it as CSV in UTF-8") from error
    except csv.Error as error:
        raise UlsamError(f"{table} is no CSV: {error}") from error
    header = rows[0][1] if rows else []
    for number, row in rows:
        if len(row) != len(header):
            raise UlsamError(f"{table}, row {number}: {len(row)} values, and the header has {len(header)}")
    return header, rows[1:]


def read_table(table: str | os.PathLike[str], several: bool | None = None) -> LabelTable:
    """Read a table of images. It has a header with one of `PATHS` and, for the labels, one of three forms.

    One of `LABELS` holds the label of the image. One of `SETS` holds any number of labels, between ``;`` or ``|``, else
    commas, else blanks; or as a list of Python or JSON. Or all further columns are classes, and hold 1 for those that
    the image has, else 0; or else -1 in the whole table. Where every image has exactly one label, that is its class.

    Args:
        table: the file.
        several: whether an image may have any number of labels; by default as the table has it.

    Raises:
        UlsamError: as of :func:`read_cells`; no such columns, no row, an empty label, an unknown split, an image that
            is named twice, or one that has not exactly one label where ``several`` is False.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "labels.csv"
    >>> _ = file.write_text("path,labels\\na.jpg,sunny;windy\\nb.jpg,\\n")
    >>> found = read_table(file)
    >>> found.several, [row.labels for row in found.rows]
    (True, [('sunny', 'windy'), ()])
    """
    name = os.fspath(table)
    header, cells = read_cells(table)
    layout = columns(header, [row for _, row in cells], name)
    if layout is None:
        raise UlsamError(
            f"{name} needs a header with a column for the path ({', '.join(PATHS[:3])}, ...) and one for the label "
            f"({', '.join(LABELS[:3])}, ...), one for several labels ({', '.join(SETS[:2])}, ...), or a column of 0 "
            f"and 1 for each class; it has {a_few(header) if header else 'none'}"
        )
    names = [one.strip().lower() for one in header]
    places = (layout.path, layout.label, layout.split and layout.split.place)
    used = (names[place] for place in places if place is not None)
    if twice := next((one for one in used if names.count(one) > 1), None):
        raise UlsamError(f"{name} has two columns called {twice!r}: leave one of them out")
    if not cells:
        raise UlsamError(f"{name} has a header, but no row: it names no image")
    labels, how = _labels(name, header, cells, layout)
    rows = [
        Row(number, row[layout.path].strip(), own, row_split(name, number, row, layout.split))
        for (number, row), own in zip(cells, labels, strict=True)
    ]
    _check_twice(name, rows)
    other = next((row for row in rows if len(row.labels) != 1), None)
    if several is False and other:
        raise UlsamError(f"{name}, row {other.number}: {len(other.labels)} labels, where one class an image is needed")
    takes_several = other is not None if several is None else several
    classes = None if layout.label is not None else tuple(header[n].strip() for n in _class_columns(header, layout))
    notes = split_note(layout.split, layout.unread)
    if takes_several:
        bare = sum(not row.labels for row in rows)
        notes.insert(0, f"several labels an image, {how}" + (f"; {bare} images have none" if bare else ""))
    elif how:
        notes.insert(0, f"every image has exactly one label, {how}: that is its class")
    named = {row.split for row in rows}
    return LabelTable(
        name,
        tuple(rows),
        tuple(s for s in ("train", "val", "test") if s in named),
        takes_several,
        classes,
        "; ".join(notes) or None,
    )


def table_images(
    table: LabelTable,
    split: str | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    min_classes: int = 2,
    files: Sequence[str | None] | None = None,
) -> Folder:
    """The images of a split of a table, None for all, as a folder of them would be.

    Args:
        table: of :func:`read_table`.
        split: one of ``table.splits``.
        data_dir: where paths count from; by default the table's folder.
        min_classes: fewest classes that are accepted; of several labels an image, one is enough.
        files: what :func:`table_files` found, where several splits are read.

    Raises:
        UlsamError: as of :func:`table_files`; images that are not there, or fewer classes.
    """
    root = _root(table, data_dir)
    files = table_files(table, data_dir) if files is None else files
    rows = [row for row in table.rows if split is None or row.split == split]
    paths = [path for row, path in zip(table.rows, files, strict=True) if split is None or row.split == split]
    lacking = [(row, path) for row, path in zip(rows, paths, strict=True) if path is None]
    if lacking:
        row = lacking[0][0]
        named = root / row.path
        if named.exists():
            kind = "a folder" if named.is_dir() else f"a {named.suffix or 'file without ending'}"
            advice = "convert it to JPEG" if named.suffix else "name an image file"
            raise UlsamError(f"{table.path}, row {row.number}: {named} is {kind}, which is not read: {advice}")
        raise UlsamError(
            f"{table.path} names {len(lacking)} of {len(rows)} images that are not there, the first one in row "
            f"{row.number}: {named}; paths count from {root} on, or from `data_dir`"
        )
    used = {label for row in rows for label in row.labels}
    classes = table.classes if table.classes and table.several else tuple(in_order(used))
    if len(classes) < (1 if table.several else min_classes):
        raise UlsamError(
            f"{table.path} holds images of {len(classes)} class{'es' if not classes else ''} ({', '.join(classes)}), "
            f"at least {min_classes} are needed"
        )
    numbers = {name: number for number, name in enumerate(classes)}
    found = [(path, row.labels) for row, path in zip(rows, paths, strict=True) if path is not None]
    if not table.several:
        return Folder(Path(table.path), classes, SampleList((path, numbers[own[0]]) for path, own in found))
    known: dict[frozenset[str], int] = {}
    samples = SampleList((path, known.setdefault(frozenset(own), len(known))) for path, own in found)
    sets = np.zeros((len(known), len(classes)), np.bool_)
    for own, number in known.items():
        sets[number, [numbers[label] for label in own]] = True
    return Folder(Path(table.path), classes, samples, sets=sets)


def image_file(folder: str | os.PathLike[str], path: str, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> str | None:
    """The file that a path in a table means: with or without its ending, with slashes or backslashes."""
    for name in dict.fromkeys((path, path.replace("\\", "/"))):
        names = [name] if name.lower().endswith(IMAGE_SUFFIXES) else [f"{name}{ending}" for ending in suffixes]
        files = (os.path.join(folder, one) for one in names)
        found = next(filter(os.path.isfile, files), None)
        if found is not None:
            return os.fspath(Path(found))  # without ./ and doubled slashes
    return None


def _files(folder: Path, rows: Iterable[Row]) -> Iterator[str | None]:
    """The file of each row; the ending of the last one, where a path lacks it, is tried first."""
    suffixes = list(IMAGE_SUFFIXES)
    for row in rows:
        file = image_file(folder, row.path, suffixes)
        ending = os.path.splitext(file or "")[1]
        if ending != suffixes[0] and ending in suffixes:
            suffixes.remove(ending)
            suffixes.insert(0, ending)
        yield file


def _class_columns(header: Sequence[str], layout: Columns) -> list[int]:
    """The columns of a table whose classes have one each: all further ones that have a name."""
    taken = (layout.path, layout.split and layout.split.place)
    return [n for n, name in enumerate(header) if n not in taken and not re.fullmatch(r"\s*(Unnamed: \d+)?", name)]


def _labels(
    table: str, header: Sequence[str], cells: Sequence[tuple[int, list[str]]], layout: Columns
) -> tuple[list[tuple[str, ...]], str | None]:
    """The labels of each row, and how they were read, None for one a cell."""
    if layout.label is None:
        return _from_columns(table, header, cells, layout), "a column of 0 and 1 for each class"
    texts = [row[layout.label].strip() for _, row in cells]
    name = header[layout.label].strip()
    how = f"column {name}"
    for (number, _), text in zip(cells, texts, strict=True):
        if not text and not layout.sets:
            raise UlsamError(
                f"{table}, row {number}: the {name} is empty; images without a label need a column called labels"
            )
    if layout.sets and any(text.startswith("[") for text in texts):
        return [_listed(f"{table}, row {number}", text) for (number, _), text in zip(cells, texts, strict=True)], how
    allowed = _SEPARATORS if layout.sets else _SEPARATORS[:1]
    between = next((one for one in allowed if any(re.search(one, text) for text in texts)), None)
    if between is None:
        return [(text,) if text else () for text in texts], how if layout.sets else None
    parts = (map(str.strip, re.split(between, text)) for text in texts)
    words = dict(zip(_SEPARATORS, ("; or |", "commas", "blanks"), strict=True))[between]
    return [tuple(dict.fromkeys(filter(None, own))) for own in parts], f"{how}, divided at {words}"


def _listed(where: str, text: str) -> tuple[str, ...]:
    """The labels in a cell that holds them as Python or JSON writes a list."""
    try:
        found = ast.literal_eval(text or "[]")
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        found = None
    if not isinstance(found, list) or not all(isinstance(one, str) and one.strip() for one in found):
        raise UlsamError(f"{where}: {text[:80]} is no list of labels, such as ['sun', 'wind'], as others here are")
    return tuple(dict.fromkeys(map(str.strip, found)))


def _from_columns(
    table: str, header: Sequence[str], cells: Sequence[tuple[int, list[str]]], layout: Columns
) -> list[tuple[str, ...]]:
    class_columns = _class_columns(header, layout)
    names = [header[column].strip() for column in class_columns]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UlsamError(f"{table} has two columns called {twice!r}: give each class a name of its own")
    values = [[row[column].strip().lower() for column in class_columns] for _, row in cells]
    no = _NO if any(value in _NO for row in values for value in row) else _MINUS
    labels = []
    for (number, _), row in zip(cells, values, strict=True):
        for name, value in zip(names, row, strict=True):
            if value not in _YES and value not in no:
                raise UlsamError(
                    f"{table}, row {number}: {name} is {value!r}, and without a column such as label or labels each "
                    "further column is a class, 0 or 1; leave others out"
                )
        labels.append(tuple(name for name, value in zip(names, row, strict=True) if value in _YES))
    return labels


def _root(table: LabelTable, data_dir: str | os.PathLike[str] | None) -> Path:
    return Path(data_dir if data_dir is not None else Path(table.path).parent)


def table_files(table: LabelTable, data_dir: str | os.PathLike[str] | None = None) -> list[str | None]:
    """The file of each row, of all splits; None where there is none.

    Args:
        table, data_dir: as of :func:`table_images`.

    Raises:
        UlsamError: two rows mean one file by different paths: with and without its ending, or from another folder.
    """
    files = list(_files(_root(table, data_dir), table.rows))
    seen: dict[str, Row] = {}
    for row, file in zip(table.rows, files, strict=True):
        if file is not None and seen.setdefault(os.path.abspath(file), row) is not row:
            before = seen[os.path.abspath(file)]
            raise UlsamError(
                f"{table.path}, row {row.number}: {row.path} is the file of row {before.number}, {before.path}: leave "
                "one of them out"
            )
    return files


def _check_twice(table: str, rows: Iterable[Row]) -> None:
    seen: dict[str, Row] = {}
    for row in rows:
        if not row.path:
            raise UlsamError(f"{table}, row {row.number}: the path is empty")
        key = os.path.normpath(row.path.replace("\\", "/"))
        before = seen.setdefault(key, row)
        if before is row:
            continue
        where = f"{table}, row {row.number}: {row.path} is in row {before.number} too"
        if before.split != row.split:
            raise UlsamError(f"{where}, in another split: leave one of them out")
        if set(before.labels) != set(row.labels):
            raise UlsamError(
                f"{where}, with other labels ({a_few(before.labels) or 'none'}, here {a_few(row.labels) or 'none'}): "
                "write several labels of an image into one row, with ; between them"
            )
        raise UlsamError(f"{where}: leave one of them out")
