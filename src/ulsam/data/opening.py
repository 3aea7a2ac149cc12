"""Opens images to train on and to measure on: an image folder, a table of labels, or a data set of timm's factory."""

import os
from typing import Any

import numpy as np
from timm.data import create_dataset
from torch.utils.data import IterableDataset

from ulsam.base.errors import UlsamError, a_few, first_line
from ulsam.base.extras import extra
from ulsam.base.logs import WARNING, say
from ulsam.base.reading import read_text
from ulsam.data.class_numbers import BY_POSITION, index_by_number, index_like
from ulsam.data.folder import Folder, held_out, image_paths, imbalance_note, unread_note
from ulsam.data.folds import parse_fold
from ulsam.data.label_table import is_table
from ulsam.data.labelled import labelled
from ulsam.data.layouts import with_advice
from ulsam.data.sample_list import SampleList
from ulsam.data.sources import AnyImages, FactoryImages, FolderImages, LabelSetImages, StreamImages

_FACTORY = ("torch", "hfds", "hfids", "tfds", "wds")  # what a data-set name of timm's factory begins with


def open_data(
    data: str,
    *,
    data_dir: str | None = None,
    train_split: str = "train",
    val_split: str | None = None,
    val_fraction: float | None = None,
    fold: str | None = None,
    class_names: str | None = None,
    batch_size: int = 32,
    seed: int = 0,
    split_seed: int | None = None,
) -> tuple[AnyImages, AnyImages, list[str]]:
    """Open the training and validation images of a data set.

    Args:
        data: an image folder (``train/`` with ``val/`` or ``test/``, or class folders alone); a CSV of paths and
            labels, as of `ulsam.data.label_table.read_table`; or a name of timm's factory such as ``torch/imagenet``.
        data_dir: where a named data set lies; or where the paths in a CSV count from.
        train_split, val_split: their names; the validation split is by default ``val``, else ``test``, else held out;
            of a named data set ``validation``.
        val_fraction: hold this share of the training images out for validation, whatever splits there are; a folder
            without splits holds out 0.2 by default.
        fold: ``K/N``, in place of ``val_fraction``: hold the Kth of N parts of the training images out.
        class_names: a text file with the class names, one a line, for a named data set that does not know them.
        batch_size: what a stream rounds its epochs to.
        seed: of a stream's order, and, without ``split_seed``, of the choice of held-out images.
        split_seed: of the choice of held-out images.

    Returns:
        Training images, validation images, and one line for the user about each noteworthy thing.

    Raises:
        UlsamError: no such data, or it has not the expected shape.
    """
    if is_named(data):
        if val_fraction is not None or fold is not None:
            what = "val_fraction" if fold is None else "fold"
            raise UlsamError(f"`{what}` works on image folders; name a split of this data set with `val_split`")
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
                f"{data} has other classes to train on ({a_few(train.classes)}) "
                f"than to measure on ({a_few(val.classes)})"
            )
        notes = []
        if isinstance(train, StreamImages):
            notes.append(
                "a stream of shards: epochs are whole batches, and a resumed run goes back to the start of an epoch"
            )
        elif train.labels is not None:
            counts = np.bincount(train.labels[train.labels >= 0], minlength=len(train.classes)).tolist()
            if note := imbalance_note(train.classes, counts[: len(train.classes)]):
                notes.append(note)
        return train, val, notes
    _check_no_names(data, class_names)
    chosen_by = seed if split_seed is None else split_seed
    return _open_local(data, data_dir, train_split, val_split, val_fraction, fold, chosen_by)


def unlabeled(folder: str | os.PathLike[str]) -> FolderImages:
    """All images at any depth below a folder, as of one class.

    Raises:
        UlsamError: there is no such folder, or no image in it.

    >>> unlabeled("missing")
    Traceback (most recent call last):
    ulsam.base.errors.UlsamError: no folder missing
    """
    if not os.path.isdir(folder):
        raise UlsamError(f"no folder {os.fspath(folder)}")
    return FolderImages(SampleList((path, 0) for path in image_paths([os.fspath(folder)])), ("unlabeled",), "unlabeled")


def _check_no_names(data: str, class_names: str | None) -> None:
    """Raise where class names are given for an image folder or a table.

    Raises:
        UlsamError: they are.
    """
    if class_names is not None:
        raise UlsamError(f"`class_names` is for data sets by name, and {data} names its classes: leave it out")


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
    several: bool | None = None,
) -> AnyImages:
    """One split to measure on; of a folder without splits, all its images.

    Args:
        data, data_dir, class_names: as for :func:`open_data`.
        name: of the split.
        classes: of the model, which number the labels; by default the data set's own.
        by_number: whether the data's classes are the model's by their position, as of
            `ulsam.data.class_numbers.index_by_number`.
        several: whether the model gives several labels an image; by default as the data has it.

    Raises:
        UlsamError: no such split, classes that the model does not know, or, by number, not as many.
    """
    if is_named(data):
        if several:
            raise UlsamError(f"{data} has one class an image, and the model several labels: name a CSV of labels")
        images = _named(data, name, is_training=False, data_dir=data_dir, class_names=class_names)
        if classes is not None:
            images.number_like(classes, by_number)
        return images
    _check_no_names(data, class_names)
    found = labelled(data, data_dir=data_dir, several=several)
    folder = found.read(name, min_classes=1)
    if classes is not None:
        with with_advice(data):
            folder = index_by_number(folder, classes) if by_number else index_like(folder, classes, f". {BY_POSITION}")
    if note := unread_note(folder.ignored):
        say(f"note    {data}: {note}", level=WARNING)
    return _images(folder, folder.samples, _words(name), data)


