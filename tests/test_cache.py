"""Decoded images in memory: the same batches with and without, filled by all that read, as far as memory goes."""

import multiprocessing
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tiny import SETTINGS, draw_splits
from ulsam.base.errors import UlsamError
from ulsam.data.augment import TrainTransform
from ulsam.data.cache import ImageCache, available_memory, cache_for, decoded_size
from ulsam.data.images import whole
from ulsam.data.loading import Batch, EpochOrder, train_loader
from ulsam.data.sources import FolderImages, StreamImages
from ulsam.training.config import TrainConfig
from ulsam.training.train import train

CROPS: dict[str, Any] = {"crop_scale": (0.3, 1.0), "hflip": 0.5, "rand_augment": None, "random_erasing": 0.5}
LOOK: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear"}
AUGMENTED = TrainTransform((3, 16, 16), color_jitter=0.4, **CROPS, **LOOK)


@pytest.fixture
def images(tmp_path: Path) -> FolderImages:
    """JPEGs, some large enough to be decoded at half scale, an odd file, and one that cannot be read."""
    random, samples = np.random.default_rng(0), []
    for number in range(16):
        size = (90 if number % 3 else 40, 60 + number, 3)
        image = Image.fromarray(random.integers(0, 256, size, np.uint8))
        path = tmp_path / f"{number}.jpg"
        image.convert("CMYK" if number == 5 else "RGB").save(path)
        samples.append((str(path), number % 2))
    (tmp_path / "7.jpg").write_bytes((tmp_path / "7.jpg").read_bytes()[:900])
    return FolderImages(tuple(samples), ("even", "odd"))


def epochs(images: FolderImages, cache: ImageCache | None, workers: int, number: int = 2) -> list[Batch]:
    order = EpochOrder(images, 4, seed=3)
    loader = train_loader(images, AUGMENTED, order, batch_size=4, seed=3, workers=workers, cache=cache)
    found = []
    for epoch in range(number):
        order.epoch = epoch
        found += list(loader)
    return found


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert a.unreadable == b.unreadable


@pytest.mark.parametrize(
    ("capacity", "workers"),
    [
        *((capacity, 0) for capacity in (10**6, 30_000, 0)),
        (30_000, 2),
        *(pytest.param(capacity, 2, marks=pytest.mark.slow) for capacity in (10**6, 0)),
    ],
)
def test_batches_are_the_same_with_and_without_a_cache(images: FolderImages, workers: int, capacity: int) -> None:
    assert max(AUGMENTED.reduction(*Image.open(path).size) for path, _ in images.samples) > 1
    assert_same(epochs(images, None, 0), epochs(images, ImageCache(16, capacity), workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_read_once_is_not_read_again(images: FolderImages, workers: int) -> None:
    without = epochs(images, None, 0, number=3)
    cache = ImageCache(16, 10**6)
    order = EpochOrder(images, 4, seed=3)
    loader = train_loader(images, AUGMENTED, order, batch_size=4, seed=3, workers=workers, cache=cache)
    found = list(loader)
    bad = images.samples[7][0]
    for path, _ in images.samples:
        if path != bad:
            Path(path).unlink()
    for order.epoch in (1, 2):
        found += list(loader)
    assert_same(without, found)
    assert {name for batch in found[4:] for name, _ in batch.unreadable} == {bad}  # it is tried again each time
    kept = [cache.get(number) for number in range(16)]
    assert [number for number, found in enumerate(kept) if found is None] == [7]
    assert [label for entry in kept if entry for label in entry[1:]] == [n % 2 for n in range(16) if n != 7]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 6), st.integers(1, 6)), max_size=30), st.integers(0, 400))
