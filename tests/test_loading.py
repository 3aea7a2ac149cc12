"""Batches are a function of seed and epoch, whatever the workers and restarts; bad images; data sets by name."""

import gc
import io
import itertools
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tiny import draw, draw_shards, draw_splits, session
from ulsam.base.errors import UlsamError
from ulsam.data import loading
from ulsam.data.augment import EvalTransform, TrainTransform
from ulsam.data.images import UnreadableImage
from ulsam.data.loading import Batch, EpochOrder, eval_loader, train_loader
from ulsam.data.opening import open_data, open_split
from ulsam.data.sources import FactoryImages, FolderImages, StreamImages
from ulsam.data.targets import check_labels

PLAIN = {"crop_scale": (1.0, 1.0), "hflip": 0, "color_jitter": 0, "rand_augment": None, "random_erasing": 0}
LOOK = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear"}
WHOLE = TrainTransform((3, 32, 32), **PLAIN, **LOOK)
EVAL = EvalTransform((3, 32, 32), crop_pct=0.9, **LOOK)


def augmented(policy: str | None = "rand-m9-n2-mstd0.5", erasing: float = 0.5) -> TrainTransform:
    return TrainTransform(
        (3, 32, 32),
        crop_scale=(0.3, 1.0),
        hflip=0.5,
        color_jitter=0.3,
        rand_augment=policy,
        random_erasing=erasing,
        **LOOK,
    )


class Numbers:
    """Images in memory whose color is their number; ``bad`` ones cannot be read."""

    def __init__(self, n: int, labels: Any = None, bad: set[int] | None = None) -> None:
        self.n, self.labels, self.bad = n, labels, bad or set()
        self.classes = ("even", "odd")

    def __len__(self) -> int:
        return self.n

    def name(self, index: int) -> str:
        return f"image {index}"

    def fetch(self, index: int, reduction: Any = None, channels: int = 3) -> tuple[Any, int]:
        if index in self.bad:
            raise UnreadableImage(f"image {index}: broken")
        return np.full((40, 40, 3), index, np.uint8), index % 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_splits(tmp_path_factory.mktemp("images"), train=10, val=5)


@pytest.fixture(scope="module")
def images(folder: Path) -> FolderImages:
    train, _, _ = open_data(str(folder))
    assert isinstance(train, FolderImages)
    return train


def batches(images: Any, workers: int, epoch: int = 0, start: int = 0, seed: int = 0) -> list[Batch]:
    order = EpochOrder(images, 4, seed)
    order.epoch, order.start = epoch, start
    return list(train_loader(images, augmented(), order, batch_size=4, seed=seed, workers=workers))


def same(left: list[Batch], right: list[Batch]) -> bool:
    pairs = zip(left, right, strict=True)
    return all(torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in pairs)


