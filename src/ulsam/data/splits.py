"""Folders that are splits: which names mean train, val and test, and what looks like splits and is not read as such."""

import itertools
import os
import re
from pathlib import Path

from ulsam.base.errors import UlsamError, a_few
from ulsam.data.folder import holds_images, images_below, subfolders

SPLITS = {
    **{"train": "train", "val": "val", "test": "test", "training": "train", "testing": "test"},
    **dict.fromkeys(("valid", "validation", "dev", "eval", "evaluation"), "val"),
}
"""Names of splits in lower case, and which one of train, val and test each means."""

_NO_CLASS = {
    *("images", "image", "img", "imgs", "photos", "pictures", "masks", "labels", "label", "annotations", "annotation"),
    *("data", "dataset", "jpegimages", "macosx", "newfolder", "untitledfolder", "ipynbcheckpoints"),
}


def split_of(name: str) -> str | None:
    """The split that a name means, in any case of letters, with or without ``set`` or ``data`` behind; None for others.

    >>> split_of("Testing"), split_of("train_set"), split_of("dev"), split_of("seg_train"), split_of("dataset")
    ('test', 'train', 'val', None, None)
    """
    word = name.strip().lower()
    return SPLITS.get(word, SPLITS.get(re.sub(r"[\W_]*(set|data)$", "", word)))


def split_within(name: str) -> str | None:
    """The split that a name has as one of its words; None without one, or with two.

    >>> split_within("seg_train"), split_within("val2017"), split_within("PublicTest"), split_within("trainer")
    ('train', 'val', 'test', None)
    """
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)
    found = {split for word in words if (split := split_of(word))}
    return found.pop() if len(found) == 1 else None


def is_no_class(name: str) -> bool:
    """Whether a folder is called like a split, or like another part of a data set than a class.

    >>> is_no_class("Testing"), is_no_class("train2017"), is_no_class("images"), is_no_class("wren")
    (True, True, True, False)
    """
    word = re.sub(r"[\W_\d]+", "", name)
    return word.casefold() in _NO_CLASS or split_of(word) is not None


def has_classes(root: str | os.PathLike[str]) -> bool:
    """Whether a folder, or a split in it, has two class folders or more: of images, and not called like something else.

    Raises:
        UlsamError: no such folder, or one that may not be listed.

    >>> import tempfile
    >>> root = Path(tempfile.mkdtemp())
    >>> for name in ("images", "train/robin", "train/wren"):
    ...     (root / name).mkdir(parents=True)
    ...     (root / name / "1.jpg").touch()
    >>> has_classes(root), has_classes(root / "train" / "wren")
    (True, False)
    """
    root = Path(root)
    for place in [root, *(root / name for name in subfolders(root) if split_of(name))]:
        names = (one for one in subfolders(place) if not is_no_class(one) and not split_within(one))
        if len(list(itertools.islice((one for one in names if holds_images(place / one)), 2))) == 2:
            return True
    return False


def find_splits(root: str | os.PathLike[str]) -> dict[str, Path]:
    """Find the splits of a data set by the names of the subfolders, as of :func:`split_of`.

    ``train`` counts beside a ``val`` or ``test``, or alone when it holds subfolders itself. Anything else is one flat
    folder of class folders, even if a class is called ``train``.

    Returns:
        ``{"train": ..., "val": ..., "test": ...}`` with those that exist; ``{}`` for a flat folder.

    Raises:
        UlsamError: no such folder, it may not be listed, or two folders claim the same split.

    >>> import tempfile
    >>> root = Path(tempfile.mkdtemp())
    >>> for name in ("Training", "valid"):
    ...     (root / name).mkdir()
    >>> {split: path.name for split, path in find_splits(root).items()}
    {'train': 'Training', 'val': 'valid'}
    """
    root = Path(root)
    splits: dict[str, Path] = {}
    for name in subfolders(root):
        split = split_of(name)
        if split is None:
            continue
        if split in splits:
            raise UlsamError(
                f"{root} has two folders for {split}, {splits[split].name} and {name}: keep one of them, or call the "
                "other train, val or test"
            )
        splits[split] = root / name
    if "train" not in splits or (len(splits) == 1 and not subfolders(splits["train"])):
        return {}
    return {split: splits[split] for split in ("train", "val", "test") if split in splits}


