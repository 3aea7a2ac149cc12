"""Batches: their order, the processes that read them, and images that cannot be read."""

import gc
import itertools
import multiprocessing
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from numbered_images import EVAL, WHOLE, Numbers, augmented, same, training_images
from tiny import draw_splits, session
from ulsam.base.errors import UlsamError
from ulsam.data import loading
from ulsam.data.images import UnreadableImage
from ulsam.data.loading import Batch, EpochOrder, eval_loader, train_loader
from ulsam.data.opening import open_split
from ulsam.data.sources import FolderImages
from ulsam.data.targets import check_labels


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_splits(tmp_path_factory.mktemp("images"), train=10, val=5)


@pytest.fixture(scope="module")
def images(folder: Path) -> FolderImages:
    return training_images(folder)


def batches(images: Any, workers: int, epoch: int = 0, start: int = 0, seed: int = 0) -> list[Batch]:
    order = EpochOrder(images, 4, seed)
    order.epoch, order.start = epoch, start
    return list(train_loader(images, augmented(), order, batch_size=4, seed=seed, workers=workers))


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
from numbered_images import EVAL, Numbers
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


@pytest.mark.slow
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
