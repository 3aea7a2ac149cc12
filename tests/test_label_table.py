"""Tables of paths and labels in the place of an image folder: what is read, what is refused, and every command."""

import dataclasses
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

import ulsam
from labelling import write_table
from tiny import SETTINGS, draw, options
from ulsam.base.errors import UlsamError
from ulsam.cli import main
from ulsam.data.check import check
from ulsam.data.label_table import read_table, table_images
from ulsam.data.labelled import labelled
from ulsam.data.opening import open_data, open_split
from ulsam.data.sources import LabelSetImages
from ulsam.study.identity import data_digest
from ulsam.training.config import TrainConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``class0`` to ``class2`` with 8 images each."""
    root = tmp_path_factory.mktemp("data")
    draw(root, 8)
    return root


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """A folder with a.png, b.png and c.jpg, which are empty files."""
    for name in ("a.png", "b.png", "c.jpg"):
        (tmp_path / name).touch()
    return tmp_path


def rows_of(folder: Path) -> list[tuple[str, str]]:
    files = sorted(folder.glob("class*/*.png"))
    return [(file.relative_to(folder).as_posix(), file.parent.name) for file in files]


def table_of(folder: Path, name: str = "labels.csv", splits: bool = False) -> Path:
    """A table of the folder's images; with splits 5, 2 and 1 of each class."""
    rows = rows_of(folder)
    if not splits:
        return write_table(folder / name, [("path", "label"), *rows])
    of = ["train"] * 5 + ["valid"] * 2 + ["test"]
    return write_table(folder / name, [("split", "path", "label"), *((of[n % 8], *row) for n, row in enumerate(rows))])


def read(places: Path, text: str, name: str = "labels.csv", **given: bool) -> list[tuple[str, ...]]:
    """The labels of each image of a table with this text."""
    (places / name).write_bytes(text.encode())
    table = read_table(places / name, **given)
    found = table_images(table, min_classes=1)
    return [tuple(filter(None, found.words(label).split(";"))) for _, label in found.samples]


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("path,label\na.png,cat\nb.png,dog\n", [("cat",), ("dog",)]),
        ("\ufeffImage;Class\r\na.png;cat\r\n\r\nb.png;dog\r\n", [("cat",), ("dog",)]),
        ("id\tbreed\na\tred, small\nc\t'dog'\n", [("red, small",), ("'dog'",)]),
        ('"filename","target"\n"./a.png","1"\n"b.png","0"\n', [("1",), ("0",)]),
        ("path,labels\na.png,x;y\nb.png,\nc.jpg,y\n", [("x", "y"), (), ("y",)]),
        ("path,label\na.png,x|y\nb.png,x\n", [("x", "y"), ("x",)]),
        ("image_name,tags\na,haze primary\nb,clear\n", [("haze", "primary"), ("clear",)]),
        ("path,labels\na.png,\"['x', 'y']\"\nb.png,[]\n", [("x", "y"), ()]),
        ("image,sun,wind\na.png,1,0\nb.png,1,1\nc.jpg,0,0\n", [("sun",), ("sun", "wind"), ()]),
        (",image,sun,wind\n0,a.png,1.0,0.0\n1,b.png,1.0,True\n", [("sun",), ("sun", "wind")]),
        ("image,sun,wind\na.png,1,-1\nb.png,1,1\n", [("sun",), ("sun", "wind")]),
        ("image,sun,wind\na.png,1,0\nb.png,0,1\n", [("sun",), ("wind",)]),
    ],
)
def test_tables_as_people_write_them(places: Path, text: str, labels: list[tuple[str, ...]]) -> None:
    name = "labels.tsv" if "\t" in text else "labels.csv"
    assert read(places, text, name) == labels
    assert read_table(places / name).several is any(len(own) != 1 for own in labels)


