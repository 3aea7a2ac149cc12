"""Decoded images kept in memory, which the reading processes fill and share without a copy of it for each."""

import math
import multiprocessing
from multiprocessing.heap import Arena
from multiprocessing.synchronize import Lock
from pathlib import Path
from typing import Literal

import numpy as np
import psutil

from ulsam.base.errors import UlsamError
from ulsam.base.shared_memory import shared_memory
from ulsam.data.images import Pixels, Reduction, UnreadableImage
from ulsam.data.sources import AnyImages, MapImages, StreamImages

CacheChoice = Literal["auto", "true", "false"]

SAMPLE = 32
"""Images that are decoded to estimate how large the whole set is."""

SHARE = 4
"""``auto`` takes at most one part in so many of the memory that is available."""


class ImageCache:
    """Decoded images with their labels by number, in memory that this process shares with those that it starts.

    They get it however they are started: see `shared_memory`. An image for which there is no room is not kept.

    Args:
        images: how many there are.
        capacity: bytes for their pixels.
        channels: of each image.

    Raises:
        OSError: the system refuses so much memory.

    >>> cache = ImageCache(2, capacity=30)
    >>> cache.put(1, np.full((2, 4, 3), 7, np.uint8), label=5)
    >>> cache.get(0) is None, cache.get(1)[0].shape, cache.get(1)[1]
    (True, (2, 4, 3), 5)
    """

    def __init__(self, images: int, capacity: int, channels: int = 3) -> None:
        memories = shared_memory(max(1, capacity)), shared_memory(8 * (4 * images + 1))
        self.__setstate__((capacity, channels, *memories, multiprocessing.Lock()))

    def __getstate__(self) -> tuple[int, int, Arena, Arena, Lock]:
        return self.capacity, self.channels, self._pixel_memory, self._entry_memory, self._lock

    def __setstate__(self, state: tuple[int, int, Arena, Arena, Lock]) -> None:
        self.capacity, self.channels, self._pixel_memory, self._entry_memory, self._lock = state
        self._pixels = np.frombuffer(self._pixel_memory.buffer, np.uint8)
        entries = np.frombuffer(self._entry_memory.buffer, np.int64)
        self._used, self._entries = entries[:1], entries[1:].reshape(-1, 4)  # offset, height, width, label

    def get(self, number: int) -> tuple[Pixels, int] | None:
        """The image [H, W, channels], to be read only, and its label; None if it is not kept."""
        with self._lock:
            offset, height, width, label = self._entries[number].tolist()
        if not height:
            return None
        shape = height, width, self.channels
        return self._pixels[offset : offset + math.prod(shape)].reshape(shape), label

    def put(self, number: int, pixels: Pixels, label: int) -> None:
        """Keep a copy of the image if there is room."""
        with self._lock:
            offset = int(self._used[0])
            if self._entries[number, 1] or offset + pixels.size > self.capacity:
                return
            self._used[0] += pixels.size
        self._pixels[offset : offset + pixels.size] = pixels.reshape(-1)
        with self._lock:  # only now can others see it
            self._entries[number] = offset, pixels.shape[0], pixels.shape[1], label


def cache_for(
    images: AnyImages, reduction: Reduction, choice: CacheChoice, *, processes: int = 1, channels: int = 3
) -> tuple[ImageCache | None, str | None]:
    """A cache for the training images, or None, and a message about it for the user.

    Args:
        images: to be cached; a stream is not.
        reduction: at which they are decoded.
        choice: ``auto`` caches them if they fit into a quarter of the available memory.
        processes: that train on this machine, each with a cache of its own.
        channels: with which they are decoded.

    Raises:
        UlsamError: ``true``, but it cannot be done.
    """
    if choice == "false":
        return None, None
    cache, said = None, "a stream is not kept"
    if not isinstance(images, StreamImages):
        cache, said = _sized(images, reduction, channels, 1 if choice == "true" else SHARE, processes)
    if cache is None and choice == "true":
        raise UlsamError(f"`cache=true` cannot be done: {said}; `cache=auto` trains without one")
    return cache, said if cache else f"off: {said}"


def _sized(
    images: MapImages, reduction: Reduction, channels: int, parts: int, processes: int
) -> tuple[ImageCache | None, str]:
    """A cache for all the images if they fit into one of so many parts of the available memory; and what to say."""
    available = available_memory()
    if available is None:
        return None, "the system does not say how much memory is available"
    size = decoded_size(images, reduction, channels)
    room = available // parts // processes
    said = f"{len(images)} images, {size / 1e6:.0f} MB"
    if size > room:
        return None, f"{said}, more than {room / 1e6:.0f} MB, 1/{parts * processes} of the memory that is available"
    try:
        return ImageCache(len(images), min(room, size + size // 4), channels), f"{said}, in memory"
    except OSError as error:
        return None, f"{said}, which the system refuses ({error.strerror})"


def decoded_size(images: MapImages, reduction: Reduction, channels: int = 3) -> int:
    """Bytes that the decoded images take: an estimate from `SAMPLE` of them, spread over all."""
    numbers = sorted({round(place) for place in np.linspace(0, len(images) - 1, SAMPLE)})
    sizes = []
    for number in numbers:
        try:
            sizes.append(images.fetch(number, reduction, channels)[0].size)
        except UnreadableImage:  # reported when training meets it
            continue
    return round(len(images) * float(np.mean(sizes))) if sizes else 0


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can be taken without swapping, within the limits of the control groups; None if unknown.

    Linux: MemAvailable, and of each control group (version 1 or 2) above this process its limit minus what it uses,
    file pages aside, which the system gives back.

    >>> available_memory() > 0
    True
    """
    try:
        limits = [int(psutil.virtual_memory().available)]
    except OSError:
        return None
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:  # as everywhere but on Linux
        groups = []
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        folder = mount / path.lstrip("/")
        for place in (folder, *folder.parents):
            limits += _left(place, "usage_in_bytes" if controllers else "current")
            if place == mount:
                break
    return min(limits)


def _left(group: Path, usage: str) -> list[int]:
    """What a control group leaves, as a list of one; empty where it sets no limit."""
    limit = "limit_in_bytes" if usage == "usage_in_bytes" else "max"
    try:
        most = (group / f"memory.{limit}").read_text(encoding="utf-8").strip()
        used = int((group / f"memory.{usage}").read_text(encoding="utf-8"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
    except OSError:
        return []
    files = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
    return [] if most == "max" else [max(0, int(most) - used + files)]
