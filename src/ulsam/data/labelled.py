"""Image folders and tables of labels, read alike: which splits there are, and the images of each."""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ulsam.base.errors import UlsamError
from ulsam.data.folder import Folder, scan
from ulsam.data.label_table import is_table, read_table, table_files, table_images
from ulsam.data.layouts import misread, with_advice
from ulsam.data.splits import find_splits


@dataclass(frozen=True)
class Labelled:
    """Images and their labels on this machine; :func:`labelled` makes it.

    Attributes:
        data: the folder or the table.
        splits: train, val and test, those that it has; empty if it has none.
        several: whether an image may have several labels.
        note: a line for the user about how the labels were read.
    """

    data: str
    splits: tuple[str, ...]
    several: bool
    note: str | None
    _read: Callable[[str | None, int], Folder]

    def read(self, split: str | None = None, min_classes: int = 2) -> Folder:
        """The images of a split; of data without splits, all.

        Args:
            split: its name; of data without splits any.
            min_classes: fewest classes that are accepted.

        Raises:
            UlsamError: no such split; or as of `ulsam.data.folder.scan` or `ulsam.data.label_table.table_images`.
        """
        if self.splits and split not in self.splits:
            raise UlsamError(f"{self.data} has no split {split!r}; it has {', '.join(self.splits)}")
        return self._read(split if self.splits else None, min_classes)


def labelled(
    data: str | os.PathLike[str], *, data_dir: str | os.PathLike[str] | None = None, several: bool | None = None
) -> Labelled:
    """Open an image folder or a table.

    Args:
        data: the folder of class folders, with splits or without; or a CSV as of `ulsam.data.label_table.read_table`.
        data_dir: where the paths in a table count from; by default its folder.
        several: whether an image may have several labels; by default as a table has it.

    Raises:
        UlsamError: no such folder or table, a table that cannot be read, a folder of another layout, as of
            `ulsam.data.layouts.misread`, or one for which ``data_dir`` or ``several`` is given.

    >>> import tempfile
    >>> from ulsam.data.birds import draw_birds
    >>> found = labelled(draw_birds(tempfile.mkdtemp() + "/birds", classes=2, train=2, val=1, size=32))
    >>> found.splits, len(found.read("train").samples)
    (('train', 'val'), 4)
    """
    name = os.fspath(data)
    if is_table(name):
        table = read_table(name, several)
        files = functools.cache(lambda: table_files(table, data_dir))  # looked up once for all splits
        return Labelled(
            name,
            table.splits,
            table.several,
            table.note,
            lambda split, least: table_images(table, split, data_dir, least, files()),
        )
    if mistaken := misread(name):
        raise UlsamError(f"{name}: {mistaken}")
    splits = find_splits(name)
    if data_dir is not None:
        raise UlsamError(f"`data_dir` is for tables and data sets by name, and {name} is a folder: leave it out")
    if several:
        raise UlsamError(
            f"{name} is a folder of class folders, one class an image, and the model gives several labels: name a CSV "
            "with a column of labels"
        )

    def read(split: str | None, least: int) -> Folder:
        with with_advice(name):
            return scan(splits[split] if split is not None else Path(name), least)

    return Labelled(name, tuple(splits), False, None, read)


def check_no_class(out: str | os.PathLike[str], data: str | os.PathLike[str]) -> None:
    """Raise where a folder that is to be written lies among the class folders of a data set.

    Raises:
        UlsamError: it does; or as of :func:`labelled`.

    >>> check_no_class("runs/birds", "torch/imagenet")
    """
    if not os.path.isdir(data):
        return
    for root in find_splits(data).values() or [Path(data)]:
        if Path(out).resolve().is_relative_to(root.resolve()):
            raise UlsamError(
                f"{os.fspath(out)} lies among the class folders of {root}, and would be taken for one: name a folder "
                "elsewhere"
            )


def splits_of(data: str | os.PathLike[str]) -> tuple[str, ...]:
    """The splits of an image folder or a table; empty if it has none.

    Raises:
        UlsamError: as of :func:`labelled`.
    """
    return labelled(data).splits


def is_local(data: str | os.PathLike[str]) -> bool:
    """Whether this is an image folder or a table on this machine, and no data set of timm's factory.

    >>> is_local("torch/imagenet")
    False
    """
    return os.path.isdir(data) or (is_table(data) and os.path.isfile(data))


def images_root(data: str | os.PathLike[str], data_dir: str | os.PathLike[str] | None = None) -> str:
    """The folder that the paths of images count from.

    >>> images_root("birds"), images_root("birds/labels.csv"), images_root("birds/labels.csv", "images")
    ('birds', 'birds', 'images')
    """
    if not is_table(data):
        return os.fspath(data)
    return os.fspath(data_dir) if data_dir is not None else os.path.dirname(data) or os.curdir
