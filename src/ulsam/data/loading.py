"""From images to batches, the same ones whatever the number of workers and restarts.

Every random choice is a function of (seed, epoch, position in the epoch), which seeds a generator for each image.
So a run can resume in mid-epoch with nothing saved but its position.
"""

import errno
import gc
import itertools
import multiprocessing
import multiprocessing.queues
import os
import random
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from ulsam.base.errors import MachineError, UlsamError
from ulsam.base.processes import MAX_WORKERS, active_stop_signals
from ulsam.base.reading import machine_fault
from ulsam.data.augment import EvalTransform, Normalize, Rectangle, Transform
from ulsam.data.cache import ImageCache
from ulsam.data.images import Pixels, UnreadableImage
from ulsam.data.sources import AnyImages, MapImages, StreamImages, check_one_class
from ulsam.data.targets import Target, as_labels, target

CPU = torch.device("cpu")
Key = tuple[int, int, int]  # epoch, position in the epoch, image
Bad = list[tuple[str, str]]  # images that could not be read: name, reason
Item = tuple[Tensor | None, Target, Rectangle | None, Bad]  # uint8 [H, W, C], target, what is to be erased

#: An unreadable image is replaced by the next readable one in training; after this many in a row training stops.
TRIES = 50


@dataclass
class Batch:
    """Images, labels [B], and what could not be read (name, reason).

    Where an image may have several labels, ``labels`` is 0 or 1 for each class, float [B, classes].

    The reading processes hand over bytes, uint8 [B, H, W, C], a quarter of what floats would take; the :class:`Loader`
    makes of them the model's input, float [B, C, H, W] in channels_last.
    """

    images: Tensor
    labels: Tensor
    unreadable: Bad
    erased: list[tuple[int, Rectangle]] = field(default_factory=list)  # number in the batch, rectangle

    def pin_memory(self) -> Self:
        """PyTorch's loader calls this where the images go to a GPU."""
        self.images = self.images.pin_memory()
        return self


class TrainSet(Dataset[Item]):
    """Augmented training images by (epoch, position, image); in place of an unreadable one comes the next."""

    def __init__(self, images: MapImages, transform: Transform, seed: int, cache: ImageCache | None = None) -> None:
        self.images, self.transform, self.seed, self.cache = images, transform, seed, cache

    def __getitem__(self, key: Key) -> Item:
        epoch, position, index = key
        bad = []
        for attempt in range(min(TRIES, len(self.images))):
            number = (index + attempt) % len(self.images)
            try:
                pixels, label = self._fetch(number)
            except UnreadableImage as error:
                bad.append((self.images.name(number), str(error)))
                continue
            # by far cheaper than seeding Python's, NumPy's and PyTorch's own generators for each image
            generator = random.Random(self.seed << 96 | epoch << 64 | position)
            image, erased = self.transform(pixels, generator)
            return image, target(self.images, label), erased, bad
        return None, -1, None, bad

    def _fetch(self, number: int) -> tuple[Pixels, int]:
        found = self.cache and self.cache.get(number)
        if found:
            return found
        pixels, label = self.images.fetch(number, self.transform.reduction, self.transform.channels)
        if self.cache:
            self.cache.put(number, pixels, label)
        return pixels, label


class EvalSet(Dataset[Item]):
    """Images for measuring; an unreadable one is left out and reported."""

    def __init__(self, images: MapImages, transform: EvalTransform) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Item:
        try:
            pixels, label = self.images.fetch(index, self.transform.reduction, self.transform.channels)
        except UnreadableImage as error:
            return None, -1, None, [(self.images.name(index), str(error))]
        return self.transform.pixels(pixels), target(self.images, label), None, []


class StreamTrainSet(IterableDataset[Item]):
    """A stream's images, augmented, in its own order; for an unreadable one the last one before it stands in."""

    def __init__(self, images: StreamImages, transform: Transform) -> None:
        self.images, self.transform = images, transform

    def __iter__(self) -> Iterator[Item]:
        generator = random.Random(random.getrandbits(64))
        last: tuple[Pixels, int] | None = None
        owed, bad = 0, []  # at the start of the stream the first readable one stands in
        for member in self.images.members():
            owed += 1
            try:
                last = member.read(self.transform.reduction, self.transform.channels), self.images.label(member.number)
            except UnreadableImage as error:
                bad.append((member.name, str(error)))
            while last and owed:
                image, erased = self.transform(last[0], generator)
                yield image, last[1], erased, bad
                owed, bad = owed - 1, []
        for turn in range(owed):
            yield None, -1, None, [] if turn else bad


