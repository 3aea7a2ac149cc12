"""The drawn birds: classes as designed, images as seeded, marks where the boxes say, and nothing for a linear model."""

import dataclasses
import itertools
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops

from ulsam.base.errors import UlsamError
from ulsam.cli import main
from ulsam.data.bird_drawing import Marks, draw_bird
from ulsam.data.birds import class_marks, draw_birds
from ulsam.data.folder import scan
from ulsam.data.images import read_image
from ulsam.data.splits import find_splits

FIELDS = [field.name for field in dataclasses.fields(Marks)]


def message(call: Callable[[], object]) -> str:
    with pytest.raises(UlsamError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_design_is_factorial() -> None:
    every = class_marks(108)
    assert len({name for name, _ in every}) == len({marks for _, marks in every}) == 108
    for count, levels in ((8, (2, 2, 2, 1, 1)), (27, (3, 3, 3, 1, 1)), (54, (3, 3, 3, 2, 1)), (108, (3, 3, 3, 2, 2))):
        columns = list(zip(*(dataclasses.astuple(marks) for _, marks in every[:count]), strict=True))
        assert tuple(len(set(column)) for column in columns) == levels
        assert len(set(zip(*columns, strict=True))) == count == np.prod(levels)
    assert [name for name, _ in every[:8]] == [
        "-".join(words)
        for words in itertools.product(("broadbar", "finebar"), ("spotted", "speckled"), ("shortbill", "longbill"))
    ]
    assert class_marks(12) == every[:12]
    assert class_marks([every[5][0], every[0][0]]) == [every[5], every[0]]


def test_marks_know_their_scale() -> None:
    broad, fine = Marks(wing_bars=2, spots="coarse"), Marks(wing_bars=5, spots="fine")
    assert broad.bar_period == pytest.approx(2.5 * fine.bar_period)
    assert broad.spot_period == pytest.approx(2 * fine.spot_period)
    assert Marks(wing_bars=0).bar_period is Marks(spots="none").spot_period is None


@settings(max_examples=40, deadline=None)
@given(
    marks=st.sampled_from([marks for _, marks in class_marks(108)]),
    size=st.integers(32, 140),
    seed=st.integers(0, 2**32),
)
def test_every_bird_is_whole_and_repeatable(marks: Marks, size: int, seed: int) -> None:
    image, boxes = draw_bird(marks, size, random.Random(seed))
    assert (image.mode, image.size) == ("RGB", (size, size))
    assert list(sorted(boxes)) == sorted(FIELDS)
    for x0, y0, x1, y1 in boxes.values():
        assert 0 <= x0 < x1 <= size
        assert 0 <= y0 < y1 <= size
    again, same = draw_bird(marks, size, random.Random(seed))
    assert (again.tobytes(), same) == (image.tobytes(), boxes)
    other, _ = draw_bird(marks, size, random.Random(seed + 1))
    assert other.tobytes() != image.tobytes()


@pytest.mark.parametrize(
    ("field", "value"), [("wing_bars", 0), ("spots", "none"), ("bill", "long"), ("tail", "forked"), ("eye_ring", True)]
)
def test_a_mark_changes_the_image_inside_its_box_and_nowhere_else(field: str, value: object) -> None:
    other = dataclasses.replace(Marks(), **{field: value})
    for seed in range(20):
        (one, boxes), (two, moved) = (draw_bird(marks, 96, random.Random(seed)) for marks in (Marks(), other))
        changed = ImageChops.difference(one, two).getbbox()
        assert changed is not None
        places = (boxes[field], moved[field])
        x0, y0 = (min(place[side] for place in places) for side in (0, 1))
        x1, y1 = (max(place[side] for place in places) for side in (2, 3))
        assert x0 - 1 <= changed[0] and y0 - 1 <= changed[1] and changed[2] <= x1 + 1 and changed[3] <= y1 + 1


def inside(image: Image.Image, box: tuple[int, int, int, int]) -> np.ndarray:
    return np.asarray(image.convert("L").crop(box), np.float64)


def test_marks_differ_in_frequency_and_not_in_brightness() -> None:
    """Fine marks have more edges than coarse ones in the same place; both cover the same area, so the mean stays."""
    for field, mark, coarse, fine in (
        ("wing_bars", "wing_bars", Marks(wing_bars=2), Marks(wing_bars=5)),
        ("spots", "spots", Marks(spots="coarse"), Marks(spots="fine")),
    ):
        edges, means = {}, {}
        for marks in (coarse, fine):
            patches = [inside(*pick(draw_bird(marks, 96, random.Random(seed)), mark)) for seed in range(100)]
            edges[marks] = np.mean([np.abs(np.diff(patch, axis=1)).mean() for patch in patches])
            means[marks] = np.mean([patch.mean() for patch in patches])
        assert edges[fine] > 1.15 * edges[coarse], field
        assert means[fine] == pytest.approx(means[coarse], rel=0.05), field


def pick(drawn: tuple[Image.Image, dict[str, tuple[int, int, int, int]]], mark: str) -> tuple[Image.Image, tuple]:
    return drawn[0], drawn[1][mark]


def test_the_folder_is_an_ordinary_image_folder(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    root = draw_birds(
        tmp_path / "a" / "birds", 4, train=3, val=2, test=1, size=48, seed=7, progress=lambda *n: seen.append(n)
    )
    assert seen == [(number, 24) for number in range(1, 25)]
    splits = find_splits(root)
    assert list(splits) == ["train", "val", "test"]
    names = tuple(sorted(name for name, _ in class_marks(4)))
    for split, count in (("train", 3), ("val", 2), ("test", 1)):
        folder = scan(splits[split])
        assert folder.classes == names
        assert len(folder.samples) == 4 * count
        assert not folder.ignored
        assert all(read_image(path).size == (48, 48) for path, _ in folder.samples)
    facts = json.loads((root / "birds.json").read_text())
    assert {key: facts[key] for key in ("seed", "size", "train", "val", "test")} == {
        **{"seed": 7, "size": 48, "train": 3, "val": 2, "test": 1}
    }
    for name, marks in class_marks(4):
        assert {field: facts["classes"][name][field] for field in FIELDS} == dataclasses.asdict(marks)
    boxes = json.loads((root / "boxes.json").read_text())
    assert sorted(boxes) == sorted(path.relative_to(root).as_posix() for path in root.glob("*/*/*.jpg"))
    assert {path.name for path in root.iterdir()} == {"train", "val", "test", "birds.json", "boxes.json"}


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.glob("*/*/*.jpg")}


def test_a_larger_set_begins_with_the_smaller_one(tmp_path: Path) -> None:
    small = contents(draw_birds(tmp_path / "small", 2, train=2, val=1, size=40, seed=3))
    large = contents(draw_birds(tmp_path / "large", 5, train=4, val=2, size=40, seed=3))
    assert small.items() < large.items()
    assert len(set(large.values())) == len(large) == 30
    reseeded = contents(draw_birds(tmp_path / "reseeded", 2, train=2, val=1, size=40, seed=4))
    assert reseeded.keys() == small.keys()
    assert not set(reseeded.values()) & set(small.values())


def test_what_cannot_be_drawn_gets_one_line(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert message(lambda: draw_birds(out, 1)) == "the number of bird classes must be 2 to 108: got 1"
    assert "2 to 108: got 109" in message(lambda: draw_birds(out, 109))
    name = "finebar-spotted-shortbill"
    wrong = message(lambda: draw_birds(out, [name, "finebar-spoted-longbill"]))
    assert wrong == "no bird class is called 'finebar-spoted-longbill'; write it as finebar-spotted-longbill"
    assert message(lambda: draw_birds(out, [name, name])) == f"a bird class is named twice: {name}, {name}"
    assert "2 to 108: got 1" in message(lambda: draw_birds(out, [name]))
    assert message(lambda: draw_birds(out, train=0)) == "train must be 1 or more images a class: got 0"
    assert message(lambda: draw_birds(out, val=-1)) == "val must be 0 or more images a class: got -1"
    for size in (31, 1025):
        assert message(lambda size=size: draw_birds(out, size=size)) == f"size must be 32 to 1024 pixels: got {size}"
    assert not out.exists()
    (out / "mine").mkdir(parents=True)
    assert message(lambda: draw_birds(out)).startswith(f"{out} is not an empty folder: name one")
    (tmp_path / "file").write_text("mine")
    assert message(lambda: draw_birds(tmp_path / "file")).startswith(f"{tmp_path / 'file'} is not an empty folder")
    assert (
        message(lambda: draw_birds(tmp_path / "file" / "x"))
        == f"cannot write {tmp_path / 'file' / 'x'}: not a directory"
    )
    assert (tmp_path / "file").read_text() == "mine"


def test_an_interrupted_drawing_leaves_no_set_and_can_be_repeated(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw_birds(tmp_path, 2, train=2, val=1, size=32, progress=interrupt)
    assert not list(tmp_path.iterdir())
    draw_birds(tmp_path, 2, train=2, val=1, size=32)
    assert (tmp_path / "birds.json").exists()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no such signal")
def test_what_a_killed_drawing_left_is_cleared(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from ulsam.data.birds import draw_birds\n"
        "kill = lambda done, total: os.kill(os.getpid(), signal.SIGKILL) if done == 3 else None\n"
        "draw_birds(sys.argv[1], 2, train=2, val=1, size=32, progress=kill)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")]).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    draw_birds(tmp_path / "out", 2, train=2, val=1, size=32)
    assert contents(tmp_path / "out") == contents(draw_birds(tmp_path / "same", 2, train=2, val=1, size=32))
    assert sorted(os.listdir(tmp_path)) == ["out", "same"]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "birds"
    arguments = ["birds", str(out), "--classes", "3", "--train", "2", "--val", "1", "--size", "32", "--seed", "5"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert str(out) in printed
    assert "3 classes" in printed
    assert contents(out) == contents(draw_birds(tmp_path / "same", 3, train=2, val=1, size=32, seed=5))
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"ulsam: error: {out} is not an empty folder")


def ridge_accuracy(train: tuple[np.ndarray, np.ndarray], val: tuple[np.ndarray, np.ndarray], penalty: float) -> float:
    """Validation accuracy of the best linear map from pixels to classes, in closed form in the kernel space."""
    mean = train[0].mean(axis=0)
    rows, tests = train[0] - mean, val[0] - mean
    targets = np.eye(8)[train[1]] - 1 / 8
    gram = rows @ rows.T
    weights = rows.T @ np.linalg.solve(gram + penalty * np.trace(gram) / len(gram) * np.eye(len(gram)), targets)
    return float(((tests @ weights).argmax(axis=1) == val[1]).mean())


@pytest.mark.slow
def test_a_linear_classifier_fails() -> None:
    """Chance is 12.5 %. Ridge regression on the pixels, at two resolutions and two penalties, stays near it."""
    labels = {split: np.repeat(np.arange(8), count) for split, count in (("train", 80), ("val", 60))}
    birds = {
        split: [
            draw_bird(class_marks(8)[label][1], 96, random.Random(f"{split}/{number}"))[0]
            for number, label in enumerate(labels[split])
        ]
        for split in labels
    }
    for side in (16, 48):
        pixels = {
            split: np.stack(
                [np.asarray(bird.resize((side, side), Image.Resampling.BOX), np.float64).ravel() for bird in each]
            )
            for split, each in birds.items()
        }
        for penalty in (0.1, 1.0):
            train, val = ((pixels[split], labels[split]) for split in ("train", "val"))
            assert ridge_accuracy(train, train, 1e-4) > 0.5, "the fit itself must work"
            assert ridge_accuracy(train, val, penalty) < 0.27, (side, penalty)


def test_a_folder_that_is_there_stays_and_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a mount, or the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / f".{tmp_path.name}.partial").mkdir()  # of a killed process
    before = os.stat(".").st_ino
    draw_birds(".", classes=2, train=1, val=1, size=32)
    assert sorted(os.listdir(".")) == ["birds.json", "boxes.json", "train", "val"]
    assert os.stat(tmp_path).st_ino == before