# order


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 4), st.integers(0, 3), st.integers(0, 9))
@settings(max_examples=80, deadline=None)
def test_ranks_take_turns_in_one_order(n: int, batch: int, world: int, epoch: int, seed: int) -> None:
    images: Any = Numbers(n)
    if n < batch * world:
        with pytest.raises(UlsamError, match=rf"`batch_size={max(1, n // world)}` or less"):
            EpochOrder(images, batch, seed, world=world)
        return
    shares = []
    for rank in range(world):
        order = EpochOrder(images, batch, seed, rank=rank, world=world)
        order.epoch = epoch
        shares.append(list(order))
        assert len(shares[-1]) == len(order) == n // (batch * world)
        assert all(len(keys) == batch for keys in shares[-1])
        order.start = len(order) // 2
        assert list(order) == shares[-1][len(order) // 2 :]
    keys = [key for share in shares for batch_keys in share for key in batch_keys]
    assert {number for number, _, _ in keys} == {epoch}
    assert len({place for _, place, _ in keys}) == len(keys)
    assert len({index for *_, index in keys}) == len(keys)  # no image twice in an epoch
    assert all(0 <= index < n for *_, index in keys)


def test_order_differs_between_epochs_and_seeds() -> None:
    images: Any = Numbers(40)
    order, other = EpochOrder(images, 4, seed=0), EpochOrder(images, 4, seed=1)
    first = [index for keys in order for *_, index in keys]
    assert first == [index for keys in EpochOrder(images, 4, seed=0) for *_, index in keys]
    assert first != [index for keys in other for *_, index in keys]
    order.epoch = 1
    assert first != [index for keys in order for *_, index in keys]
    assert sorted(first) == list(range(40))


def test_balanced_draws_every_class_equally_often() -> None:
    labels = [0] * 900 + [1] * 90 + [2] * 10
    images: Any = Numbers(1000, labels)
    drawn: Counter[int] = Counter()
    order = EpochOrder(images, 10, seed=0, balanced=True)
    for epoch in range(3):
        order.epoch = epoch
        drawn.update(labels[index] for keys in order for *_, index in keys)
    statistic = sum((count - 1000) ** 2 / 1000 for count in drawn.values())
    assert sum(drawn.values()) == 3000
    assert statistic < 13.8  # chi-square with 2 degrees of freedom exceeds this once in 1000


def test_balanced_draws_each_image_of_a_class_and_no_class_that_has_none() -> None:
    labels = [3, 0, 3, 3, 0, 3]
    order = EpochOrder(Numbers(6, labels), 6, seed=0, balanced=True)  # type: ignore[arg-type]
    drawn: Counter[int] = Counter()
    for order.epoch in range(500):
        drawn.update(index for keys in order for *_, index in keys)
    assert all(abs(drawn[index] - (750 if label == 0 else 375)) < 100 for index, label in enumerate(labels)), drawn


@pytest.mark.slow
def test_balanced_draws_from_more_images_than_torch_does() -> None:
    number = 2**24 + 2**20
    labels = np.zeros(number, np.int32)
    labels[-3:] = 1
    order = EpochOrder(Numbers(number, labels), 1024, seed=0, balanced=True)  # type: ignore[arg-type]
    rare = [index for keys in itertools.islice(order, 4) for *_, index in keys if index >= number - 3]
    assert abs(len(rare) - 2048) < 200
    assert set(rare) == {number - 3, number - 2, number - 1}


def private_memory() -> int:
    """Bytes that only this process has."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Private_Dirty:"))


def walk(images: FolderImages, found: Any) -> None:
    """As a reading process does, look at every image's path."""
    gc.disable()  # a collection writes to all that it looks at
    images.name(0)
    before = private_memory()
    for number in range(len(images)):
        last = images.name(number)
    found.put((private_memory() - before, last, list(map(int, images.labels[-2:]))))


@pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="this system does not report whose memory it is"
)
@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_paths_are_not_copied_into_the_reading_processes(method: str) -> None:
    number = 100_000  # of strings 20 MB are copied
    images = FolderImages(
        tuple((f"/data/n{n // 1000:08}/n{n // 1000:08}_{n}.JPEG", n // 1000) for n in range(number)), ()
    )
    context: Any = multiprocessing.get_context(method)
    found = context.SimpleQueue()
    process = context.Process(target=walk, args=(images, found))
    process.start()
    grown, last, labels = found.get()
    process.join()
    assert (last, labels) == (images.name(number - 1), [99, 99])
    assert grown < 4_000_000


def test_balanced_needs_labels() -> None:
    images: Any = Numbers(20)
    with pytest.raises(UlsamError, match="lists its labels"):
        EpochOrder(images, 4, seed=0, balanced=True)


# batches


def test_batches_do_not_depend_on_workers(images: FolderImages) -> None:
    alone = batches(images, workers=0, epoch=1)
    assert len(alone) == 7
    assert not same(alone, batches(images, workers=0, epoch=2))
    assert not same(alone, batches(images, workers=0, epoch=1, seed=1))
    for workers in (1, 2):
        assert same(alone, batches(images, workers=workers, epoch=1))


class Reporting(Numbers):
    """Says how its process is ranked."""

    def fetch(self, index: int, reduction: Any = None, channels: int = 3) -> tuple[Any, int]:
        raise UnreadableImage(f"niceness {os.nice(0)}")


def test_reading_processes_give_way_to_training() -> None:
    (batch,) = eval_loader(Reporting(1), EVAL, batch_size=1, workers=1)
    assert batch.unreadable == [("image 0", f"niceness {min(19, os.nice(0) + 5)}")]


KILLED = """
import multiprocessing, sys, time
from test_loading import EVAL, Numbers
from ulsam.data.loading import eval_loader

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    reading = iter(eval_loader(Numbers(64), EVAL, batch_size=1, workers=2))
    next(reading)
    print("reading", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("method", ["forkserver", pytest.param("spawn", marks=pytest.mark.slow)])
def test_reading_processes_end_when_training_is_killed(method: str, tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    process = subprocess.Popen(
        [sys.executable, script, method],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "reading\n"
    assert len(session(process.pid)) >= 3
    process.kill()
    process.wait()
    end = time.monotonic() + 60
    while session(process.pid):
        assert time.monotonic() < end, "still there"
        time.sleep(0.1)


class Threaded:
    """Notes the process that collects it, in a cycle, as a session of ONNX Runtime may be."""

    def __init__(self, ended: list[int]) -> None:
        self.own, self.ended = self, ended

    def __del__(self) -> None:
        self.ended.append(os.getpid())


def test_garbage_is_collected_before_a_process_is_forked(images: FolderImages) -> None:
    """What has threads hangs the reading process that collects it: they are not there."""
    ended: list[int] = []
    gc.disable()
    try:
        Threaded(ended)
        next(iter(eval_loader(images, EVAL, batch_size=4, workers=1)))
    finally:
        gc.enable()
    assert ended == [os.getpid()]


def test_start_gives_the_rest_of_the_epoch(images: FolderImages) -> None:
    whole = batches(images, workers=0, epoch=3)
    assert same(whole[5:], batches(images, workers=2, epoch=3, start=5))
    assert batches(images, workers=0, epoch=3, start=7) == []


def test_an_epoch_left_in_the_middle_does_not_spill_into_the_next(images: FolderImages) -> None:
    order = EpochOrder(images, 4, seed=0)
    loader = train_loader(images, augmented(), order, batch_size=4, seed=0, workers=2)
    next(iter(loader))
    order.epoch = 1
    assert same(list(loader), batches(images, workers=0, epoch=1))


def test_augmentation_differs_between_images_and_epochs(folder: Path) -> None:
    only: Any = FolderImages((open_split(str(folder), "train").samples[0],) * 8, ("a", "b"))  # type: ignore[union-attr]
    images = torch.cat([batch.images for epoch in (0, 1) for batch in batches(only, workers=0, epoch=epoch)])
    assert len({image.numpy().tobytes() for image in images}) == 16


@pytest.mark.parametrize("policy", ["nonsense", "rand-q9"])
def test_unknown_augmentation(policy: str) -> None:
    with pytest.raises(UlsamError, match=f"unknown policy `rand_augment={policy}`"):
        augmented(policy)


# images that cannot be read


@pytest.mark.parametrize("workers", [0, 2])
def test_training_replaces_an_unreadable_image_by_the_next(workers: int) -> None:
    images: Any = Numbers(20, bad={3, 4, 19})
    order = EpochOrder(images, 4, seed=0)
    loader = train_loader(images, WHOLE, order, batch_size=4, seed=0, workers=workers)
    replacement = {3: 5, 4: 5, 19: 0}
    for keys, batch in zip(order, loader, strict=True):
        shown = [round(255 * (0.5 + 0.25 * float(value))) for value in batch.images[:, 0, 16, 16]]
        indices = [index for *_, index in keys]
        assert shown == [replacement.get(index, index) for index in indices]
        assert batch.labels.tolist() == [number % 2 for number in shown]
        met = {name for name, _ in batch.unreadable}
        assert met == {f"image {bad}" for i in indices for bad in {3: (3, 4), 4: (4,), 19: (19,)}.get(i, ())}


def test_fifty_in_a_row_end_the_search() -> None:
    images: Any = Numbers(100, bad=set(range(10, 60)))
    dataset = loading.TrainSet(images, WHOLE, seed=0)
    image, label, _, bad = dataset[0, 0, 10]
    assert image is None
    assert label == -1
    assert len(bad) == loading.TRIES == 50
    image, label, _, bad = dataset[0, 0, 11]
    assert image is not None
    assert len(bad) == 49


def test_no_readable_image_at_all() -> None:
    images: Any = Numbers(5, bad=set(range(5)))
    image, _, _, bad = loading.TrainSet(images, WHOLE, seed=0)[0, 0, 2]
    assert image is None
    assert len(bad) == 5
    batch = loading.collate([(None, -1, None, bad)])
    assert len(batch.labels) == 0
    assert len(batch.unreadable) == 5


@pytest.mark.parametrize(("world", "workers"), [(1, 0), pytest.param(1, 1, marks=pytest.mark.slow), (3, 0), (3, 1)])
def test_measuring_leaves_unreadable_images_out(workers: int, world: int) -> None:
    images: Any = Numbers(17, bad={0, 8, 16})
    seen, bad = [], []
    for rank in range(world):
        for batch in eval_loader(images, EVAL, batch_size=4, workers=workers, rank=rank, world=world):
            seen += (
                [round(255 * (0.5 + 0.25 * float(value))) for value in batch.images[:, 0, 16, 16]]
                if len(batch.labels)
                else []
            )
            bad += batch.unreadable
    assert sorted(seen) == [index for index in range(17) if index not in (0, 8, 16)]
    assert sorted(bad) == [(f"image {index}", f"image {index}: broken") for index in (0, 16, 8)]


@pytest.mark.parametrize("labels", [[0, 3], [-1, 1]])
def test_labels_out_of_range(labels: list[int]) -> None:
    check_labels(torch.tensor([0, 2]), 3)
    check_labels(torch.tensor([], dtype=torch.long), 3)
    with pytest.raises(UlsamError, match=r"class number (3|-1), but the 3 classes .* `class_names`"):
        check_labels(torch.tensor(labels), 3)


# image folders


def labels_of(images: Any) -> Counter[int]:
    return Counter(images.labels)


def test_val_before_test_before_held_out(tmp_path: Path) -> None:
    for number, split in ((6, "train"), (3, "Validation"), (2, "test")):
        draw(tmp_path / split, number)
    train, val, notes = open_data(str(tmp_path))
    assert (len(train), len(val), val.split, notes) == (18, 9, "validation", [])
    _, test, _ = open_data(str(tmp_path), val_split="test")
    assert len(test) == 6
    _, same_again, notes = open_data(str(tmp_path), val_split="train")
    assert len(same_again) == 18
    assert notes == ["measured on the images that are trained on, split train"]
    (tmp_path / "Validation").rename(tmp_path / ".hidden")
    _, val, (note,) = open_data(str(tmp_path))
    assert (len(val), val.split) == (6, "test")
    assert note.startswith("measured on test/: to choose settings, hold images out")
    train, val, notes = open_data(str(tmp_path / "train"))
    assert len(train) + len(val) == 18
    assert labels_of(val) == {0: 1, 1: 1, 2: 1}
    assert val.split == "held-out"
    assert notes == ["3 of 18 training images held out for validation (seed=0)"]
    assert len(open_split(str(tmp_path / "train"), "all")) == 18


def test_val_fraction_is_a_function_of_the_seed(folder: Path) -> None:
    def held_out(seed: int) -> tuple[set[str], set[str]]:
        train, val, _ = open_data(str(folder), val_fraction=0.3, seed=seed)
        return {train.name(i) for i in range(len(train))}, {val.name(i) for i in range(len(val))}  # type: ignore[union-attr]

    kept, out = held_out(0)
    assert (kept, out) == held_out(0)
    assert (kept, out) != held_out(1)
    assert (len(kept), len(out), len(kept & out)) == (21, 9, 0)
    assert all("/train/" in name for name in kept | out)  # val/ is not touched


def test_classes_that_the_splits_do_not_share(tmp_path: Path) -> None:
    draw(tmp_path / "train", 4)
    draw(tmp_path / "val", 2, classes=2)
    _, val, notes = open_data(str(tmp_path))
    assert labels_of(val) == {0: 2, 1: 2}
    assert notes == ["1 classes have no validation image: class2"]
    (tmp_path / "val" / "class0").rename(tmp_path / "val" / "wren")
    with pytest.raises(UlsamError, match=r"not trained on: wren; known are class0, class1, class2"):
        open_data(str(tmp_path))


def test_imbalance_and_passed_over_files_are_noted(tmp_path: Path) -> None:
    draw_splits(tmp_path, train=6, val=1)
    for index in range(1, 6):
        (tmp_path / "train" / "class0" / f"{index:03}.png").unlink()
    (tmp_path / "train" / "class1" / "notes.txt").touch()
    (tmp_path / "train" / "nothing").mkdir()
    _, _, notes = open_data(str(tmp_path))
    assert [note.split(":")[0] for note in notes] == [
        "1 class folders without an image left out",
        "1 files passed over, no images by name",
        "imbalanced",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_split": "holiday"}, r"no split 'holiday'; it has train, val"),
        ({"val_split": "test"}, r"no split 'test'; it has train, val"),
        ({"val_split": ""}, r"no split ''; it has train, val"),
        ({"train_split": ""}, r"no split ''; it has train, val"),
        ({"val_fraction": 1.5}, r"must lie between 0 and 1"),
    ],
)
def test_splits_that_are_not_there(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UlsamError, match=message):
        open_data(str(folder), **options)


def test_a_flat_folder_has_no_named_split(folder: Path) -> None:
    with pytest.raises(UlsamError, match="one folder of classes; leave `val_split` out"):
        open_data(str(folder / "train"), val_split="test")


# data sets of timm's factory


def test_torch_image_folder(folder: Path, tmp_path: Path) -> None:
    train, val, notes = open_data("torch/image_folder", data_dir=str(folder))
    assert isinstance(train, FactoryImages)
    assert (len(train), len(val), notes) == (30, 15, [])
    assert train.classes == ("class0", "class1", "class2")
    assert labels_of(train) == {0: 10, 1: 10, 2: 10}
    assert train.name(29) == str(folder / "train" / "class2" / "009.png")
    own = open_split(str(folder), "train")
    assert isinstance(own, FolderImages)
    for index in (0, 29):
        assert train.fetch(index)[0].tobytes() == own.fetch(index)[0].tobytes()
        assert train.fetch(index)[1] == own.fetch(index)[1]
    draw_splits(tmp_path, train=2, val=2)
    (tmp_path / "train" / "class0" / "000.png").write_bytes(b"")
    train, _, _ = open_data("torch/image_folder", data_dir=str(tmp_path))
    with pytest.raises(UnreadableImage, match=r"class0/000\.png: empty file"):
        train.fetch(0)  # type: ignore[union-attr]


def test_torch_imagenet(tmp_path: Path) -> None:
    names = {"n01": ("tench", "Tinca tinca"), "n02": ("goldfish",), "n03": ("crane",)}
    torch.save((names, list(names)), tmp_path / "meta.bin")
    for split, number in (("train", 6), ("val", 2)):
        draw(tmp_path / split, number)
        for index, wordnet in enumerate(names):
            (tmp_path / split / f"class{index}").rename(tmp_path / split / wordnet)
    for index in range(1, 6):
        (tmp_path / "train" / "n02" / f"{index:03}.png").unlink()
    train, val, notes = open_data("torch/imagenet", data_dir=str(tmp_path))
    assert train.classes == ("tench, Tinca tinca", "goldfish", "crane")
    assert (len(train), len(val)) == (13, 6)
    assert len(notes) == 1
    assert notes[0].startswith("imbalanced: 1 (goldfish) to 6 (tench")
    assert val.fetch(5)[1] == 2  # type: ignore[union-attr]
    twice = {"n01": ("crane",), "n02": ("goldfish",), "n03": ("crane",)}  # ImageNet has two cranes
    torch.save((twice, list(twice)), tmp_path / "meta.bin")
    with pytest.raises(UlsamError, match="two classes of one name"):
        open_data("torch/imagenet", data_dir=str(tmp_path))
    (tmp_path / "names.txt").write_text("tench\ngoldfish\ncrane bird\n\n")
    train, _, _ = open_data("torch/imagenet", data_dir=str(tmp_path), class_names=str(tmp_path / "names.txt"))
    assert train.classes == ("tench", "goldfish", "crane bird")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("torch/cifar10", {}, "cannot open torch/cifar10, split 'train', in .*: Dataset not found or corrupted"),
        ("torch/mnist", {}, "cannot open torch/mnist, split 'train', in .*: Dataset not found"),
        ("torch/cifar10", {"data_dir": None}, "torch/cifar10 needs `data_dir`"),
        ("torch/image_folder", {"data_dir": None}, "needs `data_dir`"),
        ("wds/birds", {"data_dir": None}, "needs `data_dir`"),
        ("torch/nonsense", {}, "Unknown torchvision dataset nonsense"),
        ("torch/imagenet", {}, "ILSVRC2012_devkit_t12.tar.gz is not present"),
        ("torch/image_folder", {"val_fraction": 0.2}, "`val_fraction` works on image folders"),
        ("torch/image_folder", {"data_dir": "nowhere"}, "No such file or directory: 'nowhere'"),
    ],
)
def test_data_sets_that_are_not_there(name: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UlsamError, match=message) as caught:
        open_data(name, **{"data_dir": str(tmp_path), **options})
    assert "\n" not in str(caught.value)


def test_other_classes_to_measure_on(tmp_path: Path) -> None:
    draw_splits(tmp_path, train=2, val=2)
    (tmp_path / "val" / "class0").rename(tmp_path / "val" / "wren")
    with pytest.raises(UlsamError, match=r"other classes to train on \(class0, .*\) than to measure on \(class1, "):
        open_data("torch/image_folder", data_dir=str(tmp_path))


def test_classes_of_a_named_data_set_are_taken_by_name(folder: Path, shards: Path) -> None:
    def measured(name: str, classes: tuple[str, ...], **options: Any) -> Counter[int]:
        images = open_split(name, "validation", classes, **options)
        assert images.classes == classes
        found = eval_loader(images, EVAL, batch_size=4, workers=0)
        return Counter(label for batch in found for label in batch.labels.tolist())

    stream = {"data_dir": str(shards), "class_names": str(shards / "names.txt")}
    assert measured("wds/birds", ("robin", "wren", "finch"), **stream) == {0: 5, 1: 5, 2: 4}
    assert measured("wds/birds", ("finch", "tit", "robin", "wren"), **stream) == {2: 5, 3: 5, 0: 4}
    assert measured("wds/birds", ("a", "b", "c"), **stream, by_number=True) == {0: 5, 1: 5, 2: 4}
    turned = open_split("torch/image_folder", "train", ("class2", "class1", "class0"), data_dir=str(folder))
    assert turned.fetch(0)[1] == turned.labels[0] == 2  # type: ignore[union-attr,index]
    assert labels_of(open_split(str(folder), "val", ("a", "b", "c"), by_number=True)) == {0: 5, 1: 5, 2: 5}
    with pytest.raises(UlsamError, match=r"not trained on: wren, finch; .* `classes_by_number=True` takes them"):
        open_split("wds/birds", "validation", ("robin", "b", "c"), **stream)
    for data, options in (("wds/birds", stream), (str(folder), {})):
        with pytest.raises(UlsamError, match="has 3 classes, the model has 2"):
            open_split(data, "validation" if options else "val", ("a", "b"), **options, by_number=True)


def test_a_bad_image_of_a_data_set_without_file_names_is_named() -> None:
    class Reader:
        def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
            return io.BytesIO(b"no image"), 0

    class Decoded:
        def __getitem__(self, index: int) -> Any:
            raise OSError("image file is truncated")

        def __len__(self) -> int:
            return 9

    class Undecoded(Decoded):
        reader = Reader()

    for dataset, reason in ((Undecoded(), "not an image"), (Decoded(), "image file is truncated")):
        with pytest.raises(UnreadableImage, match=rf"hfds/birds, image 7: {reason}"):
            FactoryImages(dataset, "hfds/birds", ("a", "b")).fetch(7)


@pytest.fixture(scope="module")
def shards(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("webdataset")
    return draw_shards(tmp_path_factory.mktemp("shards"), folder / "train")


def open_shards(root: Path) -> tuple[StreamImages, StreamImages, list[str]]:
    names = str(root / "names.txt")
    train, val, notes = open_data("wds/birds", data_dir=str(root), class_names=names, batch_size=8)
    assert isinstance(train, StreamImages)
    assert isinstance(val, StreamImages)
    return train, val, notes


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow), 2])
def test_streams(shards: Path, workers: int) -> None:
    train, val, notes = open_shards(shards)
    assert len(notes) == 1
    assert "stream" in notes[0]
    assert train.classes == ("robin", "wren", "finch")
    assert (len(train), len(val)) == (44, 14)
    each = math.ceil(44 / max(1, workers) / 8)  # each worker fills its last batch
    assert train.batches(8, workers) == each * max(1, workers)
    loader = train_loader(train, augmented(), None, batch_size=8, seed=0, workers=workers)
    epochs = []
    for epoch in (0, 1):
        train.set_epoch(epoch)
        found = list(loader)
        assert [len(batch.labels) for batch in found] == [8] * train.batches(8, workers)
        epochs.append(found)
    assert not same(*epochs)
    measured = list(eval_loader(val, EVAL, batch_size=4, workers=workers))
    assert Counter(label for batch in measured for label in batch.labels.tolist()) == {0: 5, 1: 5, 2: 4}


@pytest.mark.parametrize(("world", "workers"), [(2, 0), pytest.param(2, 2, marks=pytest.mark.slow), (3, 0), (3, 2)])
def test_processes_share_out_a_stream_whatever_its_shards_hold(
    workers: int, world: int, folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("webdataset")
    root = draw_shards(tmp_path, folder / "train", val=(9, 1, 4))
    shares = []
    for rank in range(world):
        _, val, _ = open_shards(root)
        loader = eval_loader(val, EVAL, batch_size=4, workers=workers, rank=rank, world=world)
        shares.append(torch.cat([batch.images for batch in loader if len(batch.labels)]))
    _, val, _ = open_shards(root)
    alone = torch.cat([batch.images for batch in eval_loader(val, EVAL, batch_size=4, workers=0)])
    assert sorted(image.sum().item() for share in shares for image in share) == sorted(alone.sum((1, 2, 3)).tolist())
    assert min(map(len, shares)) >= 14 // world - 1


def add_to_shard(shard: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(shard, "a") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def odd_shards(root: Path, folder: Path) -> Path:
    """Shards whose first ones end with a 16-bit, a turned and three broken images."""
    draw_shards(root, folder)
    sixteen, turned = io.BytesIO(), io.BytesIO()
    Image.new("I;16", (40, 40), 30000).save(sixteen, "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(turned, "JPEG", exif=exif)
    image = {"a.png": sixteen.getvalue(), "a.cls": b"0", "b.jpeg": turned.getvalue(), "b.cls": b"1"}
    broken = {"c.png": b"nonsense", "c.cls": b"1", "d.cls": b"2", "e.png": sixteen.getvalue()}
    for split in ("train", "validation"):
        add_to_shard(root / f"{split}-0.tar", {**image, **broken})
    info = json.loads((root / "_info.json").read_text())
    for split in info["splits"].values():
        split["num_samples"] += 5
        split["shard_lengths"][0] += 5
    (root / "_info.json").write_text(json.dumps(info))
    return root


def test_a_stream_reads_images_by_the_rules_of_a_folder(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    _, val, _ = open_shards(odd_shards(tmp_path, folder / "train"))
    found = {Path(member.name).name: member for member in val.members()}
    assert found["a"].read()[0, 0].tolist() == [30000 // 256] * 3
    assert found["b"].read().shape == (40, 20, 3)
    batches = list(eval_loader(val, EVAL, batch_size=4, workers=1))
    assert sum(len(batch.labels) for batch in batches) == 16
    shard = tmp_path / "validation-0.tar"
    assert [bad for batch in batches for bad in batch.unreadable] == [
        (f"{shard}/c", f"{shard}/c: not an image in a known format, or cut off within its header"),
        (f"{shard}/d", f"{shard}/d: no image, or no class number (.cls), under this name"),
        (f"{shard}/e", f"{shard}/e: no image, or no class number (.cls), under this name"),
    ]


def test_a_stream_to_train_on_fills_its_batches_past_broken_images(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    train, _, _ = open_shards(odd_shards(tmp_path, folder / "train"))
    workers = 2
    assert train.batches(8, workers) == 8
    for epoch in range(2):
        train.set_epoch(epoch)
        batches = list(train_loader(train, augmented(), None, batch_size=8, seed=0, workers=workers))
        assert [len(batch.labels) for batch in batches] == [8] * 8
        assert {Path(name).name for batch in batches for name, _ in batch.unreadable} == {"c", "d", "e"}


@pytest.mark.parametrize(("bad", "labels"), [({0, 1, 3, 5}, [2, 2, 2, 2, 4, 4]), (set(range(6)), [-1] * 6)])
def test_in_a_stream_a_readable_image_stands_in(bad: set[int], labels: list[int]) -> None:
    images: Any = Numbers(6, bad=bad)
    images.label = int
    images.members = lambda: (Read(images, index) for index in range(6))
    items = list(loading.StreamTrainSet(images, WHOLE))
    assert [label for _, label, *_ in items] == labels
    assert [name for *_, unreadable in items for name, _ in unreadable] == [f"image {index}" for index in sorted(bad)]


class Read:
    """A member of a stream of `Numbers`."""

    def __init__(self, images: Numbers, number: int) -> None:
        self.images, self.number, self.name = images, number, images.name(number)

    def read(self, reduction: Any = None, channels: int = 3) -> Any:
        return self.images.fetch(self.number)[0]


@pytest.mark.slow
def test_a_stream_starts_an_epoch_again_as_it_was(shards: Path) -> None:
    def epoch_two(before: bool) -> list[Batch]:
        train, _, _ = open_shards(shards)
        loader = train_loader(train, augmented(), None, batch_size=8, seed=0, workers=2)
        if before:
            list(loader)
        loading.seed_all(0, 3, 2)
        train.set_epoch(2)
        return list(loader)

    assert same(epoch_two(before=True), epoch_two(before=False))


def test_a_stream_needs_class_names(shards: Path) -> None:
    with pytest.raises(UlsamError, match="does not list its classes: give a text file"):
        open_data("wds/birds", data_dir=str(shards))
    with pytest.raises(UlsamError, match="cannot read the class names in nowhere"):
        open_data("wds/birds", data_dir=str(shards), class_names="nowhere")
    with pytest.raises(UlsamError, match="split holiday not found"):
        open_data("wds/birds", data_dir=str(shards), class_names=str(shards / "names.txt"), train_split="holiday")


@pytest.mark.parametrize("moment", [0, 1, 5])
def test_a_reading_process_that_dies_is_reported_where_its_batch_is_missed(moment: int) -> None:
    loader = eval_loader(Numbers(200), EVAL, batch_size=2, workers=2)
    batches = iter(loader)
    for _ in range(moment):
        next(batches)
    for process in multiprocessing.active_children():
        process.kill()
        process.join()  # PyTorch's own loader would raise here
    with pytest.raises(UlsamError, match="a process that reads images was killed"):
        list(batches)
