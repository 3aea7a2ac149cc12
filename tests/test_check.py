"""`ulsam check` finds what was put into a folder, and nothing else; tables become folders; other layouts are named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ulsam.base.errors import UlsamError
from ulsam.cli import main
from ulsam.data.check import Checked, check
from ulsam.data.labelled import labelled
from ulsam.data.layouts import advice, misread
from ulsam.data.prepare_table import prepare_table
from ulsam.model.build import build, make_spec, save


def draw(seed: int, size: int = 96) -> Image.Image:
    """Smooth shapes, as photos have; each seed has its own."""
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


def images(folder: Path, seeds: range) -> None:
    folder.mkdir(parents=True)
    for seed in seeds:
        draw(seed).save(folder / f"{seed:03}.png")


def two_classes(root: Path) -> None:
    images(root / "robin", range(2))
    images(root / "wren", range(2, 4))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    images(root / "train" / "robin", range(0, 8))
    images(root / "train" / "wren", range(8, 16))
    images(root / "test" / "robin", range(16, 20))
    images(root / "test" / "wren", range(20, 24))
    return root


def named(found: Checked) -> dict[str, list[tuple[str, str, bool]]]:
    def name(path: str) -> str:
        return Path(path).parts[-3] + Path(path).stem

    kinds = {"leaks": found.leaks, "conflicts": found.conflicts, "duplicates": found.duplicates}
    return {kind: [(name(one), name(two), same) for one, two, same in pairs] for kind, pairs in kinds.items()}


def test_a_clean_folder_has_no_findings(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = check(data)
    assert found.splits == {"train": {"robin": 8, "wren": 8}, "test": {"robin": 4, "wren": 4}}
    assert found.sides == (96, 96, 96)
    assert named(found) == {"leaks": [], "conflicts": [], "duplicates": []}
    assert (found.broken, found.notes) == ((), ())
    assert main(["check", str(data)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "found     nothing that is wrong"


def test_copies_are_found_whatever_their_size_and_quality(data: Path) -> None:
    shutil.copy(data / "train/robin/001.png", data / "test/robin/copy.png")  # a leak, to the bit
    draw(9).resize((60, 60)).save(data / "test/wren/small.jpg", quality=60)  # a leak, by its look
    draw(2).save(data / "train/wren/again.bmp")  # the same pixels in another class
    draw(10).save(data / "train/wren/twice.jpg", quality=80)
    found = named(check(data, workers=1))
    assert sorted(found["leaks"]) == [("train001", "testcopy", True), ("train009", "testsmall", False)]
    assert found["conflicts"] == [("train002", "trainagain", True)]
    assert found["duplicates"] == [("train010", "traintwice", False)]


def test_plain_images_are_no_copies_of_each_other(data: Path) -> None:
    for number, gray in enumerate((40, 44, 200)):
        Image.new("RGB", (96, 96), (gray,) * 3).save(data / "train" / "robin" / f"plain{number}.png")
    assert named(check(data))["duplicates"] == []


def test_broken_images_and_odd_classes_are_reported(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "train" / "wren" / "bad.jpg").write_bytes(b"\xff\xd8\xffno")
    (data / "train" / "wren" / "notes.txt").write_text("x")
    images(data / "train" / "New folder", range(30, 32))
    images(data / "test" / "tit", range(40, 42))
    assert main(["check", str(data), "--json"]) == 2
    told = capsys.readouterr()
    assert "training on it is refused: " in told.err and "has classes that were not trained on: tit" in told.err
    found = json.loads(told.out)
    assert found["refused"] in told.err
    assert len(found["broken"]) == 1 and "bad.jpg: " in found["broken"][0]
    notes = "\n".join(found["notes"])
    assert "train/: 1 files are no images by name, such as notes.txt" in notes
    assert "classes that are called like no class: 'New folder'" in notes
    assert "classes of test/ that train/ lacks: tit" in notes
    assert "classes of train/ that test/ lacks: New folder" in notes
    assert "classes with fewer than 5 images: New folder (2)" in notes


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ("{0},a,val\n{1},b,val\n", "labels.csv has no split 'train'; it has val"),
        ("{0},a,train\n{1},a,train\n", "labels.csv holds images of 1 class (a), at least 2 are needed"),
        ("{0},a,train\n{1},b,train\n", "nothing to hold out: no class has two images or more"),
        ("{0},a,train\n{1},b,train\n{2},c,val\n", "labels.csv has classes that were not trained on: c;"),
    ],
)
def test_what_training_refuses_is_a_fault(
    rows: str, fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = table(tmp_path / "data", "path,label,split\n" + rows.format(*(f"photos/{n:03}.png" for n in range(3))))
    assert main(["check", str(file)]) == 2
    told = capsys.readouterr()
    assert "training on it is refused: " in told.err and fault in told.err
    assert "nothing that is wrong" not in told.out and "sides     96 to 96 px" in told.out
    assert main(["train", str(file), "--model", "test_efficientnet"]) == 2
    assert fault in capsys.readouterr().err


def test_one_class_alone_is_a_fault(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(data / "train" / "wren")
    assert main(["check", str(data / "train")]) == 2
    told = capsys.readouterr()
    assert "holds images of 1 class (robin), at least 2 are needed" in told.err
    assert "nothing that is wrong" not in told.out


def test_the_sheet_shows_the_image_and_what_training_makes_of_it(data: Path, tmp_path: Path) -> None:
    sheet, config = tmp_path / "sheet.png", tmp_path / "train.yaml"
    config.write_text("model: test_efficientnet\nsize: 48\ncrop_scale: [1.0, 1.0]\nhflip: 1.0\ncolor_jitter: 0\n")
    assert main(["check", str(data), "--sheet", str(sheet), "--config", str(config)]) == 0
    cells = np.asarray(Image.open(sheet).convert("RGB")).astype(int).reshape(8, 52, 7, 52, 3).swapaxes(1, 2)
    for row in cells[:, :, :48, :48]:
        mirrored = row[0][:, ::-1]
        assert np.abs(row[1] - mirrored).mean() < 25 < np.abs(row[1] - row[0]).mean()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda root: two_classes(root / "images"), "one level deeper: did you mean {root}/images?"),
        (lambda root: two_classes(root / "a" / "b"), "2 levels deeper: did you mean {root}/a/b?"),
        (lambda root: images(root / "set" / "train" / "robin", range(1)), "one level deeper: did you mean {root}/set?"),
        (lambda root: images(root / "test" / "robin", range(1)), "test lies alone in it: did you mean {root}/test?"),
    ],
)
def test_the_wrong_level_of_folder_names_the_right_one(
    make: Callable[[Path], None],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    root = Path("data")
    make(root)
    right = expected.format(root=root)
    assert (advice(root) or "").replace("\\", "/").endswith(right.replace("\\", "/"))
    for words in (["check", "data"], ["train", "data", "--model", "test_efficientnet"]):
        assert main(words) == 2
        assert "did you mean" in capsys.readouterr().err


def test_a_class_folder_names_the_folder_of_classes(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["check"], ["train", "--model", "test_efficientnet"]):
        assert main([*words, str(data / "train" / "robin")]) == 2
        told = capsys.readouterr().err
        assert f"images without class folders: did you mean {(data / 'train').resolve()}?" in told


@pytest.mark.parametrize("beside", ["other", "train", ".hidden"])
def test_loose_images_are_not_sent_to_a_folder_without_classes(tmp_path: Path, beside: str) -> None:
    images(tmp_path / "photos" / "loose", range(2))
    images(tmp_path / "photos" / beside / "deeper", range(2))
    told = advice(tmp_path / "photos" / "loose") or ""
    assert told == "images without class folders: sort them into one folder a class, or name a CSV of paths and labels"


def test_the_folder_of_a_run_is_named_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    images(run, range(1))
    (run / "config.yaml").write_text("model: test_efficientnet\n")
    (run / "metrics.csv").write_text("epoch,train_loss\n")
    images(tmp_path / "robin", range(2))
    for words in (["check", str(run)], ["train", str(run), "--model", "test_efficientnet"]):
        assert main(words) == 2
        assert "the folder of a training run, which holds no images to learn from" in capsys.readouterr().err


def yolo(root: Path, form: str) -> None:
    for split in ("train", "val"):
        images(root / form.format("images", split), range(1))
        (root / form.format("labels", split)).mkdir(parents=True)
        (root / form.format("labels", split) / "000.txt").write_text("0 0.5 0.5 1 1\n")
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [a]\n")


def darknet(folder: Path) -> None:
    images(folder, range(3))
    (folder / "000.txt").write_text("")
    (folder / "001.txt").write_text("0 0.5 0.5 1 1\n12 0.25 0.25 0.1 0.1")
    (folder / "classes.txt").write_text("robin\nwren\n")


def coco(root: Path, file: str) -> None:
    for split in ("train2017", "val2017"):
        images(root / split, range(1))
    (root / file).parent.mkdir(exist_ok=True)
    (root / file).write_text('{"info": {}, "images": [], "annotations": []}')


def voc(root: Path, photos: str, marks: str) -> None:
    images(root / "VOC2012" / photos, range(1))
    (root / "VOC2012" / marks).mkdir()
    (root / "VOC2012" / marks / "000.xml").write_text("<annotation/>")


@pytest.mark.parametrize(
    ("make", "tool", "places"),
    [
        (
            lambda root: yolo(root, "{0}/{1}"),
            "YOLO",
            ["", "images", "images/train", "labels/val", "data.yaml", ".."],
        ),
        (lambda root: yolo(root, "{1}/{0}"), "YOLO", ["", "train", "train/images"]),
        (darknet, "YOLO", ["", ".."]),
        (lambda root: darknet(root / "obj_train_data"), "YOLO", ["", "obj_train_data"]),
        (lambda root: coco(root, "annotations/a.json"), "COCO", ["", "train2017", "annotations/a.json"]),
        (lambda root: coco(root, "train2017/_annotations.coco.json"), "COCO", ["", "train2017", "val2017"]),
        (lambda root: voc(root, "JPEGImages", "Annotations"), "Pascal VOC", ["", "VOC2012", "VOC2012/JPEGImages"]),
        (lambda root: voc(root, "images", "annotations"), "Pascal VOC", ["", "VOC2012", "VOC2012/images"]),
    ],
)
def test_images_with_boxes_are_named_wherever_the_command_points(
    make: Callable[[Path], None], tool: str, places: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "all" / "set")
    for place in places:
        for words in (["check"], ["train", "--model", "test_efficientnet"]):
            assert main([*words, str(tmp_path / "all" / "set" / place)]) == 2
            told = capsys.readouterr().err
            assert f"images with boxes, as {tool} detects objects: train a detector" in told
            assert "cut the boxes out into one folder a class, or write the classes of each image into a CSV" in told


def test_where_the_images_of_a_folder_lie_is_not_asked(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(build(spec := make_spec("test_efficientnet", ("robin", "wren")))[0], spec, tmp_path / "a.safetensors")
    for words in (["check"], ["train", "--model", "test_efficientnet"], ["eval", str(tmp_path / "a.safetensors")]):
        assert main([*words, str(data), "--data-dir", str(tmp_path)]) == 2
        assert capsys.readouterr().err.endswith(f"data sets by name, and {data} is a folder: leave it out\n")


def test_class_folders_beside_boxes_are_class_folders(data: Path) -> None:
    coco(data, "annotations/a.json")
    for place in (data, data / "train", data / "test"):
        assert misread(place) is None
    yolo(data.parent / "yolo", "{0}/{1}")
    for name in ("robin", "wren"):
        images(data.parent / "yolo" / "images" / name, range(2))
    assert misread(data.parent / "yolo" / "images") is None


def test_layouts_of_other_tools_name_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "food" / "meta").mkdir(parents=True)
    for name in ("train.txt", "test.txt"):
        (tmp_path / "food" / "meta" / name).write_text("a/1\n")
    assert f"Food-101 as it is published: ulsam prepare food101 {tmp_path / 'food'} OUT" == advice(tmp_path / "food")
    images(tmp_path / "proper" / "robin", range(2))
    images(tmp_path / "proper" / "wren", range(2))
    assert advice(tmp_path / "proper") is None


def table(root: Path, text: str) -> Path:
    images(root / "photos", range(4))
    (root / "labels.csv").write_text(text)
    return root / "labels.csv"


def test_a_table_becomes_the_folder_that_check_says_it_can(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = table(tmp_path / "data", "id,breed\nphotos/000,wren\nphotos/001.png,robin\nphotos/002,wren\n")
    assert main(["prepare", "csv", str(file), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: 3 images of 2 classes\n"
    made = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png"))
    assert made == ["robin/photos_001.png", "wren/photos_000.png", "wren/photos_002.png"]
    content = (tmp_path / "out" / "robin" / "photos_001.png").read_bytes()
    assert content == (tmp_path / "data" / "photos" / "001.png").read_bytes()


@pytest.mark.parametrize(
    ("folder", "text", "place"),
    [
        (".", "image_id,label\n000,a\n001,b\n", ""),
        ("images", "image_id,label\n000,a\n001,b\n", " --data-dir {root}/images"),
        ("images", "image_id,label\nimages/000.png,a\nimages/001.png,b\n", ""),
        ("images/all", "image_id,label\n000,a\n001,b\n", " --data-dir {root}/images/all"),
        ("train", "image_id,label\n000.png,a\n001.png,b\n", " --data-dir {root}/train"),
        ("train_images", "image_id,label\n000.png,a\n001.png,b\n", " --data-dir {root}/train_images"),
        ("images", "image_id,a,b\n000,1,0\n001,0,1\n", " --data-dir {root}/images"),
    ],
)
def test_a_table_beside_its_images_names_the_command(
    folder: str,
    text: str,
    place: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    root = Path("data")  # an error has at most 300 characters, and this one names it three times
    images(root / folder, range(4))
    if folder != ".":
        images(root / "test_images", range(4, 6))
    (root / "labels.csv").write_text(text)
    (root / "info.csv").write_text("id,width,height\n000,96,96\n")
    command = f"ulsam train {root / 'labels.csv'}{place.format(root=root)}"
    for words in (["check"], ["train", "--model", "test_efficientnet"]):
        assert main([*words, str(root)]) == 2
        told = capsys.readouterr().err
        assert f"labels in labels.csv: name the file itself, {command}\n" in told
    data, _, data_dir = command.split()[2:] if place else (command.split()[2], None, None)
    assert labelled(data, data_dir=data_dir).read().classes == ("a", "b")


@pytest.mark.parametrize("labels", [("robin", "wren"), ("red", "blue"), ("0", "1")])
@pytest.mark.parametrize("column", ["label", "labels"])
def test_a_table_beside_class_folders_changes_nothing(data: Path, column: str, labels: tuple[str, str]) -> None:
    files = sorted(path.relative_to(data).as_posix() for path in data.rglob("*.png"))
    rows = [f"{file},{labels[number % 2]}" for number, file in enumerate(files)]
    (data / "index.csv").write_text("\n".join([f"path,{column}", *rows]))
    assert advice(data) is None
    (data / "train" / "index.csv").write_text("\n".join([f"path,{column}", *(row[6:] for row in rows[8:])]))
    assert advice(data / "train") is None


def test_splits_of_a_table_become_splits_of_the_folder(tmp_path: Path) -> None:
    file = table(tmp_path / "data", "path,label,split\nphotos/000.png,a,train\nphotos/001.png,b,valid\n")
    assert prepare_table(file, tmp_path / "out") == {"images": 2, "classes": 2}
    assert (tmp_path / "out" / "val" / "b" / "photos_001.png").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x,y\n1,2\n", "needs a header with a column for the path"),
        ("path,label\nphotos/9.png,a\n", "row 2: no image"),
        ("path,label\nphotos/000.png,../a\n", r"row 2: '\.\./a' is no name of a folder"),
        ("path,label\nphotos/000.png,a,b\n", "row 2: 3 values, and the header has 2"),
        ("path,label\nphotos/000.png,a\nphotos/000,a\n", "row 3: photos/000 was there before"),
        ("path,label,split\nphotos/000.png,a,fold1\n", "row 2: the split is 'fold1', not one of train"),
    ],
)
def test_a_table_that_cannot_be_made_into_a_folder_leaves_none(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UlsamError, match=message):
        prepare_table(table(tmp_path / "data", text), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