def test_paths_with_backslashes_from_elsewhere_and_without_an_ending(tmp_path: Path) -> None:
    draw(tmp_path / "images", 1)
    table = write_table(tmp_path / "t.csv", [("id", "label"), ("class0\\000.png", "x"), ("class1/000", "y")])
    with pytest.raises(UlsamError, match="names 2 of 2 images that are not there, the first one in row 2"):
        labelled(table).read()
    found = labelled(table, data_dir=tmp_path / "images").read()
    assert [Path(path).relative_to(tmp_path).as_posix() for path, _ in found.samples] == [
        "images/class0/000.png",
        "images/class1/000.png",
    ]
    absolute = write_table(tmp_path / "u.csv", [("id", "label"), (tmp_path / "images" / "class2" / "000.png", "x")])
    assert len(labelled(absolute).read(min_classes=1).samples) == 1


WRONG = [
    ("", "labels.csv needs a header with a column for the path (path, file, filename, ...)"),
    ("path,label\n", "labels.csv has a header, but no row: it names no image"),
    ("photo,label\na.png,x\n", "for each class; it has photo, label"),
    ("path\na.png\n", "for each class; it has path"),
    ("path,label\na.png,x\nb.png\n", "labels.csv, row 3: 1 values, and the header has 2"),
    ("path,label\na.png,x\n\nb.png,\n", "labels.csv, row 4: the label is empty; images without a label need a column"),
    ("path,labels\na.png,\"['x']\"\nb.png,y\n", "labels.csv, row 3: y is no list of labels, such as ['sun', 'wind']"),
    ("path,label\na.png,x\n,y\n", "labels.csv, row 3: the path is empty"),
    (
        "path,label\na.png,x\nd.png,y\ne.png,y\n",
        "names 2 of 3 images that are not there, the first one in row 3",
    ),
    (
        "path,label\na.png,x\n./a.png,y\n",
        "row 3: ./a.png is in row 2 too, with other labels (x, here y)",
    ),
    ("path,label\na.png,x\na.png,x\n", "row 3: a.png is in row 2 too: leave one of them out"),
    ("path,label,split\na.png,x,train\na.png,x,val\n", "row 3: a.png is in row 2 too, in another split"),
    ("path,label,split\na.png,x,fold1\n", "labels.csv, row 2: the split is 'fold1', not one of train, val"),
    ("path,label,subset\na.png,x,train\nb.png,y,extra\n", "row 3: the subset is 'extra', not one of train, val, test"),
    ("path,label,is_valid,is_test\na.png,x,0,1\nb.png,y,1,0\n", "columns is_valid and is_test both give splits: keep"),
    ("path,sun,age\na.png,1,1\nb.png,0,34\n", "labels.csv, row 3: age is '34', and without a column such as label"),
    ("path,sun,wind\na.png,1,0\nb.png,,1\n", "labels.csv, row 3: sun is '', and without a column such as label"),
    ("path,sun,wind\na.png,1,0\nb.png,-1,1\n", "labels.csv, row 3: sun is '-1', and without a column such as label"),
    ("path,sun,sun\na.png,1,0\n", "labels.csv has two columns called 'sun'"),
    ("path,label\na.png,x\nb.png,x\n", "labels.csv holds images of 1 class (x), at least 2 are needed"),
    ("path,label,split\na.png,x,test\nb.png,y,test\n", "labels.csv has no split 'train'; it has test"),
    ("path,label,split\na.png,x,train\nb.png,y,train\nc.jpg,z,val\n", "classes that were not trained on: z; known are"),
]