@settings(max_examples=80, deadline=None)
def test_a_cache_gives_back_what_it_was_given_or_nothing(puts: list[tuple[int, int, int]], capacity: int) -> None:
    cache, given_first, used = ImageCache(10, capacity), dict[int, Any](), 0
    for turn, (number, height, width) in enumerate(puts):
        pixels = np.full((height, width, 3), turn, np.uint8)
        cache.put(number, pixels, label=-turn)
        if number not in given_first and used + pixels.size <= capacity:
            given_first[number] = (pixels, -turn)
            used += pixels.size
    for number in range(10):
        found = cache.get(number)
        assert (found is None) == (number not in given_first)
        if found:
            assert np.array_equal(found[0], given_first[number][0])
            assert found[1] == given_first[number][1]


def test_processes_that_fill_a_cache_together_do_not_mix_images_up() -> None:
    cache = ImageCache(400, 10**6)

    def fill(offset: int) -> None:
        for number in range(400):
            number = (number + offset) % 400
            if cache.get(number) is None:
                cache.put(number, np.full((3 + number % 5, 7, 3), number % 251, np.uint8), number)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fill, args=(offset,)) for offset in (0, 0, 200)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    for number in range(400):
        found = cache.get(number)
        assert found is not None
        assert found[0].shape == (3 + number % 5, 7, 3)
        assert (found[0] == number % 251).all()
        assert found[1] == number


@pytest.fixture(params=[pytest.param("spawn", marks=pytest.mark.slow), "forkserver"])
def started(request: pytest.FixtureRequest) -> Iterator[None]:
    """Reading processes are started as on Windows, or as on Linux from Python 3.14 on."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(request.param, force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.slow
def test_processes_that_are_not_forked_share_it(images: FolderImages, started: None) -> None:
    cache, line = cache_for(images, AUGMENTED.reduction, "true")
    assert cache is not None
    assert str(line).startswith("16 images, ")
    assert_same(epochs(images, None, workers=0, number=1), epochs(images, cache, workers=1, number=1))
    kept = [number for number in range(16) if cache.get(number)]  # by the process that has read them
    assert kept == [number for number in range(16) if number != 7]


# whether there is one


def sizes(images: FolderImages) -> int:
    return sum(images.fetch(n)[0].size for n in range(16) if n != 7)


def test_the_decoded_size_is_that_of_images_as_they_are_kept(images: FolderImages) -> None:
    whole_size = decoded_size(images, whole)
    assert whole_size == pytest.approx(sizes(images) * 16 / 15, rel=1e-6)
    assert decoded_size(images, AUGMENTED.reduction) < 0.6 * whole_size


@pytest.fixture
def limited() -> Iterator[Callable[[int], None]]:
    """Sets the size of the largest file, which the system refuses to exceed."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere psutil reads no files")
@pytest.mark.filterwarnings("ignore:.*couldn't be determined:RuntimeWarning")
@pytest.mark.parametrize(("available", "fits"), [(5, True), (3, False)])
def test_auto_takes_a_quarter_of_the_memory(
    images: FolderImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, available: int, fits: bool
) -> None:
    size = decoded_size(images, whole)
    with_memory(tmp_path, monkeypatch, available * size)
    cache, line = cache_for(images, whole, "auto")
    assert (cache is not None) == fits
    assert line is not None
    assert line.startswith(f"16 images, {size / 1e6:.0f} MB, in memory" if fits else "off: 16 images")
    assert cache is None or size <= cache.capacity <= available * size // 4
    two, line = cache_for(images, whole, "auto", processes=2)
    assert two is None
    assert str(line).endswith("1/8 of the memory that is available")
    insisted, _ = cache_for(images, whole, "true")
    assert insisted is not None
    assert cache_for(images, whole, "false") == (None, None)