class StreamEvalSet(IterableDataset[Item]):
    """One process's share of a stream's images: every ``world``-th; an unreadable one is left out and reported."""

    def __init__(self, images: StreamImages, transform: EvalTransform, rank: int, world: int) -> None:
        self.images, self.transform, self.rank, self.world = images, transform, rank, world

    def __iter__(self) -> Iterator[Item]:
        for member in itertools.islice(self.images.members(), self.rank, None, self.world):
            try:
                pixels = member.read(self.transform.reduction, self.transform.channels)
                yield self.transform.pixels(pixels), self.images.label(member.number), None, []
            except UnreadableImage as error:
                yield None, -1, None, [(member.name, str(error))]


class EpochOrder(Sampler[list[Key]]):
    """The batches of one process in one epoch, from ``start`` on; set ``epoch`` and ``start`` before iterating.

    All processes draw the same order and take turns, a batch each; what does not fill a batch for all is left to other
    epochs. ``balanced`` draws every class equally often, with repetition.
    """

    def __init__(
        self,
        images: MapImages,
        batch_size: int,
        seed: int,
        *,
        balanced: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.n, self.batch_size, self.seed = len(images), batch_size, seed
        self.rank, self.world = rank, world
        self.epoch = self.start = 0
        self.by_class: NDArray[np.int64] | None = None
        if balanced:
            check_one_class(images, "balanced sampling")
            if images.labels is None:
                raise UlsamError("balanced sampling needs a data set that lists its labels; use `sampler=shuffle`")
            labels = np.asarray(images.labels)
            self.by_class, self.sizes = np.argsort(labels, kind="stable"), np.unique(labels, return_counts=True)[1]
        if len(self) == 0:
            raise UlsamError(
                f"{self.n} training images do not fill one batch of {batch_size} for {world} process(es): "
                f"use `batch_size={max(1, self.n // world)}` or less"
            )

    def __len__(self) -> int:
        return self.n // (self.batch_size * self.world)

    def __iter__(self) -> Iterator[list[Key]]:
        generator = torch.Generator().manual_seed(_mixed(self.seed, 0, self.epoch))
        if self.by_class is None:
            order = torch.randperm(self.n, generator=generator).numpy()
        else:  # torch.multinomial takes no more than 2^24
            drawn = torch.randint(len(self.sizes), (self.n,), generator=generator).numpy()
            within = torch.rand(self.n, dtype=torch.float64, generator=generator).numpy() * self.sizes[drawn]
            order = self.by_class[(np.cumsum(self.sizes) - self.sizes)[drawn] + within.astype(np.int64)]
        for batch in range(self.start, len(self)):
            first = (batch * self.world + self.rank) * self.batch_size
            yield [(self.epoch, place, int(order[place])) for place in range(first, first + self.batch_size)]


class Loader(DataLoader[Item]):
    """PyTorch's loader, which normalizes and erases a batch at once, on ``device``.

    A reading process that dies is noticed where its batch is missed, and reported in one line. PyTorch reports it from
    a handler of SIGCHLD, which can raise at any line of the program.
    """

    def __init__(
        self, dataset: Dataset[Item], normalize: Normalize, device: torch.device, workers: int, **options: Any
    ) -> None:
        if not 0 <= workers <= MAX_WORKERS:
            raise UlsamError(f"`workers` must be 0 to {MAX_WORKERS}, not {workers}")
        self.normalize, self.target = normalize, device
        super().__init__(
            dataset,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=device.type == "cuda",
            worker_init_fn=_quiet,
            **options,
        )

    def check_worker_number_rationality(self) -> None:
        """As many as the user asks for: without PyTorch's warning where there are fewer cores."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        child_ended: int | None = getattr(signal, "SIGCHLD", None)  # Windows has no such signal
        handler = child_ended and signal.getsignal(child_ended)
        if self.num_workers:
            gc.collect()  # a forked process hangs when it collects what has threads, as an ONNX Runtime session has
            if multiprocessing.get_start_method() == "forkserver":  # on Linux by default from Python 3.14 on
                multiprocessing.set_forkserver_preload(["__main__", __name__])  # else each imports it, for seconds
        try:
            batches = super().__iter__()
        except OSError as error:
            raise MachineError(f"cannot start processes that read images: {_fault(error, []) or error}") from error
        if child_ended and signal.getsignal(child_ended) is not handler:
            signal.signal(child_ended, handler)
        return map(self._finish, _alive(batches))

    def _finish(self, batch: Batch) -> Batch:
        """Bytes to the model's input."""
        if len(batch.labels):
            batch.images = self.normalize(batch.images.to(self.target, non_blocking=True))
        for number, box in batch.erased:
            batch.images[number, :, box.top : box.top + box.height, box.left : box.left + box.width] = 0
        return batch


def _alive(batches: Iterator[Any]) -> Iterator[Batch]:
    """The batches; what ends a process that reads them, or the connection to it, is one line."""
    while True:
        try:
            batch = next(batches, None)
        except UlsamError as error:
            raise _as_it_was(error) from error
        except (OSError, EOFError, RuntimeError, MemoryError) as error:
            lost = isinstance(error, ConnectionError | EOFError) or str(error).startswith("DataLoader worker")
            if fault := _fault(error, [process.exitcode for process in getattr(batches, "_workers", ())]):
                raise MachineError(f"cannot read images: {fault}") from error
            if not lost:
                raise
            raise UlsamError("a process that reads images was killed (memory full?): use fewer `workers`") from error
        if batch is None:
            return
        yield batch


def _fault(error: Exception, codes: list[int | None]) -> str | None:
    """What the machine lacked when a batch did not come, by the error here and the exit codes of the readers."""
    full = os.strerror(errno.ENOSPC)
    if full in str(error) or errno.ENOSPC in codes or (hasattr(signal, "SIGBUS") and -signal.SIGBUS in codes):
        return "/dev/shm, where they hand them over, is full: enlarge it (docker run --shm-size=2g), or use `workers=0`"
    if "Too many open files" in str(error):
        return machine_fault(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
    ended = [code for code in codes if code in errno.errorcode and code != 1]
    if ended and ended[0]:
        return machine_fault(OSError(ended[0], os.strerror(ended[0])))
    return None if isinstance(error, ConnectionError) else machine_fault(error)


def _as_it_was(error: UlsamError) -> UlsamError:
    """An error of a reading process without what PyTorch adds: where it arose, on lines before the last one."""
    text = str(error)
    return type(error)(text.rstrip().splitlines()[-1].partition(": ")[2]) if text.startswith("Caught ") else error


def train_loader(
    images: AnyImages,
    transform: Transform,
    order: EpochOrder | None,
    *,
    batch_size: int,
    seed: int,
    workers: int,
    cache: ImageCache | None = None,
    device: torch.device = CPU,
) -> Loader:
    """Batches of training images: in ``order``, or, for a stream (order None), in the stream's own."""
    if isinstance(images, StreamImages):  # new workers each epoch: their generators are seeded when they start
        dataset = StreamTrainSet(images, transform)
        return Loader(dataset, transform.normalize, device, workers, batch_size=batch_size, drop_last=True)
    return Loader(
        TrainSet(images, transform, seed, cache),
        transform.normalize,
        device,
        workers,
        batch_sampler=order,
        persistent_workers=workers > 0,
    )


def eval_loader(
    images: AnyImages,
    transform: EvalTransform,
    *,
    batch_size: int,
    workers: int,
    rank: int = 0,
    world: int = 1,
    device: torch.device = CPU,
) -> Loader:
    """Batches of this process's share of the images: every image is in exactly one process's share."""
    if isinstance(images, StreamImages):
        stream = StreamEvalSet(images, transform, rank, world)
        return Loader(stream, transform.normalize, device, workers, batch_size=batch_size)
    share = range(rank, len(images), world)
    dataset = EvalSet(images, transform)
    return Loader(dataset, transform.normalize, device, workers, batch_size=batch_size, sampler=share)


def collate(items: list[Item]) -> Batch:
    """Stack what was read."""
    read = [(image, label, erased) for image, label, erased, _ in items if image is not None]
    images = torch.stack([image for image, *_ in read]) if read else torch.empty(0)
    labels = as_labels([label for _, label, _ in read])
    boxes = [(number, box) for number, (*_, box) in enumerate(read) if box]
    return Batch(images, labels, [bad for *_, unreadable in items for bad in unreadable], boxes)


def seed_all(*numbers: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators with a mixture of ``numbers``."""
    value = _mixed(*numbers)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


def _mixed(*numbers: int) -> int:
    low, high = np.random.SeedSequence(numbers).generate_state(2)
    return int(high) << 31 | int(low) >> 1


def _quiet(_: int) -> None:
    """Ctrl-C, SIGTERM and SIGHUP go to the whole process group, but it is the main process that ends its workers.

    So a worker outlives the others by 5 seconds, in which the main process can finish its step; not for ever, because
    SIGTERM is also what ends a worker that hangs. Windows has no SIGTERM from outside, and no niceness.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    setattr(multiprocessing.queues.Queue, "_on_queue_feeder_error", staticmethod(_not_handed_over))  # noqa: B010
    if hasattr(signal, "alarm"):
        for number in set(active_stop_signals()) - {signal.SIGINT}:
            signal.signal(number, lambda *_: signal.alarm(5))
    parent = multiprocessing.parent_process()
    if parent and parent.pid != os.getppid():  # a fork server's child: PyTorch would wait for that one to go
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    if hasattr(os, "nice"):  # batches are read ahead, but a training step waits for each thread whose core is taken
        os.nice(5)


def _not_handed_over(error: Exception, batch: Any) -> None:
    """End this process with an exit code that says why: Python drops what cannot be sent, and it is waited for."""
    codes = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC)
    os._exit(next((code for code in codes if os.strerror(code) in str(error)), 1))


def _end_with(parent: Any) -> None:
    """End this process when the one that it reads for is gone, however that ended."""
    parent.join()
    os._exit(1)
