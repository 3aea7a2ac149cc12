"""Streams of shards: every image once, the rules of a folder, and broken images."""

import io
import json
import math
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from numbered_images import EVAL, WHOLE, Numbers, augmented, same, training_images
from tiny import draw_shards, draw_splits
from ulsam.base.errors import UlsamError
from ulsam.data import loading
from ulsam.data.loading import Batch, eval_loader, train_loader
from ulsam.data.opening import open_data
from ulsam.data.sources import FolderImages, StreamImages


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_splits(tmp_path_factory.mktemp("images"), train=10, val=5)


@pytest.fixture(scope="module")
def images(folder: Path) -> FolderImages:
    return training_images(folder)


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