def mistaken_splits(root: str | os.PathLike[str]) -> str | None:
    """Why a folder has splits that would be read as classes, or left out, and the remedy; None for one that has none.

    Raises:
        UlsamError: as of :func:`find_splits`.

    >>> import tempfile
    >>> root = Path(tempfile.mkdtemp())
    >>> for name in ("seg_train/robin", "seg_train/wren", "seg_test/robin", "seg_test/wren"):
    ...     (root / name).mkdir(parents=True)
    >>> mistaken_splits(root)
    'seg_test, seg_train look like splits, not like classes: call them test, train'
    """
    root = Path(root)
    splits = find_splits(root)
    if splits:
        return _left_out(root, splits)
    names = subfolders(root)
    return _called_like_splits(root, names) or _below_classes(root, names)


def _left_out(root: Path, splits: dict[str, Path]) -> str | None:
    """Of a folder with splits: whether one lies deeper, or a folder of the same classes is none of them."""
    for split, path in splits.items():
        if (inner := _inner(path)) != path and subfolders(inner):
            return f"the class folders lie one level deeper: move {inner.relative_to(root).as_posix()} to {split}"
    if len(splits) > 1:
        return None
    train = splits["train"]
    classes = set(subfolders(train))
    for name in subfolders(root):
        shared = classes.intersection(subfolders(_inner(root / name))) if root / name != train else ()
        if any(images_below(_inner(root / name) / one)[0] for one in shared):
            return (
                f"{name} has class folders of {train.name} too, and is no split by its name: call it val or test, or "
                "move it elsewhere"
            )
    return None


def _called_like_splits(root: Path, names: list[str]) -> str | None:
    """Of a folder without splits: whether its folders are called like them."""
    by_split = {split: name for name in reversed(names) if (split := split_within(name))}
    if len(by_split) < 2:
        return None
    inner = {split: _inner(root / name) for split, name in by_split.items()}
    inside = {split: set(subfolders(path)) for split, path in inner.items()}
    alike = any(inside[one] & inside[other] for one in inside for other in inside if one < other)
    if not alike and any(images_below(root / name)[0] for name in names if not split_within(name)):
        return None  # classes such as test_tube among others
    listed = sorted(by_split, key=by_split.__getitem__)
    looks = f"{', '.join(by_split[split] for split in listed)} look like splits, not like classes"
    if not any(inside.values()):
        return f"{looks}, and hold no class folders: sort their images into one folder a class, or name a CSV of them"
    if any(path.parent != root for path in inner.values()):
        places = ", ".join(inner[split].relative_to(root).as_posix() for split in listed)
        return f"{looks}: move {places} to {', '.join(listed)}"
    return f"{looks}: call them {', '.join(listed)}" + ("" if "train" in by_split else "; train is lacking")


def _below_classes(root: Path, names: list[str]) -> str | None:
    """Of a folder without splits: whether each of its folders has splits of its own."""
    for name in names:
        by_split = {split: one for one in subfolders(root / name) if (split := split_of(one))}
        if len(by_split) < 2:
            continue
        if any(subfolders(root / name / one) for one in by_split.values()):
            if len(names) == 1:
                return f"the class folders lie one level deeper: did you mean {root / name}?"
            others = a_few([one for one in names if one != name])
            return f"{name} has splits of class folders itself: did you mean {root / name}? Beside it lie {others}"
        here = ", ".join(f"{name}/{one}" for one in by_split.values())
        there = ", ".join(f"{split}/{name}" for split in by_split)
        return f"the splits lie below the classes: move {here} to {there}, and so on, or name a CSV with a column split"
    return None


def _inner(path: Path) -> Path:
    """The folder itself, or the only one in it if that is called like no class: seg_train/seg_train, train/images."""
    inside = subfolders(path)
    return path / inside[0] if len(inside) == 1 and (split_within(inside[0]) or is_no_class(inside[0])) else path
