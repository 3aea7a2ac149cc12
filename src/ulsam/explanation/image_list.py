"""Which images are explained, what their true classes are, and in which order a reader wants them."""

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ulsam.base.class_names import class_numbers
from ulsam.base.errors import printable
from ulsam.data.folder import image_paths
from ulsam.explanation.captions import verdict


class ListedImage(NamedTuple):
    """An image to explain."""

    path: str
    name: str  # what it is called: its path from the folder that was named, that folder's own name included
    truth: str | None  # its true class, where it is known


def list_images(names: Sequence[str], classes: Sequence[str]) -> list[ListedImage]:
    """Image files as they are named, and all below each folder named.

    The true class is the name of the nearest folder around an image that is one of ``classes``: of an image below a
    named folder up to that folder itself, of an image that is named the folder that it lies in.

    Raises:
        UlsamError: a folder without an image, or one that may not be listed.

    >>> list_images(["some/wren/1.jpg"], ["wren", "robin"])
    [ListedImage(path='some/wren/1.jpg', name='wren/1.jpg', truth='wren')]
    """
    found: list[ListedImage] = []
    true_class = cache(lambda folder: [classes[number] for number in class_numbers([folder], classes).values()])
    for name in names:
        whole = Path(os.path.abspath(name))
        outside = (whole if os.path.isdir(name) else whole.parent).parent
        for path in image_paths([name]):
            within = Path(os.path.abspath(path)).relative_to(outside)
            truth = next((true for folder in reversed(within.parent.parts) for true in true_class(folder)), None)
            found.append(ListedImage(path, printable(within.as_posix()), truth))
    return found


def reading_order(truth: str | None, named: str, share: float) -> tuple[int, float]:
    """A key to sort by: errors first, the surest of them on top; then what has no true class, and what is right, the
    least sure first.

    >>> shown = [("wren", "wren", 0.6), ("wren", "robin", 0.7), (None, "wren", 0.5), ("wren", "robin", 0.9)]
    >>> [share for _, _, share in sorted(shown, key=lambda one: reading_order(*one))]
    [0.9, 0.7, 0.5, 0.6]
    """
    rank = {"wrong": 0, "unknown": 1, "right": 2}[verdict(truth, named)]
    return rank, -share if rank == 0 else share
