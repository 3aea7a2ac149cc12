"""Which number a class has: those of a model are given to the images of a data set."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from ulsam.base.class_names import class_numbers
from ulsam.base.errors import UlsamError
from ulsam.data.folder import Folder

BY_POSITION = "If they are the same ones under other names, `classes_by_number=True` takes them by their position"
"""What to do about classes that are not a model's."""


def index_like(folder: Folder, classes: tuple[str, ...], advice: str = "") -> Folder:
    """The same images with the class indices of `classes`, e.g. a val folder with those of the train folder.

    `classes` may name classes that `folder` lacks: ``set(classes) - set(folder.classes)``.

    Args:
        folder: the images.
        classes: of the model.
        advice: to add to the message about a class that is not among them.

    Raises:
        UlsamError: the folder has a class that is not among `classes`.

    >>> from pathlib import Path
    >>> from ulsam.data.sample_list import SampleList
    >>> val = Folder(Path("val"), ("wren",), SampleList([("val/wren/1.jpg", 0)]))
    >>> list(index_like(val, ("robin", "wren")).samples)
    [('val/wren/1.jpg', 1)]
    """
    found = class_numbers(folder.classes, classes)
    if unknown := [name for name in folder.classes if name not in found]:
        raise UlsamError(
            f"{folder.root} has classes that were not trained on: {', '.join(unknown[:8])}"
            f"{', ...' if len(unknown) > 8 else ''};"
            f" known are {', '.join(classes[:8])}{', ...' if len(classes) > 8 else ''}{advice}"
        )
    return _renumbered(folder, [found[name] for name in folder.classes], classes)


def index_by_number(folder: Folder, classes: tuple[str, ...]) -> Folder:
    """The same images with `classes` in place of the folder's own, whatever these are called.

    Names that are numbers are the positions in `classes`, counted from 0, and some may be absent. Other classes, and
    numbers that are counted otherwise, are taken in their order.

    Raises:
        UlsamError: not as many classes.

    >>> from pathlib import Path
    >>> from ulsam.data.sample_list import SampleList
    >>> found = Folder(Path("val"), ("10", "2"), SampleList([("val/10/1.jpg", 0), ("val/2/1.jpg", 1)]))
    >>> list(index_by_number(found, tuple("abcdefghijk")).samples)
    [('val/10/1.jpg', 10), ('val/2/1.jpg', 2)]
    >>> list(index_by_number(found, ("wren", "robin")).samples)
    [('val/10/1.jpg', 1), ('val/2/1.jpg', 0)]
    """
    order = in_order(folder.classes)
    if all(map(str.isdecimal, folder.classes)):
        numbers = list(map(int, folder.classes))
        if max(numbers) < len(classes) and len(set(numbers)) == len(numbers):
            return _renumbered(folder, numbers, classes)
    if len(order) != len(classes):
        raise UlsamError(f"{folder.root} has {len(order)} classes, the model has {len(classes)}")
    return _renumbered(folder, [order.index(name) for name in folder.classes], classes)


def in_order(classes: Iterable[str]) -> list[str]:
    """Names of classes in the order in which they are numbered: by value if all are numbers, else by letters.

    >>> in_order(["10", "9"]), in_order(["b10", "b9"])
    (['9', '10'], ['b10', 'b9'])
    """
    names = list(classes)
    return sorted(names, key=lambda name: (int(name), name)) if all(map(str.isdecimal, names)) else sorted(names)


def _renumbered(folder: Folder, numbers: Sequence[int], classes: tuple[str, ...]) -> Folder:
    """The folder with these numbers of its classes."""
    new = np.array(numbers, np.int32)
    if folder.sets is not None:
        sets = np.zeros((len(folder.sets), len(classes)), np.bool_)
        sets[:, new] = folder.sets
        return dataclasses.replace(folder, classes=classes, sets=sets)
    return dataclasses.replace(folder, classes=classes, samples=folder.samples.with_labels(new[folder.samples.labels]))
