"""Image folders and data sets of timm's factory: splits, classes, and what is refused."""

import io
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from numbered_images import EVAL
from tiny import draw, draw_shards, draw_splits
from ulsam.base.errors import UlsamError
from ulsam.data.images import UnreadableImage
from ulsam.data.loading import eval_loader
from ulsam.data.opening import open_data, open_split
from ulsam.data.sources import FactoryImages, FolderImages


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_splits(tmp_path_factory.mktemp("images"), train=10, val=5)


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
