"""Image folders: classes, images, splits, and one line for every way in which a folder can be wrong."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ulsam.base.errors import UlsamError
from ulsam.data.class_numbers import index_like
from ulsam.data.folder import (
    Folder,
    class_counts,
    imbalance_note,
    scan,
    split,
)
from ulsam.data.opening import open_data
from ulsam.data.splits import find_splits, mistaken_splits
from ulsam.training.config import TrainConfig


def make(root: Path, *names: str) -> Path:
    """Empty files, and folders for names that end in a slash."""
    for name in names:
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.touch()
    return root


def relative(folder: Folder) -> list[tuple[str, int]]:
    return [(Path(path).relative_to(folder.root).as_posix(), label) for path, label in folder.samples]


def message(call: Callable[[], object]) -> str:
    with pytest.raises(UlsamError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_scan_lists_classes_images_and_what_it_passed_over(tmp_path: Path) -> None:
    make(
        tmp_path,
        *("wren/b.jpg", "wren/a.JPEG", "wren/deep/er/c.webp", "robin/1.png", "robin/notes.txt", "robin/Thumbs.db"),
        *(
            "owl/readme.md",
            "kite/",
            ".git/x.jpg",
            "robin/.DS_Store",
            "robin/._1.png",
            "robin/.cache/2.png",
            "labels.csv",
        ),
    )
    folder = scan(tmp_path)
    assert folder.root == tmp_path
    assert folder.classes == ("robin", "wren")
    assert relative(folder) == [("robin/1.png", 0), ("wren/a.JPEG", 1), ("wren/b.jpg", 1), ("wren/deep/er/c.webp", 1)]
    assert folder.empty == ("kite", "owl")
    names = {os.path.relpath(path, tmp_path) for path in folder.ignored}
    assert names == {"labels.csv", "owl/readme.md", "robin/notes.txt", "robin/Thumbs.db"}


def test_samples_are_ordered_by_class_first(tmp_path: Path) -> None:
    make(tmp_path, "a/z.png", "a b/y.png", "a-c/x.png", "B/w.png")
    folder = scan(tmp_path)
    assert folder.classes == ("B", "a", "a b", "a-c")
    assert relative(folder) == [("B/w.png", 0), ("a/z.png", 1), ("a b/y.png", 2), ("a-c/x.png", 3)]


def test_links_to_files_and_class_folders_are_followed(tmp_path: Path) -> None:
    make(tmp_path / "store", "one.png", "class/two.png", "deep/three.png")
    root = make(tmp_path / "set", "owl/here.png", "wren/")
    (root / "wren" / "link.png").symlink_to(tmp_path / "store" / "one.png")
    (root / "wren" / "dangling.png").symlink_to(tmp_path / "store" / "gone.png")
    (root / "wren" / "linked").symlink_to(tmp_path / "store" / "deep")
    (root / "kite").symlink_to(tmp_path / "store" / "class")
    folder = scan(root)
    assert relative(folder) == [
        ("kite/two.png", 0),
        ("owl/here.png", 1),
        ("wren/dangling.png", 2),
        ("wren/link.png", 2),
    ]
    assert folder.ignored == (str(root / "wren" / "linked"),)


def test_a_pipe_is_no_image(tmp_path: Path) -> None:
    make(tmp_path, "owl/1.png", "wren/2.png")
    os.mkfifo(tmp_path / "wren" / "pipe.png")
    assert scan(tmp_path).ignored == (str(tmp_path / "wren" / "pipe.png"),)


def test_folders_that_are_wrong_get_one_line(tmp_path: Path) -> None:
    assert message(lambda: scan(tmp_path / "gone")) == f"no such folder: {tmp_path / 'gone'}"
    make(tmp_path, "file.zip")
    assert message(lambda: scan(tmp_path / "file.zip")).startswith(f"not a folder: {tmp_path / 'file.zip'};")
    flat = make(tmp_path / "flat", "1.jpg", "2.jpg", ".hidden/3.jpg")
    assert "has no class folders: expected one subfolder of images for each class" in message(lambda: scan(flat))
    one = make(tmp_path / "one", "wren/1.jpg", "robin/")
    assert "holds images of 1 class (wren), at least 2 are needed" in message(lambda: scan(one))
    assert scan(one, min_classes=1).classes == ("wren",)
    none = make(tmp_path / "none", "wren/1.txt", "robin/")
    assert message(lambda: scan(none, min_classes=1)).startswith(f"no image in any of the 2 class folders of {none}:")


def test_a_folder_that_may_not_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "owl/1.png", "wren/locked/2.png")
    locked = str(tmp_path / "wren" / "locked")
    list_folder = os.scandir

    def refuse(path: str | os.PathLike[str]) -> object:
        if os.fspath(path) == locked:
            raise PermissionError(13, "Permission denied", locked)
        return list_folder(path)

    monkeypatch.setattr(os, "scandir", refuse)  # permissions do not bind root, who may run the tests
    assert message(lambda: scan(tmp_path)) == f"cannot list the folder {locked}: permission denied"
    assert message(lambda: open_data(str(tmp_path / "wren"))) == f"cannot list the folder {locked}: permission denied"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train/", "val/"], {"train": "train", "val": "val"}),
        (["train/", "valid/", "test/"], {"train": "train", "val": "valid", "test": "test"}),
        (["Train/", "VALIDATION/"], {"train": "Train", "val": "VALIDATION"}),
        (["train/", "test/", "meta/"], {"train": "train", "test": "test"}),
        (["train/robin/1.jpg", "train/wren/1.jpg"], {"train": "train"}),
        (["car/1.jpg", "train/1.jpg", "tram/1.jpg"], {}),
        (["robin/1.jpg", "wren/1.jpg"], {}),
        (["val/1.jpg", "test/1.jpg"], {}),
        (["train", "val/x/1.jpg"], {}),
        (["Training/robin/1.jpg", "Testing/robin/1.jpg"], {"train": "Training", "test": "Testing"}),
        (["train_set/a/1.jpg", "dev/a/1.jpg", "test data/"], {"train": "train_set", "val": "dev", "test": "test data"}),
        (["train/a/1.jpg", "eval/a/1.jpg"], {"train": "train", "val": "eval"}),
    ],
)
def test_find_splits(tmp_path: Path, names: list[str], expected: dict[str, str]) -> None:
    found = find_splits(make(tmp_path, *names))
    assert found == {split: tmp_path / name for split, name in expected.items()}
    assert list(found) == list(expected)


def test_find_splits_of_a_wrong_folder(tmp_path: Path) -> None:
    make(tmp_path, "train/", "val/", "valid/")
    told = message(lambda: find_splits(tmp_path))
    assert told.endswith("val and valid: keep one of them, or call the other train, val or test")
    assert message(lambda: find_splits(tmp_path / "gone")) == f"no such folder: {tmp_path / 'gone'}"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["seg_train/a/1.jpg", "seg_train/b/1.jpg", "seg_test/a/1.jpg"], "seg_test, seg_train look like splits"),
        (["seg_train/a/1.jpg", "seg_test/a/1.jpg", "more/1.jpg"], "not like classes: call them test, train"),
        (["s_train/s_train/a/1.jpg", "s_test/s_test/a/1.jpg"], "move s_test/s_test, s_train/s_train to test, train"),
        (
            ["train_images/1.jpg", "test_images/1.jpg", "meta/1.txt"],
            "and hold no class folders: sort their images into",
        ),
        (["val/a/1.jpg", "test/a/1.jpg"], "call them test, val; train is lacking"),
        (["training_set/training_set/a/1.jpg", "test_set/a/1.jpg"], "move training_set/training_set to train"),
        (["train/images/a/1.jpg", "train/images/b/1.jpg", "val/images/a/1.jpg"], "deeper: move train/images to train"),
        (["train/a/1.jpg", "train/b/1.jpg", "other/a/1.jpg"], "other has class folders of train too"),
        (["a/train/1.jpg", "a/val/1.jpg", "b/train/1.jpg"], "move a/train, a/val to train/a, val/a, and so on"),
        (["one/train/a/1.jpg", "one/val/a/1.jpg", "two/train/a/1.jpg"], "did you mean {root}/one? Beside it lie two"),
    ],
)
def test_splits_that_would_be_read_as_classes_are_refused(tmp_path: Path, names: list[str], expected: str) -> None:
    root = make(tmp_path, *names)
    told = message(lambda: open_data(str(root))).replace(os.sep, "/")
    assert expected.format(root=root.as_posix()) in told


@pytest.mark.parametrize(
    "names",
    [
        ["test_tube/1.jpg", "train_station/1.jpg", "wren/1.jpg"],
        ["car/1.jpg", "train/1.jpg", "tram/1.jpg"],
        ["robin/male/1.jpg", "robin/female/1.jpg", "wren/male/1.jpg", "wren/female/1.jpg"],
        ["train/a/1.jpg", "train/b/1.jpg", "test_images/1.jpg", "meta/a/1.txt"],
        ["train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "val_old/a/1.jpg"],
    ],
)
def test_class_folders_are_not_taken_for_splits(tmp_path: Path, names: list[str]) -> None:
    assert mistaken_splits(make(tmp_path, *names)) is None


def test_index_like(tmp_path: Path) -> None:
    train = scan(make(tmp_path / "train", "kite/1.png", "owl/1.png", "wren/1.png"))
    val = scan(make(tmp_path / "val", "owl/1.png", "wren/1.png", "wren/x.txt"))
    indexed = index_like(val, train.classes)
    assert relative(indexed) == [("owl/1.png", 1), ("wren/1.png", 2)]
    assert (indexed.classes, indexed.ignored, indexed.root) == (train.classes, val.ignored, val.root)
    assert "val has classes that were not trained on: wren; known are owl" in message(lambda: index_like(val, ("owl",)))


@settings(max_examples=100, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=80),
    fraction=st.floats(0.001, 0.999),
    seed=st.integers(-5, 2**70),
)
def test_split_is_a_stratified_partition(labels: list[int], fraction: float, seed: int) -> None:
    samples = [(f"{number}.jpg", label) for number, label in enumerate(labels)]
    before = class_counts(samples, 5)
    assume(max(before) > 1)
    kept, held_out = split(samples, fraction, seed)
    assert sorted([*kept, *held_out]) == sorted(samples)
    assert [sample for sample in samples if sample in kept] == list(kept)
    for count, stay, leave in zip(before, class_counts(kept, 5), class_counts(held_out, 5), strict=True):
        assert stay + leave == count
        if count >= 2:
            assert stay >= 1
            assert leave >= 1
            assert leave in (1, count - 1) or abs(leave - fraction * count) <= 0.5 + 1e-9
    assert split(samples, fraction, seed) == (kept, held_out)


def test_split_depends_on_the_seed_and_not_on_the_place() -> None:
    here = [(f"/here/{number:03}.jpg", number // 50) for number in range(100)]
    there = [(path.replace("here", "there"), label) for path, label in here]
    held = split(here, 0.2, seed=1)[1]
    assert [Path(path).name for path, _ in split(there, 0.2, seed=1)[1]] == [Path(path).name for path, _ in held]
    assert split(here, 0.2, seed=2)[1] != held
    first, second = ([int(path[-7:-4]) % 50 for path, label in held if label == which] for which in (0, 1))
    assert first != second, "classes of the same size must not hold out the same positions"


def test_split_is_the_same_on_every_machine() -> None:
    """A golden value: a change here silently moves every user's held-out images into training."""
    samples = [(str(number), 0) for number in range(12)]
    assert [path for path, _ in split(samples, 0.25, seed=0)[1]] == ["4", "8", "10"]