def _open_local(
    data: str,
    data_dir: str | None,
    train_split: str,
    val_split: str | None,
    val_fraction: float | None,
    fold: str | None,
    seed: int,
) -> tuple[FolderImages, FolderImages, list[str]]:
    source = labelled(data, data_dir=data_dir)
    splits = source.splits
    for name in (train_split, val_split):
        if name is not None and splits and name not in splits:
            raise UlsamError(f"{data} has no split {name!r}; it has {', '.join(splits)}")
    if val_split is not None and not splits:
        whole = "one table without a column split" if is_table(data) else "one folder of classes"
        raise UlsamError(f"{data} has no split {val_split!r}: it is {whole}; leave `val_split` out")
    folder = source.read(train_split)
    classes, notes = folder.classes, [source.note] if source.note else []
    if folder.empty:
        notes.append(f"{len(folder.empty)} class folders without an image left out: {a_few(folder.empty)}")
    if folder.ignored:
        notes.append(f"{len(folder.ignored)} files passed over, no images by name: {a_few(folder.ignored)}")
    if unread := unread_note(folder.ignored):
        notes.append(unread)
    holds_out = val_fraction is not None or fold is not None
    if not holds_out and val_split is None:
        val_split = next((name for name in ("val", "test") if name in splits), None)
    if val_split is not None and not holds_out:
        measured = index_like(source.read(val_split, min_classes=1), classes)
        train = _images(folder, folder.samples, "training", data)
        val = _images(measured, measured.samples, _words(val_split), data)
        if val_split == "test":
            notes.append("measured on test/: to choose settings, hold images out with `val_fraction`")
        if val_split == train_split:
            notes.append(f"measured on the images that are trained on, split {val_split}")
    else:
        groups = folder.samples.labels if folder.sets is None else np.zeros(len(folder.samples), np.int32)
        chosen = held_out(
            groups, 0.2 if val_fraction is None else val_fraction, seed, parse_fold(fold) if fold else None
        )
        train = _images(folder, folder.samples.take(np.flatnonzero(~chosen)), "training", data)
        val = _images(folder, folder.samples.take(np.flatnonzero(chosen)), "held-out", data)
        notes.append(f"{len(val)} of {len(folder.samples)} training images held out for validation ({seed=})")
    if not source.several and (note := imbalance_note(classes, train.folder.counts())):
        notes.append(note)
    for images, what in ((train, "training"), (val, "validation")):
        if absent := [name for name, count in zip(classes, images.folder.counts(), strict=True) if not count]:
            notes.append(f"{len(absent)} classes have no {what} image: {a_few(absent)}")
    return train, val, notes


def _images(folder: Folder, samples: SampleList, split: str, data: str) -> FolderImages:
    """Some of the images of a folder or table, under the name of their split."""
    if folder.sets is None:
        return FolderImages(samples, folder.classes, split, is_table(data))
    return LabelSetImages(samples, folder.classes, split, True, sets=folder.sets)


def _named(
    name: str, split_name: str, *, is_training: bool, data_dir: str | None, class_names: str | None, **options: Any
) -> FactoryImages | StreamImages:
    if data_dir is None and name.partition("/")[0].lower() in ("torch", "wds"):
        raise UlsamError(f"{name} needs `data_dir`, the folder where it lies")
    try:
        with extra("datasets", f"{name} needs"):
            dataset = create_dataset(name, root=data_dir, split=split_name, is_training=is_training, **options)
    except UlsamError:
        raise
    except (OSError, RuntimeError, ValueError, AssertionError, KeyError) as error:
        reason = first_line(error).partition(" You can use download")[0]
        where = f"in {data_dir}" if data_dir else "(no `data_dir` given)"
        raise UlsamError(f"cannot open {name}, split {split_name!r}, {where}: {reason}") from error
    classes = _read_names(class_names) if class_names else _class_names(dataset)
    if not classes:
        raise UlsamError(f"{name} does not list its classes: give a text file of their names with `class_names`")
    if len(set(classes)) != len(classes):
        raise UlsamError(f"{name} has two classes of one name: give a text file of other names with `class_names`")
    if isinstance(dataset, IterableDataset):
        return StreamImages(dataset, name, classes, split_name, is_training)
    return FactoryImages(dataset, name, classes, split_name)


def _class_names(dataset: Any) -> tuple[str, ...]:
    names = getattr(dataset, "classes", None)
    if names is None:
        index = getattr(getattr(dataset, "reader", None), "class_to_idx", None) or {}
        names = sorted(index, key=index.__getitem__)
    return tuple(", ".join(name) if isinstance(name, tuple) else str(name) for name in names)


def _read_names(path: str) -> tuple[str, ...]:
    try:
        return tuple(line.strip() for line in read_text(path).splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UlsamError(f"cannot read the class names in {path}: {error}") from error


def _words(split_name: str) -> str:
    return {"train": "training", "val": "validation"}.get(split_name, split_name)
