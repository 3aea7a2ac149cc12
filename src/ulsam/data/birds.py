"""The generated data set: an image folder of drawn birds, whose classes differ in their field marks alone.

The marks differ in size and spatial frequency, and where each lies is written down for every image. Colors, pose,
place, scene, light and what hides the bird vary at random in the same way for all classes.
"""

import dataclasses
import difflib
import functools
import itertools
import json
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from ulsam.base.errors import UlsamError
from ulsam.base.files import check_empty, whole_folder
from ulsam.base.reading import read_text
from ulsam.data.bird_drawing import Bill, Box, Marks, Spots, Tail, draw_bird

VERSION = 1
"""Of the drawing: it rises whenever an image of a given seed changes."""

MIN_SIZE, MAX_SIZE = 32, 1024
_WING_BARS = (2, 5, 0)
_WORDS: dict[str, dict[Any, str]] = {
    "wing_bars": {2: "broadbar", 5: "finebar", 0: "plainwing"},
    "spots": {"coarse": "spotted", "fine": "speckled", "none": "plain"},
    "bill": {"short": "shortbill", "long": "longbill", "hooked": "hookbill"},
    "tail": {"square": "", "forked": "forktail"},
    "eye_ring": {False: "", True: "ringeye"},
}


def class_marks(classes: int | Sequence[str]) -> list[tuple[str, Marks]]:
    """The first classes of the design, or the named ones, as (name, marks): every combination of marks is one class.

    The first 8 combine 2 or 5 wing bars, coarse or fine spots, and a short or long bill; up to 27 the third level of
    each joins, up to 54 the forked tail, up to 108 the eye ring. A larger set of classes begins with the smaller one.

    Raises:
        UlsamError: fewer than 2 classes, or more than there are combinations; a name that is none of theirs, or twice.

    >>> [name for name, _ in class_marks(3)]
    ['broadbar-spotted-shortbill', 'broadbar-spotted-longbill', 'broadbar-speckled-shortbill']
    """
    levels = (_WING_BARS, get_args(Spots), get_args(Bill), get_args(Tail), (False, True))
    design = sorted(
        itertools.product(*(range(len(level)) for level in levels)),
        key=lambda chosen: (chosen[4], chosen[3], max(chosen[:3]) == 2, chosen),
    )
    number = classes if isinstance(classes, int) else len(classes)
    if not 2 <= number <= len(design):
        raise UlsamError(f"the number of bird classes must be 2 to {len(design)}: got {number}")
    marks = [Marks(*(level[i] for level, i in zip(levels, chosen, strict=True))) for chosen in design]
    every = {_name(each): each for each in marks}
    names = list(every)[:number] if isinstance(classes, int) else classes
    for name in names:
        if name not in every:
            near = difflib.get_close_matches(name, every, n=1) or list(every)[:1]
            raise UlsamError(f"no bird class is called {name!r}; write it as {near[0]}")
    if len(set(names)) < number:
        raise UlsamError(f"a bird class is named twice: {', '.join(names)}")
    return [(name, every[name]) for name in names]


