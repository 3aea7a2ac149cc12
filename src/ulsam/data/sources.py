"""Where images come from: an image folder, or a data set of timm's factory; `ulsam.data.opening` opens them."""

import functools
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from timm.data.readers.reader_wds import ReaderWds
from torchvision.datasets import DatasetFolder

from ulsam.base.class_names import class_numbers
from ulsam.base.errors import MachineError, UlsamError, a_few, first_line
from ulsam.base.reading import machine_errors, machine_fault
from ulsam.data.class_numbers import BY_POSITION
from ulsam.data.folder import IMAGE_SUFFIXES, Folder
from ulsam.data.image_channels import lacking, opened_pixels
from ulsam.data.images import Pixels, Reduction, UnreadableImage, read_pixels, whole
from ulsam.data.sample_list import Sample, SampleList


@dataclass(frozen=True)
class FolderImages:
    """Images of an image folder; what they are made of is kept as a :class:`SampleList`."""

    samples: Sequence[Sample]
    classes: tuple[str, ...]
    split: str = "training"  # what to call them
    in_table: bool = False  # whether a table says which labels they have, and not the folders that they lie in

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", SampleList(self.samples))

    @property
    def labels(self) -> NDArray[np.int32] | None:
        """The class index of every image; None where an image may have several."""
        return SampleList(self.samples).labels

    @property
    def folder(self) -> Folder:
        """The images as a folder of them alone."""
        return Folder(Path(), self.classes, SampleList(self.samples))

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def names(self) -> Sequence[str]:
        """What distinguishes these images from others, wherever they lie; with their labels where folders say none."""
        paths = _relative(path for path, _ in self.samples)
        if not self.in_table:
            return paths
        words = self.folder.words
        return [f"{path}\t{words(label)}" for path, (_, label) in zip(paths, self.samples, strict=True)]

    @property
    def state(self) -> str:
        """What shows that a file was changed, without reading it: digests of all sizes, and of all times in seconds."""
        sizes, times = hashlib.sha256(), hashlib.sha256()
        for path, _ in self.samples:
            try:
                found = os.stat(path)
                size, changed = found.st_size, int(found.st_mtime)
            except OSError:  # it is reported when it is read
                size = changed = -1
            sizes.update(f"{size} ".encode())
            times.update(f"{changed} ".encode())
        return f"sizes {sizes.hexdigest()[:8]}, times {times.hexdigest()[:8]}"

    def name(self, index: int) -> str:
        """What messages call the image."""
        return self.samples[index][0]

    def fetch(self, index: int, reduction: Reduction = whole, channels: int = 3) -> tuple[Pixels, int]:
        """The image as of `read_pixels`, [H, W, channels], and its class index, with its errors."""
        path, label = self.samples[index]
        return read_pixels(path, reduction, channels=channels), label


@dataclass(frozen=True)
class LabelSetImages(FolderImages):
    """Images of a table that may have several labels each; the label of a sample is the number of its set of them.

    ``sets`` [sets, classes] says which classes each set has.
    """

    sets: NDArray[np.bool_] = field(kw_only=True)

    @property
    def labels(self) -> None:
        """None: an image has no class of its own."""
        return None

    @property
    def folder(self) -> Folder:
        """As of :class:`FolderImages`."""
        return Folder(Path(), self.classes, SampleList(self.samples), sets=self.sets)


def check_one_class(images: "AnyImages", what: str) -> None:
    """Raise unless each image has one class.

    Raises:
        UlsamError: they may have several labels; ``what`` is what is for one class alone.
    """
    if isinstance(images, LabelSetImages):
        raise UlsamError(f"{what} is for one class an image, and these images may have several labels")


class _FactoryData:
    """A data set of timm's factory."""

    def __init__(self, dataset: Any, title: str, classes: tuple[str, ...], split: str = "training") -> None:
        self.dataset, self.title, self.classes, self.split = dataset, title, classes, split
        self.numbers: dict[int, int] | None = None
        if isinstance(dataset, DatasetFolder):
            dataset.samples = SampleList(dataset.samples)
            dataset.targets = dataset.samples.labels
            dataset.__dict__.pop("imgs", None)  # an image folder's other name for them

    def number_like(self, classes: tuple[str, ...], by_number: bool = False) -> None:
        """Number the labels as in ``classes``, by the classes' names, or leave them as they are.

        Raises:
            UlsamError: a class that is not among ``classes``; or, by number, not as many classes.
        """
        found = class_numbers(self.classes, classes)
        unknown = [name for name in self.classes if name not in found]
        if by_number and len(self.classes) != len(classes):
            raise UlsamError(f"{self.title} has {len(self.classes)} classes, the model has {len(classes)}")
        if unknown and not by_number:
            raise UlsamError(
                f"{self.title} has classes that were not trained on: {a_few(unknown)}; known are {a_few(classes)}. "
                f"{BY_POSITION}"
            )
        if not by_number:
            self.numbers = {number: found[name] for number, name in enumerate(self.classes)}
        self.classes = classes

    def label(self, number: int) -> int:
        """The class index that a number of the data set means; -1 for one whose name is not known."""
        return number if self.numbers is None else self.numbers.get(number, -1)