def with_memory(folder: Path, monkeypatch: pytest.MonkeyPatch, available: int | None) -> None:
    """The system says that so many bytes of memory are available, or nothing."""
    if available is not None:
        (folder / "proc").mkdir()
        kibibytes = available // 1024
        meminfo = f"MemTotal: {10 * kibibytes} kB\nMemFree: {kibibytes} kB\nMemAvailable: {kibibytes} kB\n"
        (folder / "proc" / "meminfo").write_text(meminfo)
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(folder / "proc"))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere psutil reads no files")
@pytest.mark.filterwarnings("ignore:.*couldn't be determined:RuntimeWarning")
@pytest.mark.parametrize(
    ("available", "largest_file", "message"),
    [
        (2048, None, "16 images, .* of the memory that is available"),
        (None, None, "the system does not say how much memory is available"),
        (10**9, 1000, "16 images, .* refuses .File too large"),
    ],
)
def test_why_not(
    images: FolderImages,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limited: Callable[[int], None],
    available: int | None,
    largest_file: int | None,
    message: str,
) -> None:
    with_memory(tmp_path, monkeypatch, available)
    if largest_file:
        limited(largest_file)
    cache, line = cache_for(images, whole, "auto")
    assert cache is None
    with pytest.raises(UlsamError, match=f"`cache=true` cannot be done: {message}.*; `cache=auto` trains"):
        cache_for(images, whole, "true")
    assert str(line).startswith("off: ")


def test_a_stream_is_not_kept() -> None:
    stream = StreamImages.__new__(StreamImages)
    assert cache_for(stream, whole, "auto") == (None, "off: a stream is not kept")


# memory


def machine(root: Path, groups: str, files: dict[str, str]) -> Path:
    for name, content in {"proc/self/cgroup": groups, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def test_available_memory_of_a_system_without_control_groups(tmp_path: Path) -> None:
    found = available_memory(tmp_path)
    assert found is not None and 0 < found <= psutil.virtual_memory().total


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere psutil reads no files")
def test_available_memory_is_what_linux_says_or_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo = "MemTotal: 9999 kB\nMemFree: 1000 kB\nMemAvailable: 5000 kB\n"
    root = machine(tmp_path, "0::/\n", {"proc/meminfo": meminfo})
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(root / "proc"))
    with pytest.warns(RuntimeWarning, match="couldn't be determined"):
        assert available_memory(root) == 5000 * 1024
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path / "nowhere"))
    assert available_memory(root) is None


def test_available_memory_within_control_groups_of_version_2(tmp_path: Path) -> None:
    def group(folder: str, most: str, used: int, files: int) -> dict[str, str]:
        values = {"max": most, "current": str(used), "stat": f"anon 1\ninactive_file {files}\n"}
        return {f"sys/fs/cgroup/{folder}memory.{name}": value for name, value in values.items()}

    files = {**group("user/job/", "max", 10, 0), **group("user/", "3000000", 2000000, 500000)}
    assert available_memory(machine(tmp_path, "0::/user/job\n", files)) == 1500000
    files = group("", "2000000", 2500000, 0)
    assert available_memory(machine(tmp_path / "at the root", "0::/\n", files)) == 0


def test_available_memory_within_control_groups_of_version_1(tmp_path: Path) -> None:
    values = {"limit_in_bytes": "3000000", "usage_in_bytes": "1000000", "stat": "cache 1\ntotal_inactive_file 7\n"}
    files = {f"sys/fs/cgroup/memory/job/memory.{name}": value for name, value in values.items()}
    groups = "5:cpu:/else\n4:memory:/job\n0::/\n"
    assert available_memory(machine(tmp_path, groups, files)) == 2000007


# training


def test_training_says_whether_it_caches_and_ends_in_the_same_weights(
    tmp_path: Path, logged: Callable[[], str]
) -> None:
    data = draw_splits(tmp_path / "data", train=6, val=2)
    losses = []
    for choice, said in (("true", "cache   18 images, 0 MB, in memory"), (False, None)):
        config = TrainConfig(**{**SETTINGS, "data": str(data), "epochs": 1, "cache": choice})
        assert config.cache == str(choice).lower()
        summary = train(config, tmp_path / str(choice))
        losses.append(summary["epochs"][0]["train_loss"])
        lines = [line for line in logged().splitlines() if line.startswith("cache")]
        assert lines == ([said] if said else [])
    assert losses[0] == losses[1]