def draw_birds(
    root: str | os.PathLike[str],
    classes: int | Sequence[str] = 8,
    train: int = 60,
    val: int = 20,
    test: int = 0,
    size: int = 96,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Draw the data set as an ordinary image folder, ``root/train/CLASS/0000.jpg`` and so on.

    Each image depends on seed, split, class, number and size alone: a set with more classes or images begins with
    those of the smaller one. ``root/birds.json`` holds what was asked for and the marks of each class,
    ``root/boxes.json`` where each mark lies in each image. Whatever goes wrong, an unfinished set is never left behind
    as if it were whole; what a killed drawing left in a hidden folder beside ``root`` is cleared by the next one.

    Args:
        root: a folder that does not exist yet, or is empty.
        classes: number of classes, 2 to 108, or their names, as :func:`class_marks` has them.
        train, val, test: images of each class in that split; a split of 0 is left out, ``train`` may not be.
        size: side of the images in pixels, 32 to 1024.
        seed: any integer.
        progress: called after each image with (images drawn, images in all).

    Returns:
        `root` as a path.

    Raises:
        UlsamError: a number out of range, a folder that holds something, or one that cannot be written.

    >>> import tempfile
    >>> root = draw_birds(Path(tempfile.mkdtemp()) / "birds", classes=2, train=1, val=1, size=32)
    >>> sorted(path.relative_to(root).as_posix() for path in root.glob("val/*/*"))
    ['val/broadbar-spotted-longbill/0000.jpg', 'val/broadbar-spotted-shortbill/0000.jpg']
    """
    root = Path(root)
    named = class_marks(classes)
    counts = {"train": train, "val": val, "test": test}
    for split, count in counts.items():
        if count < (split == "train"):
            raise UlsamError(f"{split} must be {int(split == 'train')} or more images a class: got {count}")
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise UlsamError(f"size must be {MIN_SIZE} to {MAX_SIZE} pixels: got {size}")
    try:
        check_empty(root, hidden=True)
        with whole_folder(root) as part:
            boxes = _draw_all(part, named, counts, size, seed, progress)
            asked = {"generator": "ulsam birds", "version": VERSION, "seed": seed, "size": size, **counts}
            facts = {**asked, "classes": {name: _facts(marks) for name, marks in named}}
            (part / "birds.json").write_bytes(json.dumps(facts, indent=2).encode() + b"\n")
            (part / "boxes.json").write_bytes(json.dumps(boxes, separators=(",", ":")).encode() + b"\n")
    except OSError as error:
        raise UlsamError(f"cannot write {root}: {(error.strerror or str(error)).lower()}") from error
    return root


def mark_boxes(image: str | os.PathLike[str]) -> tuple[int, dict[str, Box]] | None:
    """Where the field marks lie in an image of a set of :func:`draw_birds`; None for any other image.

    Args:
        image: its path, ``ROOT/SPLIT/CLASS/NAME`` beside ``ROOT/boxes.json``.

    Returns:
        The side of the image in pixels, and the box of each field of `Marks`.

    Raises:
        UlsamError: the files that describe the set are damaged.

    >>> mark_boxes("holiday/1.jpg") is None
    True
    """
    path = Path(os.path.abspath(image))
    try:
        root = path.parents[2]
        changed = (root / "boxes.json").stat().st_mtime_ns
    except (IndexError, OSError):
        return None
    size, boxes = _described(root, changed)
    box = boxes.get(path.relative_to(root).as_posix())
    return None if box is None else (size, {name: (x0, y0, x1, y1) for name, (x0, y0, x1, y1) in box.items()})


@functools.lru_cache(maxsize=8)
def _described(root: Path, changed: int) -> tuple[int, dict[str, dict[str, list[int]]]]:
    """The size of a drawn set's images, and all its boxes; ``changed`` is when those were."""
    try:
        facts = json.loads(read_text(root / "birds.json"))
        return int(facts["size"]), json.loads(read_text(root / "boxes.json"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UlsamError(
            f"{root}: birds.json and boxes.json are not those of ulsam birds: draw the set again"
        ) from error


def _draw_all(
    part: Path,
    named: list[tuple[str, Marks]],
    counts: dict[str, int],
    size: int,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> dict[str, dict[str, Box]]:
    """Write every image below `part`; returns their boxes by relative path."""
    boxes: dict[str, dict[str, Box]] = {}
    total = len(named) * sum(counts.values())
    for split, count in counts.items():
        for name, marks in named if count else ():
            (part / split / name).mkdir(parents=True)
            for number in range(count):
                path = f"{split}/{name}/{number:04}.jpg"
                rng = random.Random(f"{VERSION}/{seed}/{split}/{name}/{number}")
                image, boxes[path] = draw_bird(marks, size, rng)
                image.save(part / path, quality=92)
                if progress:
                    progress(len(boxes), total)
    return boxes


def _name(marks: Marks) -> str:
    words = (_WORDS[field][value] for field, value in dataclasses.asdict(marks).items())
    return "-".join(word for word in words if word)


def _facts(marks: Marks) -> dict[str, object]:
    return {**dataclasses.asdict(marks), "bar_period": marks.bar_period, "spot_period": marks.spot_period}
