"""Where pictures come from: an image folder, or a data set of timm's factory."""

import dataclasses
import functools
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import create_dataset
from timm.data.readers.reader_wds import ReaderWds
from torch.utils.data import IterableDataset
from torchvision.datasets import DatasetFolder

from ulsam.data.folder import (
    PICTURE_SUFFIXES,
    Sample,
    class_counts,
    find_splits,
    imbalance_note,
    index_like,
    scan,
    split,
)
from ulsam.data.pictures import Pixels, Reduction, UnreadablePicture, read_pixels, whole
from ulsam.errors import UlsamError, first_line

_FACTORY = ("torch", "hfds", "hfids", "tfds", "wds")  # what a data-set name of timm's factory begins with


@dataclass(frozen=True)
class FolderPictures:
    """Pictures of an image folder."""

    samples: tuple[Sample, ...]
    classes: tuple[str, ...]
    split: str = "training"  # what to call them

    @property
    def labels(self) -> Sequence[int]:
        """The class index of every picture."""
        return [label for _, label in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def names(self) -> Sequence[str]:
        """What tells these pictures from others, wherever they lie."""
        return _relative(path for path, _ in self.samples)

    def name(self, index: int) -> str:
        """What messages call the picture."""
        return self.samples[index][0]

    def fetch(self, index: int, reduction: Reduction = whole) -> tuple[Pixels, int]:
        """The picture as of `read_pixels`, [H, W, 3], and its class index; raises `UnreadablePicture`."""
        path, label = self.samples[index]
        return read_pixels(path, reduction), label


class _Named:
    """A data set of timm's factory."""

    def __init__(self, dataset: Any, title: str, classes: tuple[str, ...], split: str = "training") -> None:
        self.dataset, self.title, self.classes, self.split = dataset, title, classes, split
        self.numbers: dict[int, int] | None = None

    def number_like(self, classes: tuple[str, ...], by_number: bool = False) -> None:
        """Number the labels as in ``classes``, by the classes' names, or leave them as they are.

        Raises:
            UlsamError: a class that is not among ``classes``; or, by number, not as many classes.
        """
        unknown = [name for name in self.classes if name not in classes]
        if by_number and len(self.classes) != len(classes):
            raise UlsamError(f"{self.title} has {len(self.classes)} classes, the net has {len(classes)}")
        if unknown and not by_number:
            raise UlsamError(
                f"{self.title} has classes that were not trained on: {_some(unknown)}; known are {_some(classes)}. If"
                " they are the same ones under other names, --classes-by-number takes them by their position"
            )
        if not by_number:
            self.numbers = {number: classes.index(name) for number, name in enumerate(self.classes)}
        self.classes = classes

    def label(self, number: int) -> int:
        """The class index that a number of the data set means; -1 for one whose name is not known."""
        return number if self.numbers is None else self.numbers.get(number, -1)


class FactoryPictures(_Named):
    """A map-style data set of timm's factory (``torch/...``, ``hfds/...``); as :class:`FolderPictures`."""

    @property
    def labels(self) -> Sequence[int] | None:
        """The class index of every picture, None where it is unknown without reading."""
        targets = getattr(self.dataset, "targets", None)
        return None if targets is None else [self.label(int(number)) for number in targets]

    @property
    def names(self) -> Sequence[str]:
        """As of :class:`FolderPictures`; without file names, the labels."""
        samples = getattr(self.dataset, "samples", None)
        return (
            _relative(str(sample[0]) for sample in samples) if samples else [str(label) for label in self.labels or ()]
        )

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        """What messages call the picture."""
        samples = getattr(self.dataset, "samples", None)
        return str(samples[index][0]) if samples else f"{self.title}, picture {index}"

    def fetch(self, index: int, reduction: Reduction = whole) -> tuple[Pixels, int]:
        """As of :class:`FolderPictures`."""
        if isinstance(self.dataset, DatasetFolder):
            path, number = self.dataset.samples[index]
            return read_pixels(path, reduction), self.label(number)
        if hasattr(self.dataset, "reader"):
            file, number = self.dataset.reader[index][:2]
            if isinstance(file, io.BytesIO):
                file.name = self.name(index)
            return read_pixels(file, reduction), self.label(int(number))
        try:
            picture, number = self.dataset[index]
            return np.array(picture.convert("RGB")), self.label(int(number))
        except (OSError, SyntaxError) as error:
            raise UnreadablePicture(f"{self.name(index)}: {error}") from error


@dataclass(frozen=True)
class Member:
    """One picture of a stream: the file that it was stored as, or the picture where the stream has opened it."""

    name: str
    file: io.BytesIO | Image.Image | None  # None: something lacks
    number: int

    def read(self, reduction: Reduction = whole) -> Pixels:
        """The picture as of `read_pixels`, [H, W, 3]; raises `UnreadablePicture`."""
        if self.file is None:
            raise UnreadablePicture(f"{self.name}: no picture, or no class number (.cls), under this name")
        if isinstance(self.file, Image.Image):
            return np.array(self.file.convert("RGB"))
        return read_pixels(self.file, reduction)


class StreamPictures(_Named):
    """An iterable data set of timm's factory (``wds/...``, ``tfds/...``, ``hfids/...``), read shard by shard.

    Training pictures are shared out among the processes by timm's reader, in whole shards; other pictures pass every
    process whole.
    """

    labels = None

    def __init__(self, dataset: Any, title: str, classes: tuple[str, ...], split: str, is_training: bool) -> None:
        super().__init__(dataset, title, classes, split)
        if not is_training:  # as timm's reader shares them out, some would be missed and others counted twice
            dataset.reader.dist_rank, dataset.reader.dist_num_replicas = 0, 1

    @property
    def names(self) -> Sequence[str]:
        """The shards; empty where the reader does not tell them."""
        return list(getattr(getattr(self.dataset.reader, "split_info", None), "filenames", ()))

    def __len__(self) -> int:
        return int(self.dataset.reader.num_samples)

    def batches(self, batch_size: int, workers: int) -> int:
        """The training batches of each process in an epoch: every worker rounds up to whole ones."""
        self.dataset.set_loader_cfg(num_workers=workers)
        return len(self.dataset) // batch_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the shards."""
        self.dataset.set_epoch(epoch)

    def members(self) -> Iterator[Member]:
        """The pictures of this process, or of this worker of it, none of them opened yet where that can be had."""
        reader = self.dataset.reader
        fresh = isinstance(reader, ReaderWds) and reader.ds is None
        if fresh:
            import webdataset

            reader._lazy_init()
            unopened = webdataset.map(functools.partial(_member, alt_label=reader.split_info.alt_label))
            reader.ds.pipeline[-2:] = [unopened]  # in place of timm's decoding, which ends in RGB and skips the rest
        for count, (found, number) in enumerate(self.dataset):
            yield found if isinstance(found, Member) else Member(f"{self.title}, picture {count}", found, int(number))


def _member(sample: dict[str, Any], alt_label: str) -> dict[str, Any] | None:
    """A sample of a shard as timm's reader passes it on: a :class:`Member`; None if it is to be left out."""
    try:
        number = int(json.loads(sample["json"])[alt_label] if alt_label else sample["cls"])
        content = next(value for key, value in sample.items() if f".{key}" in PICTURE_SUFFIXES)
    except (LookupError, ValueError, TypeError, StopIteration):
        number, content = 0, None
    if alt_label and number < 0:  # how timm marks what has no class of this kind
        return None
    file = None if content is None else io.BytesIO(content)
    member = Member(f"{sample['__url__']}/{sample['__key__']}", file, number)
    if file is not None:
        file.name = member.name
    return {"image": member, "target": number}


MapPictures = FolderPictures | FactoryPictures
AnyPictures = MapPictures | StreamPictures


def open_data(
    data: str,
    *,
    data_dir: str | None = None,
    train_split: str = "train",
    val_split: str | None = None,
    val_fraction: float | None = None,
    class_names: str | None = None,
    batch_size: int = 32,
    seed: int = 0,
    split_seed: int | None = None,
) -> tuple[AnyPictures, AnyPictures, list[str]]:
    """Open the training and validation pictures of a data set.

    Args:
        data: an image folder (``train/`` with ``val/`` or ``test/``, or class folders alone), or a name of timm's
            factory such as ``torch/imagenet``.
        data_dir: where a named data set lies.
        train_split, val_split: their names; the validation split is by default ``val``, else ``test``, else held out;
            of a named data set ``validation``.
        val_fraction: hold this share of the training pictures out for validation, whatever splits there are; a folder
            without splits holds out 0.2 by default.
        class_names: a text file with the class names, one a line, for a named data set that does not know them.
        batch_size: what a stream rounds its epochs to.
        seed: of a stream's order, and, without ``split_seed``, of the choice of held-out pictures.
        split_seed: of the choice of held-out pictures.

    Returns:
        Training pictures, validation pictures, and one line for the user about each noteworthy thing.

    Raises:
        UlsamError: no such data, or it has not the expected shape.
    """
    if is_named(data):
        if val_fraction is not None:
            raise UlsamError("--val-fraction works on image folders; name a split of this data set with --val-split")
        options: dict[str, Any] = {
            "data_dir": data_dir,
            "class_names": class_names,
            "batch_size": batch_size,
            "seed": seed,
        }
        train = _named(data, train_split, is_training=True, **options)
        val = _named(data, val_split or "validation", is_training=False, **options)
        if train.classes != val.classes:
            raise UlsamError(
                f"{data} has other classes to train on ({_some(train.classes)}) "
                f"than to measure on ({_some(val.classes)})"
            )
        notes = []
        if isinstance(train, StreamPictures):
            notes.append(
                "a stream of shards: epochs are whole batches, and --resume goes back to the start of an epoch"
            )
        elif train.labels is not None:
            counts = Counter(train.labels)
            if note := imbalance_note(train.classes, [counts[label] for label in range(len(train.classes))]):
                notes.append(note)
        return train, val, notes
    return _open_folder(data, train_split, val_split, val_fraction, seed if split_seed is None else split_seed)


def is_named(data: str) -> bool:
    """Whether this is the name of a data set of timm's factory, and no folder."""
    return data.partition("/")[0].lower() in _FACTORY and not os.path.exists(data)


def open_split(
    data: str,
    name: str,
    classes: tuple[str, ...] | None = None,
    *,
    data_dir: str | None = None,
    class_names: str | None = None,
    by_number: bool = False,
) -> AnyPictures:
    """One split to measure on; of a folder without splits, all its pictures.

    Args:
        data, data_dir, class_names: as for :func:`open_data`.
        name: of the split.
        classes: of the net, which number the labels; by default the data set's own.
        by_number: whether the data's classes are the net's by their position, whatever their names.

    Raises:
        UlsamError: no such split, classes that the net does not know, or, by number, not as many.
    """
    if is_named(data):
        pictures = _named(data, name, is_training=False, data_dir=data_dir, class_names=class_names)
        if classes is not None:
            pictures.number_like(classes, by_number)
        return pictures
    splits = find_splits(data)
    if splits and name not in splits:
        raise UlsamError(f"{data} has no split {name!r}; it has {', '.join(splits)}")
    folder = scan(splits.get(name, Path(data)), min_classes=1)
    if classes is not None and by_number and len(classes) != len(folder.classes):
        raise UlsamError(f"{data} has {len(folder.classes)} classes, the net has {len(classes)}")
    if classes is not None:
        folder = dataclasses.replace(folder, classes=classes) if by_number else index_like(folder, classes)
    return FolderPictures(folder.samples, folder.classes, _words(name))


def _open_folder(
    data: str, train_split: str, val_split: str | None, val_fraction: float | None, seed: int
) -> tuple[FolderPictures, FolderPictures, list[str]]:
    splits = find_splits(data)
    for name in (train_split, val_split):
        if name is not None and splits and name not in splits:
            raise UlsamError(f"{data} has no split {name!r}; it has {', '.join(splits)}")
    if val_split is not None and not splits:
        raise UlsamError(f"{data} has no split {val_split!r}: it is one folder of classes; leave --val-split out")
    folder = scan(splits.get(train_split, Path(data)))
    classes, notes = folder.classes, []
    if folder.empty:
        notes.append(f"{len(folder.empty)} class folders without a picture left out: {_some(folder.empty)}")
    if folder.ignored:
        notes.append(f"{len(folder.ignored)} files passed over, no pictures by name: {_some(folder.ignored)}")
    if val_fraction is None and val_split is None:
        val_split = next((name for name in ("val", "test") if name in splits), None)
    if val_split is not None and val_fraction is None:
        train_samples, val_samples = folder.samples, index_like(scan(splits[val_split], 1), classes).samples
        if val_split == "test":
            notes.append("measured on test/: to choose settings, hold pictures out with --val-fraction")
        if val_split == train_split:
            notes.append(f"measured on the pictures that are trained on, split {val_split}")
    else:
        val_split = "held-out"
        train_samples, val_samples = split(folder.samples, 0.2 if val_fraction is None else val_fraction, seed)
        notes.append(f"{len(val_samples)} of {len(folder.samples)} training pictures held out for validation ({seed=})")
    if note := imbalance_note(classes, class_counts(train_samples, len(classes))):
        notes.append(note)
    counts = class_counts(val_samples, len(classes))
    if absent := [name for name, count in zip(classes, counts, strict=True) if not count]:
        notes.append(f"{len(absent)} classes have no validation picture: {_some(absent)}")
    return FolderPictures(train_samples, classes), FolderPictures(val_samples, classes, _words(val_split)), notes


def _named(
    name: str, split_name: str, *, is_training: bool, data_dir: str | None, class_names: str | None, **options: Any
) -> FactoryPictures | StreamPictures:
    if data_dir is None and name.partition("/")[0].lower() in ("torch", "wds"):
        raise UlsamError(f"{name} needs --data-dir, the folder where it lies")
    try:
        dataset = create_dataset(name, root=data_dir, split=split_name, is_training=is_training, **options)
    except ImportError as error:
        raise UlsamError(f"{name} needs a package: {error}; pip install 'ulsam[datasets]'") from error
    except (OSError, RuntimeError, ValueError, AssertionError, KeyError) as error:
        reason = first_line(error).partition(" You can use download")[0]
        where = f"in {data_dir}" if data_dir else "(no --data-dir given)"
        raise UlsamError(f"cannot open {name}, split {split_name!r}, {where}: {reason}") from error
    classes = _read_names(class_names) if class_names else _class_names(dataset)
    if not classes:
        raise UlsamError(f"{name} does not tell its classes: give a text file of their names with --class-names")
    if len(set(classes)) != len(classes):
        raise UlsamError(f"{name} has two classes of one name: give a text file of other names with --class-names")
    if isinstance(dataset, IterableDataset):
        return StreamPictures(dataset, name, classes, split_name, is_training)
    return FactoryPictures(dataset, name, classes, split_name)


def _class_names(dataset: Any) -> tuple[str, ...]:
    names = getattr(dataset, "classes", None)
    if names is None:
        index = getattr(getattr(dataset, "reader", None), "class_to_idx", None) or {}
        names = sorted(index, key=index.__getitem__)
    return tuple(", ".join(name) if isinstance(name, tuple) else str(name) for name in names)


def _read_names(path: str) -> tuple[str, ...]:
    try:
        return tuple(line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UlsamError(f"cannot read the class names in {path}: {error}") from error


def _words(split_name: str) -> str:
    return {"train": "training", "val": "validation"}.get(split_name, split_name)


def _relative(paths: Iterable[str]) -> list[str]:
    """The paths from the folder on that holds them all."""
    found = list(paths)
    root = os.path.commonpath([min(found), max(found)]) if found else ""  # what these two share, all share
    return [path[len(root) :] for path in found]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
