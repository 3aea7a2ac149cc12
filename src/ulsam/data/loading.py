"""From a folder or a data-set name to batches, the same ones whatever the number of workers and restarts.

Every random choice is a function of (seed, epoch, position in the epoch): a worker seeds itself before each picture.
So a run can go on in mid-epoch with nothing saved but its position.
"""

import random
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from ulsam.data.folder import Sample, find_splits, imbalance_note, index_like, scan, split
from ulsam.data.pictures import UnreadablePicture, read_picture
from ulsam.errors import UlsamError

Transform = Callable[[Image.Image], Tensor]
Key = tuple[int, int, int]  # epoch, position in the epoch, picture

#: An unreadable picture is replaced by the next readable one in training; after this many in a row training stops.
TRIES = 50


class Pictures(Protocol):
    """A split of a data set: pictures by number, with labels."""

    classes: tuple[str, ...]
    labels: Sequence[int] | None  # None: not known without reading everything

    def __len__(self) -> int: ...
    def name(self, index: int) -> str: ...
    def fetch(self, index: int) -> tuple[Image.Image, int]: ...


@dataclass(frozen=True)
class FolderPictures:
    """Pictures of an image folder."""

    samples: tuple[Sample, ...]
    classes: tuple[str, ...]

    @property
    def labels(self) -> Sequence[int]:
        return [label for _, label in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        return self.samples[index][0]

    def fetch(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return read_picture(path), label


class FactoryPictures:
    """A map-style data set of timm's factory (``torch/...``, ``hfds/...``)."""

    def __init__(self, dataset: Any, label: str) -> None:
        self.dataset = dataset
        self.label = label
        self.classes = _class_names(dataset, label)
        if hasattr(dataset, "loader"):
            dataset.loader = read_picture  # torchvision's folder sets then read as ours do
        self.labels: Sequence[int] | None = getattr(dataset, "targets", None)

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        if hasattr(self.dataset, "samples"):
            return str(self.dataset.samples[index][0])
        return f"{self.label}, picture {index}"

    def fetch(self, index: int) -> tuple[Image.Image, int]:
        if hasattr(self.dataset, "reader"):
            file, label = self.dataset.reader[index][:2]
            return read_picture(file), int(label)
        picture, label = self.dataset[index]
        return picture.convert("RGB"), int(label)


class StreamPictures:
    """An iterable data set of timm's factory (``wds/...``, ``tfds/...``, ``hfids/...``): shards are read in turn."""

    def __init__(self, dataset: Any, label: str) -> None:
        self.dataset = dataset
        self.classes = _class_names(dataset, label)
        self.labels = None

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the shards, for readers that have one."""
        self.dataset.set_epoch(epoch)


AnyPictures = FolderPictures | FactoryPictures | StreamPictures


def open_data(
    data: str,
    *,
    data_dir: str | None = None,
    train_split: str = "train",
    val_split: str | None = None,
    val_fraction: float | None = None,
    class_map: str | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> tuple[AnyPictures, AnyPictures, list[str]]:
    """Open the training and validation pictures of a data set.

    Args:
        data: an image folder (``train/`` with ``val/`` or ``test/``, or class folders alone), or a name of timm's
            factory such as ``torch/imagenet``.
        data_dir: where a named data set lies.
        train_split, val_split: their names; the default validation split is ``val``, else ``test``, else held out.
        val_fraction: hold this share of the training pictures out for validation, whatever splits there are; a folder
            without splits holds out 0.2 by default.
        class_map: a text file with the class names of a named data set that does not know them (``wds/``), one a line.
        batch_size: what a stream rounds its epochs to.
        seed: of the choice of held-out pictures.

    Returns:
        Training pictures, validation pictures, and one line for the user about each noteworthy thing.

    Raises:
        UlsamError: no such data, or it has not the expected shape.
    """
    if "/" in data and data.split("/", 1)[0].lower() in ("torch", "hfds", "hfids", "tfds", "wds"):
        if val_fraction is not None:
            raise UlsamError("--val-fraction works on image folders; name a split of this data set with --val-split")
        options = {"class_map": class_map, "batch_size": batch_size, "seed": seed}
        return _open_named(data, data_dir, train_split, val_split or "validation", options)
    notes: list[str] = []
    splits = find_splits(data)
    if splits and train_split not in splits:
        raise UlsamError(f"{data} has no split {train_split!r}; it has {', '.join(splits)}")
    folder = scan(splits.get(train_split, Path(data)))
    train = FolderPictures(folder.samples, folder.classes)
    if folder.empty:
        notes.append(f"{len(folder.empty)} class folders without a picture left out: {_some(folder.empty)}")
    if folder.ignored:
        notes.append(f"{len(folder.ignored)} files passed over, no pictures by name: {_some(folder.ignored)}")
    if val_split is None and val_fraction is None:
        val_split = next((name for name in ("val", "test") if name in splits), None)
        val_fraction = None if val_split else 0.2
    if val_fraction is not None:
        kept, held = split(folder.samples, val_fraction, seed)
        train, val = FolderPictures(kept, folder.classes), FolderPictures(held, folder.classes)
        notes.append(f"{len(held)} of {len(folder.samples)} training pictures held out for validation (seed {seed})")
    else:
        val = open_split(data, val_split or "val", train.classes)
    counts = np.bincount(train.labels, minlength=len(train.classes)).tolist()
    if note := imbalance_note(train.classes, counts):
        notes.append(note)
    if absent := sorted(set(range(len(val.classes))) - set(val.labels)):
        notes.append(f"{len(absent)} classes have no validation picture: {_some([val.classes[i] for i in absent])}")
    return train, val, notes


def open_split(
    data: str, name: str, classes: tuple[str, ...] | None = None, data_dir: str | None = None
) -> FolderPictures | FactoryPictures:
    """One split to measure on: of an image folder (``"all"``: its class folders themselves), or of a named data set.

    Args:
        classes: the classes of the net, which give the label numbers; by default the folder's own.

    Raises:
        UlsamError: no such split, or a class that the net does not know.
    """
    if "/" in data and data.split("/", 1)[0].lower() in ("torch", "hfds"):
        pictures = _named(data, data_dir, name, is_training=False)
        assert isinstance(pictures, FactoryPictures)
        if classes is not None and len(classes) != len(pictures.classes):
            raise UlsamError(f"{data} has {len(pictures.classes)} classes, the net has {len(classes)}")
        return pictures
    splits = find_splits(data)
    if splits and name not in splits:
        raise UlsamError(f"{data} has no split {name!r}; it has {', '.join(splits)}")
    folder = scan(splits.get(name, Path(data)), min_classes=1)
    if classes is not None:
        folder = index_like(folder, classes)
    return FolderPictures(folder.samples, folder.classes)


def train_transform(
    input_size: tuple[int, int, int],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str,
    crop_scale: tuple[float, float],
    hflip: float,
    color_jitter: float,
    rand_augment: str | None,
    random_erasing: float,
) -> Transform:
    """timm's training transform: random resized crop, flip, colour jitter or RandAugment, random erasing."""
    transform: Transform = create_transform(
        input_size,
        is_training=True,
        scale=crop_scale,
        hflip=hflip,
        color_jitter=color_jitter or None,
        auto_augment=rand_augment or None,
        interpolation=interpolation,
        mean=tuple(mean),
        std=tuple(std),
        re_prob=random_erasing,
    )
    return transform


def eval_transform(
    input_size: tuple[int, int, int],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str,
    crop_pct: float,
) -> Transform:
    """timm's evaluation transform: resize, centre crop, normalise."""
    transform: Transform = create_transform(
        input_size, interpolation=interpolation, mean=tuple(mean), std=tuple(std), crop_pct=crop_pct
    )
    return transform


@dataclass
class Batch:
    """Pictures [B, C, H, W], labels [B], and what could not be read (name, reason)."""

    images: Tensor
    labels: Tensor
    unreadable: list[tuple[str, str]]


Item = tuple[Tensor | None, int, list[tuple[str, str]]]


class TrainSet(Dataset[Item]):
    """Augmented training pictures by (epoch, position, picture); in place of an unreadable one comes the next."""

    def __init__(self, pictures: FolderPictures | FactoryPictures, transform: Transform, seed: int) -> None:
        self.pictures, self.transform, self.seed = pictures, transform, seed

    def __getitem__(self, key: Key) -> Item:  # type: ignore[override]
        epoch, position, index = key
        bad = []
        for attempt in range(min(TRIES, len(self.pictures))):
            number = (index + attempt) % len(self.pictures)
            try:
                picture, label = self.pictures.fetch(number)
            except UnreadablePicture as error:
                bad.append((self.pictures.name(number), str(error)))
                continue
            seed_all(self.seed, 1, epoch, position)
            return self.transform(picture), label, bad
        return None, -1, bad


class EvalSet(Dataset[Item]):
    """Pictures for measuring; an unreadable one is left out and reported."""

    def __init__(self, pictures: FolderPictures | FactoryPictures, transform: Transform) -> None:
        self.pictures, self.transform = pictures, transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Item:
        try:
            picture, label = self.pictures.fetch(index)
        except UnreadablePicture as error:
            return None, -1, [(self.pictures.name(index), str(error))]
        return self.transform(picture), label, []


class StreamSet(IterableDataset[Item]):
    """A stream's pictures, transformed; its own order and shards."""

    def __init__(self, pictures: StreamPictures, transform: Transform) -> None:
        self.pictures, self.transform = pictures, transform

    def __iter__(self) -> Iterator[Item]:
        for picture, label in self.pictures.dataset:
            yield self.transform(picture.convert("RGB")), int(label), []


class EpochOrder(Sampler[list[Key]]):
    """The batches of one process in one epoch, from ``start`` on; set ``epoch`` and ``start`` before iterating.

    All processes draw the same order and take turns, a batch each; what does not fill a batch for all is left to other
    epochs. ``balanced`` draws every class equally often, with repetition.
    """

    def __init__(
        self,
        pictures: FolderPictures | FactoryPictures,
        batch_size: int,
        seed: int,
        *,
        balanced: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.n, self.batch_size, self.seed = len(pictures), batch_size, seed
        self.rank, self.world = rank, world
        self.epoch = self.start = 0
        self.weights: Tensor | None = None
        if balanced:
            if pictures.labels is None:
                raise UlsamError("balanced sampling needs a data set that tells its labels; use --sampler shuffle")
            labels = torch.as_tensor(pictures.labels)
            self.weights = 1.0 / torch.bincount(labels)[labels].double()
        if len(self) == 0:
            raise UlsamError(
                f"{self.n} training pictures do not fill one batch of {batch_size} for {world} process(es): "
                f"use --batch-size {max(1, self.n // world)} or less"
            )

    def __len__(self) -> int:
        return self.n // (self.batch_size * self.world)

    def __iter__(self) -> Iterator[list[Key]]:
        generator = torch.Generator().manual_seed(_mixed(self.seed, 0, self.epoch))
        if self.weights is None:
            order = torch.randperm(self.n, generator=generator).tolist()
        else:
            order = torch.multinomial(self.weights, self.n, replacement=True, generator=generator).tolist()
        for batch in range(self.start, len(self)):
            first = (batch * self.world + self.rank) * self.batch_size
            yield [(self.epoch, place, order[place]) for place in range(first, first + self.batch_size)]


def train_loader(
    pictures: AnyPictures,
    transform: Transform,
    order: EpochOrder | None,
    *,
    batch_size: int,
    seed: int,
    workers: int,
    pin_memory: bool = False,
) -> "DataLoader[Item]":
    """Batches of training pictures: in ``order``, or, for a stream (order None), in the stream's own."""
    common: dict[str, Any] = {
        "num_workers": workers,
        "collate_fn": collate,
        "pin_memory": pin_memory,
        "worker_init_fn": _quiet,
        "persistent_workers": workers > 0,
    }
    if isinstance(pictures, StreamPictures):
        return DataLoader(StreamSet(pictures, transform), batch_size=batch_size, drop_last=True, **common)
    return DataLoader(TrainSet(pictures, transform, seed), batch_sampler=order, **common)


def eval_loader(
    pictures: AnyPictures,
    transform: Transform,
    *,
    batch_size: int,
    workers: int,
    rank: int = 0,
    world: int = 1,
    pin_memory: bool = False,
) -> "DataLoader[Item]":
    """Batches of this process's share of the pictures: every picture is in exactly one process's share."""
    common: dict[str, Any] = {
        "batch_size": batch_size,
        "num_workers": workers,
        "collate_fn": collate,
        "pin_memory": pin_memory,
        "worker_init_fn": _quiet,
    }
    if isinstance(pictures, StreamPictures):
        return DataLoader(StreamSet(pictures, transform), **common)
    return DataLoader(EvalSet(pictures, transform), sampler=range(rank, len(pictures), world), **common)


def collate(items: list[Item]) -> Batch:
    """Stack what was read."""
    read = [(image, label) for image, label, _ in items if image is not None]
    images = torch.stack([image for image, _ in read]) if read else torch.empty(0)
    labels = torch.tensor([label for _, label in read], dtype=torch.long)
    return Batch(images, labels, [bad for *_, unreadable in items for bad in unreadable])


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
    """Ctrl-C and SIGTERM are the main process's business: workers go on until it ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)


def _named(name: str, data_dir: str | None, split_name: str, **options: Any) -> FactoryPictures | StreamPictures:
    try:
        dataset = create_dataset(name, root=data_dir, split=split_name, **options)
    except ImportError as error:
        raise UlsamError(f"{name} needs a package: {error}; pip install 'ulsam[datasets]'") from error
    except (OSError, RuntimeError, ValueError, AssertionError, KeyError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        where = f"in {data_dir}" if data_dir else "(no --data-dir given)"
        raise UlsamError(f"cannot open {name}, split {split_name!r}, {where}: {reason}") from error
    stream = isinstance(dataset, IterableDataset)
    return StreamPictures(dataset, name) if stream else FactoryPictures(dataset, name)


def _open_named(
    data: str, data_dir: str | None, train_split: str, val_split: str, options: dict[str, Any]
) -> tuple[AnyPictures, AnyPictures, list[str]]:
    train = _named(data, data_dir, train_split, is_training=True, **options)
    val = _named(data, data_dir, val_split, is_training=False, **options)
    if len(train.classes) != len(val.classes):
        raise UlsamError(f"{data}: {len(train.classes)} classes to train on, {len(val.classes)} to measure on")
    notes = []
    if isinstance(train, StreamPictures):
        notes.append("a stream of shards: epochs are whole batches, and --resume goes back to the start of an epoch")
    return train, val, notes


def _class_names(dataset: Any, label: str) -> tuple[str, ...]:
    names = getattr(dataset, "classes", None)
    if names is None:
        index = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
        names = sorted(index, key=index.__getitem__) if index else None
    if not names:
        raise UlsamError(
            f"{label} does not tell its class names: give a text file of them, one a line, with --class-map"
        )
    return tuple(name[0] if isinstance(name, tuple) else str(name) for name in names)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
