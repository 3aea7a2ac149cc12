"""Images with boxes for detection, as YOLO, COCO and Pascal VOC lay them out: no classes of images."""

import itertools
import os
import re
from pathlib import Path

from ulsam.base.errors import UlsamError
from ulsam.data.folder import IMAGE_SUFFIXES, subfolders
from ulsam.data.splits import has_classes, is_no_class

_VOC = (("JPEGImages", "Annotations"), ("images", "annotations"))  # the folders of images and of XML
_HEAD = 65536  # bytes of a JSON file that are looked at


def boxes_advice(data: str | os.PathLike[str]) -> str | None:
    """What a folder or a file is that holds images with boxes, or is a part of such a data set; None for others.

    Args:
        data: the data set, a folder of its images, or its YAML or JSON.

    Raises:
        UlsamError: the folder may not be listed.

    >>> import tempfile
    >>> root = Path(tempfile.mkdtemp())
    >>> for name in ("images/train", "labels/train"):
    ...     (root / name).mkdir(parents=True)
    >>> _ = (root / "labels/train/1.txt").write_text("0 0.5 0.5 1 1")
    >>> boxes_advice(root / "images" / "train")[:44]
    'images with boxes, as YOLO detects objects: '
    """
    tool = _tool(Path(data))
    if tool is None:
        return None
    detector = "a detector (ulsam.ultralytics)" if tool == "YOLO" else "a detector"
    return (
        f"images with boxes, as {tool} detects objects: train {detector}; to classify, cut the boxes out into one "
        "folder a class, or write the classes of each image into a CSV, path,labels"
    )


def _tool(data: Path) -> str | None:
    if data.is_file():
        return _tool_of_file(data)
    if not data.is_dir():
        return None
    if has_classes(data):
        return None
    if found := _tool_of_folder(data, below=True):
        return found
    try:
        whole = data.resolve()
        for parent in list(whole.parents)[:2]:
            part = whole.relative_to(parent).parts[0]
            if (found := _tool_of_folder(parent, below=False)) and part in _parts(parent, found):
                return found
    except (OSError, UlsamError):  # a parent may be closed to the user
        return None
    return None


def _tool_of_file(file: Path) -> str | None:
    suffix = file.suffix.lower()
    if suffix in (".yaml", ".yml"):
        head = _head(file)
        return "YOLO" if re.search(r"(?m)^(train|val)\s*:", head) and re.search(r"(?m)^(names|nc)\s*:", head) else None
    return "COCO" if suffix == ".json" and _is_coco(file) else None


def _tool_of_folder(root: Path, below: bool) -> str | None:
    """The tool of a data set that lies in a folder, or with ``below`` in a folder of it."""
    names = subfolders(root)
    for place in [root, *(root / name for name in names if below)]:
        in_folders = (place / "images").is_dir() and (place / "labels").is_dir() and _has_boxes(place / "labels")
        if in_folders or _has_boxes_beside(place):
            return "YOLO"
        if any((place / images).is_dir() and next((place / marks).glob("*.xml"), None) for images, marks in _VOC):
            return "Pascal VOC"
    parts = [name for name in names if is_no_class(name)]
    files = [*sorted((root / "annotations").glob("*.json")), *sorted(root.glob("_annotations*.json"))]
    files += [file for name in parts for file in sorted((root / name).glob("_annotations*.json"))]
    return "COCO" if any(map(_is_coco, files)) else None


def _has_boxes(labels: Path) -> bool:
    """Whether a text file below a folder has a line of a class and four numbers or more; most may be empty."""
    files = itertools.islice(labels.rglob("*.txt"), 100)
    return any(map(_is_of_boxes, files))


def _has_boxes_beside(folder: Path) -> bool:
    """Whether a text file of boxes lies beside the image of its name, as Darknet has it."""
    texts = filter(_is_of_boxes, itertools.islice(folder.glob("*.txt"), 100))
    return any(text.with_suffix(suffix).is_file() for text in texts for suffix in IMAGE_SUFFIXES)


def _is_of_boxes(text: Path) -> bool:
    return bool(re.search(r"(?m)^\s*\d+(\s+-?[\d.e-]+){4,}\s*$", _head(text)))


def _is_coco(file: Path) -> bool:
    head = _head(file)
    return head.lstrip().startswith("{") and bool(re.search(r'"(images|annotations|categories)"\s*:\s*\[', head))


def _head(file: Path) -> str:
    with open(file, "rb") as opened:
        return opened.read(_HEAD).decode("utf-8", "replace")


def _parts(root: Path, tool: str) -> set[str]:
    """The subfolders of a data set that belong to it."""
    known = {"YOLO": {"images", "labels"}, "Pascal VOC": {name for pair in _VOC for name in pair}}
    return known.get(tool) or set(filter(is_no_class, subfolders(root)))