def test_split_refuses() -> None:
    samples = [("a", 0), ("b", 0)]
    for fraction in (0.0, 1.0, -0.1, 1.5, float("nan")):
        assert "must lie between 0 and 1" in message(lambda value=fraction: split(samples, value, 0))
    assert message(lambda: split([("a", 0), ("b", 1)], 0.5, 0)) == (
        "nothing to hold out: no class has two images or more"
    )


def test_imbalance_note() -> None:
    classes = ["owl", "robin", "wren"]
    assert imbalance_note(classes, [100, 12, 60]) == (
        "imbalanced: 12 (robin) to 100 (owl) images a class, ratio 8; consider `sampler=balanced`"
    )
    assert imbalance_note(classes, [50, 10, 11]) is not None
    assert imbalance_note(classes, [49, 10, 11]) is None
    assert imbalance_note(classes, [5, 0, 5]) == (
        "imbalanced: 0 (robin) to 5 (owl) images a class; consider `sampler=balanced`"
    )


def test_each_image_is_held_out_in_one_of_the_folds(tmp_path: Path) -> None:
    sizes = {"robin": 7, "tit": 2, "wren": 11, "kite": 1}
    for name, size in sizes.items():
        (tmp_path / name).mkdir()
        for number in range(size):
            (tmp_path / name / f"{number}.jpg").touch()
    held: list[str] = []
    for part in range(1, 4):
        train, val, notes = open_data(str(tmp_path), fold=f"{part}/3", seed=5)
        trained, measured = ([path for path, _ in images.samples] for images in (train, val))
        assert not set(trained) & set(measured) and len(trained) + len(measured) == 21
        assert f"{len(measured)} of 21 training images held out for validation (seed=5)" in notes
        held += measured
    assert len(held) == len(set(held)) == 20  # a class of one image keeps it
    assert held != [path for part in (1, 2, 3) for path, _ in open_data(str(tmp_path), fold=f"{part}/3")[1].samples]


@pytest.mark.parametrize("fold", ["0/5", "6/5", "1/1", "2", "2/5/3", "-1/5", "two/5"])
def test_what_is_no_fold_is_refused(fold: str, tmp_path: Path) -> None:
    with pytest.raises(UlsamError, match=f"^`fold` is K/N, the Kth of N parts, such as 2/5, not '{fold}'$"):
        TrainConfig(data="birds", fold=fold)
    with pytest.raises(UlsamError, match="exclude each other"):
        TrainConfig(data="birds", fold="2/5", val_fraction=0.2)
