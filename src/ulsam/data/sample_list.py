"""Paths and classes of very many images, in a tenth of the memory of tuples, and shared with the reading processes."""

import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import context
from multiprocessing.heap import Arena
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from ulsam.base.shared_memory import shared_memory

Sample = tuple[str, int]
"""An image's path and the index of its class."""


class SampleList(Sequence[Sample]):
    """Samples in three arrays: all paths one behind the other, where each ends, and the classes.

    A list of Python strings is copied page by page into each forked process, as reading one counts its references, and
    whole into every other process. These arrays are not: they take the bytes of the paths and 12 more an image, once.

    >>> samples = SampleList([("a/1.jpg", 0), ("b/2.jpg", 1)])
    >>> samples[1], len(samples), samples.labels.tolist()
    (('b/2.jpg', 1), 2, [0, 1])
    """

    def __init__(self, samples: Iterable[Sample] = ()) -> None:
        if isinstance(samples, SampleList):
            self._set(samples._paths, samples._ends, samples.labels)
            return
        paths, ends, labels = bytearray(), array("q"), array("i")
        for path, label in samples:
            paths += os.fsencode(path)
            ends.append(len(paths))
            labels.append(label)
        self._set(*(np.frombuffer(part, kind) for part, kind in ((paths, "u1"), (ends, "i8"), (labels, "i4"))))

    def _set(self, paths: NDArray[np.uint8], ends: NDArray[np.int64], labels: NDArray[np.int32]) -> None:
        self._paths, self._ends, self.labels = paths, ends, labels
        self._arena: Arena | None = None

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> "SampleList": ...
    def __getitem__(self, index: int | slice) -> "Sample | SampleList":
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        number = range(len(self))[index]
        first = int(self._ends[number - 1]) if number else 0
        return os.fsdecode(self._paths[first : self._ends[number]].tobytes()), int(self.labels[number])

    def __iter__(self) -> Iterator[Sample]:
        return (self[number] for number in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(tuple.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]

    def take(self, numbers: NDArray[np.int64]) -> "SampleList":
        """Those of these numbers, in their order."""
        return SampleList(self[number] for number in numbers.tolist())

    def with_labels(self, labels: NDArray[np.int32]) -> "SampleList":
        """The same paths, with other classes."""
        found = SampleList()
        found._set(self._paths, self._ends, labels.astype(np.int32))
        return found

    def __getstate__(self) -> Any:
        """For a process that is being started: the memory itself; otherwise its content."""
        parts: list[NDArray[Any]] = [self._ends, self.labels, self._paths]
        if context.get_spawning_popen() is None:
            return parts
        if self._arena is None:
            arena = shared_memory(max(1, sum(part.nbytes for part in parts)))
            for part, view in zip(parts, _views(arena, len(self), len(self._paths)), strict=True):
                view[:] = part
            self._take_arena(arena, len(self), len(self._paths))
        return self._arena, len(self), len(self._paths)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, list):
            self._set(state[2], state[0], state[1])
        else:
            self._take_arena(*state)

    def _take_arena(self, arena: Arena, images: int, size: int) -> None:
        ends, labels, paths = _views(arena, images, size)
        self._set(paths, ends, labels)
        self._arena = arena


def _views(arena: Arena, images: int, size: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Ends, classes and paths in the memory."""
    return (
        np.frombuffer(arena.buffer, np.int64, images),
        np.frombuffer(arena.buffer, np.int32, images, 8 * images),
        np.frombuffer(arena.buffer, np.uint8, size, 12 * images),
    )