@pytest.mark.parametrize(("text", "line"), WRONG)
def test_a_wrong_table_is_one_line(places: Path, text: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    (places / "labels.csv").write_text(text)
    assert main(["train", str(places / "labels.csv"), "--out", str(places / "run"), *options(SETTINGS)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ulsam: error: ") and error.count("\n") == 1
    assert line in error
    assert not (places / "run").exists()


def test_what_is_no_table_is_one_line(places: Path) -> None:
    (places / "labels.csv").write_bytes("path,label\na.png,x\n".encode("utf-16"))
    with pytest.raises(UlsamError, match="is no text in UTF-8: save it as CSV in UTF-8"):
        read_table(places / "labels.csv")
    (places / "labels.csv").write_text('path,label\n"' + "a" * 200_000 + '",x\n')
    with pytest.raises(UlsamError, match="is no CSV: field larger than field limit"):
        read_table(places / "labels.csv")
    with pytest.raises(UlsamError, match=r"no table .*other\.csv"):
        open_data(str(places / "other.csv"))


@pytest.mark.parametrize(
    ("header", "values", "splits", "note"),
    [
        (
            "path,label,is_valid",
            ("x,False", "x,True", "x,False"),
            "train val train",
            "column is_valid gives the splits",
        ),
        ("path,is_valid,sun,set", ("0,1,0", "1,0,1", "0,1,1"), "train val train", "column is_valid gives the splits"),
        ("path,label,is_test", ("x,0", "x,1", "x,0"), "train test train", "column is_test gives the splits"),
        ("path,label,is train", ("x,1.0", "x,0.0", "x,1.0"), "train val train", "column is_train gives the splits"),
        ("path,label,Subset", ("x,Training", "x,Testing", "x,dev"), "train test val", "column subset gives the splits"),
        ("path,labels,phase", ("x,train", "x,val", "x,test"), "train val test", "column phase gives the splits"),
        ("path,label,whatever", ("x,train", "x,val", "x,test"), "train val test", "column whatever gives the splits"),
        ("path,label,whatever", ("x,train", "x,bus", "x,test"), "", None),
        (
            "path,label,fold",
            ("x,0", "x,1", "x,2"),
            "",
            "column fold is not read: a column split holds train, val or test",
        ),
        ("path,label,is_valid", ("x,1", "x,1", "x,1"), "", "column is_valid is not read: a column split holds train"),
        ("path,label,split,fold", ("x,train,0", "x,val,0", "x,test,1"), "train val test", "column fold is not read"),
    ],
)
def test_columns_of_splits_by_other_names(
    places: Path, header: str, values: tuple[str, ...], splits: str, note: str | None
) -> None:
    rows = [f"{name},{value}" for name, value in zip(("a.png", "b.png", "c.jpg"), values, strict=True)]
    (places / "labels.csv").write_text("\n".join((header, *rows)))
    table = read_table(places / "labels.csv")
    assert [row.split for row in table.rows] == (splits.split() or [None] * 3)
    assert note in table.note if note and table.note else table.note is note


def test_a_table_of_one_label_each_is_the_folder(folder: Path) -> None:
    train, val, notes = open_data(str(table_of(folder)), seed=3)
    same, same_val, same_notes = open_data(str(folder), seed=3)
    assert list(train.samples) == list(same.samples)
    assert list(val.samples) == list(same_val.samples)
    assert (train.classes, val.split, notes) == (same.classes, "held-out", same_notes[-len(notes) :])


def test_the_column_split_gives_the_parts(folder: Path) -> None:
    table = str(table_of(folder, "splits.csv", splits=True))
    train, val, _ = open_data(table)
    assert (len(train), len(val), val.split) == (15, 6, "validation")
    assert len(open_split(table, "test", train.classes)) == 3
    with pytest.raises(UlsamError, match=r"has no split 'other'; it has train, val, test"):
        open_data(table, val_split="other")
    with pytest.raises(UlsamError, match="it is one table without a column split; leave `val_split` out"):
        open_data(str(table_of(folder)), val_split="val")
    train, val, _ = open_data(table, val_fraction=0.4)
    assert (len(train), len(val)) == (9, 6)
    assert not set(train.samples) & set(val.samples)


def test_held_out_images_of_several_labels_are_the_same_for_a_seed(places: Path) -> None:
    rows = [("path", "labels"), *((f"{n}.png", "x;y" if n % 3 else "") for n in range(20))]
    for path, _ in rows[1:]:
        (places / path).touch()
    table = str(write_table(places / "t.csv", rows))
    chosen = [open_data(table, seed=seed)[1] for seed in (1, 1, 2)]
    assert [len(images) for images in chosen] == [4, 4, 4]
    assert list(chosen[0].samples) == list(chosen[1].samples) != list(chosen[2].samples)
    train = open_data(table, seed=1)[0]
    assert isinstance(train, LabelSetImages)
    found = {Path(train.name(n)).name: train.folder.words(train.samples[n][1]) for n in range(len(train))}
    assert found == {path: labels for path, labels in rows[1:] if path in found}
    with pytest.raises(UlsamError, match="row 2: 0 labels, where one class an image is needed"):
        open_split(table, "all", ("x", "y"), several=False)


def test_a_changed_label_changes_the_identity_of_the_data(folder: Path, tmp_path: Path) -> None:
    rows = rows_of(folder)
    one = write_table(tmp_path / "one.csv", [("path", "label"), *rows])
    other = write_table(tmp_path / "other.csv", [("path", "label"), *rows[:-1], (rows[-1][0], "class0")])
    (tmp_path / "place").mkdir()
    moved = write_table(tmp_path / "place" / "one.csv", [("path", "label"), *rows])
    configs = [TrainConfig(str(table), data_dir=str(folder)) for table in (one, other, moved)]
    digests = [data_digest(config) for config in configs]
    assert digests[0] != digests[1]
    assert digests[0] == digests[2]
    names = [open_data(str(table), data_dir=str(folder))[0].names for table in (one, other)]
    assert names[0][0] == "/class0/000.png\tclass0"
    assert names[0] != names[1] or digests[0] != digests[1]


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a table of one label each, with splits."""
    run = tmp_path_factory.mktemp("runs") / "run"
    ulsam.train(table_of(folder, "splits.csv", splits=True), run, **SETTINGS)
    return run


def test_training_on_a_table_is_training_on_the_folder(folder: Path, run: Path, tmp_path: Path) -> None:
    for number, (path, label) in enumerate(rows_of(folder)):
        split = ("train", "val", "test")[(number % 8 > 4) + (number % 8 > 6)]
        target = tmp_path / "data" / split / label / Path(path).name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(folder / path, target)
    ulsam.train(tmp_path / "data", tmp_path / "run", **SETTINGS)
    one, two = (json.loads((place / "summary.json").read_text()) for place in (run, tmp_path / "run"))
    assert one["scores"] == two["scores"]
    assert (run / "model.safetensors").read_bytes() == (tmp_path / "run" / "model.safetensors").read_bytes()


def test_eval_measures_a_tables_test_split_and_notes_images_trained_on(
    folder: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, model = str(folder / "splits.csv"), str(run / "model.safetensors")
    assert main(["eval", model, table, "-j", "0"]) == 0
    found = capsys.readouterr()
    assert "on      3 images, split test" in found.out
    assert "note" not in found.out + found.err
    assert main(["eval", model, str(table_of(folder)), "-j", "0"]) == 0
    assert "the model was trained on 15 of these 24 images" in capsys.readouterr().err
    assert main(["eval", table, model]) == 2
    assert f"the model comes first: ulsam eval {model} {table}" in capsys.readouterr().err


def test_check_reads_tables(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = check(table_of(folder, "splits.csv", splits=True))
    assert found.splits == {
        "train": dict.fromkeys(("class0", "class1", "class2"), 5),
        "val": dict.fromkeys(("class0", "class1", "class2"), 2),
        "test": dict.fromkeys(("class0", "class1", "class2"), 1),
    }
    first = folder / "class0" / "000.png"
    (tmp_path / "copy.png").write_bytes(first.read_bytes())
    rows = [("path", "labels"), (first, "x;y"), ("copy.png", "x")]
    table = write_table(tmp_path / "several.csv", rows)
    found = check(table)
    assert found.splits == {"all": {"x": 2, "y": 1}}
    assert [(Path(pair.second).name, pair.identical) for pair in found.conflicts] == [("copy.png", True)]
    assert main(["check", str(table), "--sheet", str(tmp_path / "sheet.png")]) == 0
    out = capsys.readouterr().out
    assert "all       2 images of 2 classes, 1 to 2 a class" in out
    assert "several labels an image, column labels, divided at ; or |" in out
    assert (tmp_path / "sheet.png").stat().st_size > 1000


@pytest.mark.slow
def test_comparing_slimming_and_reporting_take_tables(
    folder: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = str(folder / "splits.csv")
    found = ulsam.compare(
        table, ["base", "insert blocks.2"], tmp_path / "compare", seeds=1, settings={**SETTINGS, "epochs": 1}
    )
    assert [arm["seeds"] for arm in found["arms"]] == [[0], [0]]
    chosen = ulsam.slim(
        run / "model.safetensors",
        table,
        tmp_path / "slim",
        macs=0.999,
        layer={"layer": "none"},
        fine_tune=False,
        reconstruct_sets=0,
        settings={"workers": 0, "device": "cpu", "reconstruct_images": 8},
    )
    assert chosen["images"]["training"] == 15
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert "class0/005.png" in (tmp_path / "page.html").read_text()


def test_the_advice_for_a_folder_names_its_table(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    table = write_table(tmp_path / "labels.csv", [("path", "tags"), ("a.png", "x")])
    line = f"labels in labels.csv: name the file itself, ulsam train {table}"
    with pytest.raises(UlsamError, match=re.escape(line)):
        open_data(str(tmp_path))


def test_label_sets_are_numbered_like_the_model(places: Path) -> None:
    table = write_table(places / "t.csv", [("path", "labels"), ("a.png", "y"), ("b.png", "y;x"), ("c.jpg", "")])
    images = open_split(str(table), "all", ("x", "w", "y"), several=True)
    assert isinstance(images, LabelSetImages)
    assert images.sets.astype(int).tolist() == [[0, 0, 1], [1, 0, 1], [0, 0, 0]]
    assert images.labels is None
    assert images.folder.counts() == [1, 0, 2]
    both = dataclasses.replace(images, sets=np.concatenate([images.sets, images.sets]))
    assert both.folder.counts() == [1, 0, 2]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("path,label,split\na/1.png,a,train\na/1,a,val\n", "row 3: a/1 is the file of row 2, a/1.png: leave one"),
        ("path,label\na/1.png,a\nA_PATH/a/1.png,b\n", "row 3: A_PATH/a/1.png is the file of row 2, a/1.png"),
        ("path,label,label\na/1.png,a,b\n", "has two columns called 'label': leave one of them out"),
        ("path,label\nphoto.heic,a\n", "row 2: HERE/photo.heic is a .heic, which is not read: convert it to JPEG"),
        ("path,label\na,a\n", "row 2: HERE/a is a folder, which is not read: name an image file"),
    ],
)
def test_one_file_by_two_paths_and_what_is_no_image_are_one_line(text: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").touch()
    (tmp_path / "photo.heic").touch()
    (tmp_path / "labels.csv").write_text(text.replace("A_PATH", str(tmp_path)))
    wanted = line.replace("HERE", str(tmp_path)).replace("A_PATH", str(tmp_path))
    with pytest.raises(UlsamError) as caught:
        table_images(read_table(tmp_path / "labels.csv"), "train" if "split" in text else None, min_classes=1)
    assert wanted in str(caught.value) and "\n" not in str(caught.value)


def test_absolute_and_relative_paths_stand_in_one_table(folder: Path, tmp_path: Path) -> None:
    rows = rows_of(folder)
    mixed = [(str(folder / path) if number % 2 else path, label) for number, (path, label) in enumerate(rows)]
    table = write_table(tmp_path / "mixed.csv", [("path", "label"), *mixed])
    train, val, _ = open_data(str(table), data_dir=str(folder))
    same, same_val, _ = open_data(str(folder))
    for images, its in ((train, same), (val, same_val)):
        assert [label for _, label in images.samples] == [label for _, label in its.samples]
        assert [Path(name.split("\t")[0]).name for name in images.names] == [Path(name).name for name in its.names]