class FactoryImages(_FactoryData):
    """A map-style data set of timm's factory (``torch/...``, ``hfds/...``); as :class:`FolderImages`."""

    @property
    def labels(self) -> NDArray[np.int32] | None:
        """The class index of every image, None where it is unknown without reading."""
        targets = getattr(self.dataset, "targets", None)
        return None if targets is None else np.array([self.label(int(number)) for number in targets], np.int32)

    @property
    def names(self) -> Sequence[str]:
        """As of :class:`FolderImages`; without file names, the labels."""
        samples = getattr(self.dataset, "samples", None)
        return (
            _relative(str(sample[0]) for sample in samples)
            if samples
            else [str(label) for label in (() if self.labels is None else self.labels)]
        )

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        """What messages call the image."""
        samples = getattr(self.dataset, "samples", None)
        return str(samples[index][0]) if samples else f"{self.title}, image {index}"

    def fetch(self, index: int, reduction: Reduction = whole, channels: int = 3) -> tuple[Pixels, int]:
        """As of :class:`FolderImages`."""
        if isinstance(self.dataset, DatasetFolder):
            path, number = self.dataset.samples[index]
            return read_pixels(path, reduction, channels=channels), self.label(number)
        name = self.name(index)
        try:
            with machine_errors(name):
                if not hasattr(self.dataset, "reader"):
                    image, number = self.dataset[index]
                    return _opened(image, name, channels), self.label(int(number))
                file, number = self.dataset.reader[index][:2]
        except (OSError, SyntaxError) as error:
            raise UnreadableImage(f"{name}: {first_line(error)}") from error
        if isinstance(file, io.BytesIO):
            file.name = name
        return read_pixels(file, reduction, channels=channels), self.label(int(number))


@dataclass(frozen=True)
class Member:
    """One image of a stream: the file that it was stored as, or the image where the stream has opened it."""

    name: str
    file: io.BytesIO | Image.Image | None  # None: something lacks
    number: int

    def read(self, reduction: Reduction = whole, channels: int = 3) -> Pixels:
        """The image as of `read_pixels`, [H, W, channels], with its errors."""
        if self.file is None:
            raise UnreadableImage(f"{self.name}: no image, or no class number (.cls), under this name")
        if isinstance(self.file, Image.Image):
            return _opened(self.file, self.name, channels)
        return read_pixels(self.file, reduction, channels=channels)


class StreamImages(_FactoryData):
    """An iterable data set of timm's factory (``wds/...``, ``tfds/...``, ``hfids/...``), read shard by shard.

    Training images are shared out among the processes by timm's reader, in whole shards; other images pass every
    process whole.
    """

    labels = None

    def __init__(self, dataset: Any, title: str, classes: tuple[str, ...], split: str, is_training: bool) -> None:
        super().__init__(dataset, title, classes, split)
        if not is_training:  # as timm's reader shares them out, some would be missed and others counted twice
            dataset.reader.dist_rank, dataset.reader.dist_num_replicas = 0, 1

    @property
    def names(self) -> Sequence[str]:
        """The shards; empty where the reader does not list them."""
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
        """The images of this process, or of this worker of it, none of them opened yet where that can be had."""
        reader = self.dataset.reader
        fresh = isinstance(reader, ReaderWds) and reader.ds is None
        if fresh:
            import webdataset

            reader._lazy_init()
            for stage in reader.ds.pipeline:
                if "handler" in getattr(stage, "kw", {}):
                    stage.kw["handler"] = functools.partial(_pass_over, stage.kw["handler"])
            unopened = webdataset.map(functools.partial(_member, alt_label=reader.split_info.alt_label))
            reader.ds.pipeline[-2:] = [unopened]  # in place of timm's decoding, which ends in RGB and skips the rest
        for count, (found, number) in enumerate(self.dataset):
            yield found if isinstance(found, Member) else Member(f"{self.title}, image {count}", found, int(number))


def _pass_over(handler: Callable[[Exception], bool], error: Exception) -> bool:
    """WebDataset passes over a shard, or a part of it, that cannot be read; not where that is the machine's fault."""
    if fault := machine_fault(error):
        raise MachineError(f"cannot read {getattr(error, 'filename', None) or 'a shard'}: {fault}") from error
    return handler(error)


def _member(sample: dict[str, Any], alt_label: str) -> dict[str, Any] | None:
    """A sample of a shard as timm's reader passes it on: a :class:`Member`; None if it is to be left out."""
    try:
        number = int(json.loads(sample["json"])[alt_label] if alt_label else sample["cls"])
        content = next(value for key, value in sample.items() if f".{key}" in IMAGE_SUFFIXES)
    except (LookupError, ValueError, TypeError, StopIteration):
        number, content = 0, None
    if alt_label and number < 0:  # how timm marks what has no class of this kind
        return None
    file = None if content is None else io.BytesIO(content)
    member = Member(f"{sample['__url__']}/{sample['__key__']}", file, number)
    if file is not None:
        file.name = member.name
    return {"image": member, "target": number}


MapImages = FolderImages | FactoryImages
AnyImages = MapImages | StreamImages


def _opened(image: Image.Image, name: str, channels: int) -> Pixels:
    pixels = opened_pixels(image, channels)
    if pixels is None:
        raise UnreadableImage(f"{name}: {lacking(channels)}")
    return pixels


def _relative(paths: Iterable[str]) -> list[str]:
    """The paths from the folder on that holds them all."""
    found = list(paths)
    if len({os.path.isabs(path) for path in found}) > 1:  # of a table
        found = [os.path.abspath(path) for path in found]
    root = os.path.commonpath([min(found), max(found)]) if found else ""  # what these two share, all share
    return [path[len(root) :] for path in found]
