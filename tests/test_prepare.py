"""`ulsam prepare` on tiny archives in the official formats."""

import io
import os
import re
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ulsam.base.errors import UlsamError
from ulsam.cli import main
from ulsam.data.prepare import OFFICIAL, mismatch, prepare

FOOD_TRAIN = [f"{food}/{n}" for food in ("apple_pie", "waffles") for n in (11, 12, 13)]
FOOD_TEST = ["apple_pie/21", "waffles/22"]
BIRDS = [
    "001.Black_footed_Albatross/B_0001_1.jpg",
    "001.Black_footed_Albatross/B_0002_2.jpg",
    "200.Yellowthroat/Y_1.jpg",
]
DOGS = ["n02085620-Chihuahua/n02085620_1.jpg", "n02116738-African_hunting_dog/n02116738_2.jpg"]


def jpeg(name: str) -> bytes:
    """A small image that is another one for another name."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 6), tuple(name.encode()[-7:-4])).save(stream, "jpeg")
    return stream.getvalue()


def pack(path: Path, files: dict[str, bytes]) -> Path:
    """Write a tar archive, compressed if its name says so."""
    with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def unpack(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder


def food101(folder: Path, **changes: bytes | None) -> Path:
    """Lists last, as they may be; a change of None leaves a file out."""
    files = {f"food-101/images/{name}.jpg": jpeg(name) for name in FOOD_TRAIN + FOOD_TEST}
    files |= {
        "food-101/images/waffles/99.jpg": b"in no list",
        "food-101/README.txt": b"hello",
        "food-101/images/.x": b"",
    }
    files["food-101/meta/train.txt"] = ("\n".join(FOOD_TRAIN) + "\n").encode()
    files["food-101/meta/test.txt"] = "\n".join(FOOD_TEST).encode()
    files |= {f"food-101/{name}": content for name, content in changes.items() if content is not None}
    for name in changes:
        if changes[name] is None:
            del files[f"food-101/{name}"]
    return pack(folder / "food-101.tar.gz", files)


def cub200(folder: Path) -> Path:
    files = {"attributes.txt": b"1 has_bill", "./CUB_200_2011/README": b"hello"}
    files["CUB_200_2011/images.txt"] = "".join(f"{n} {name}\n" for n, name in enumerate(BIRDS, 1)).encode()
    files["CUB_200_2011/train_test_split.txt"] = b"1 0\n2 1\n3 1\n"
    files |= {f"./CUB_200_2011/images/{name}": jpeg(name) for name in BIRDS}
    files["CUB_200_2011/images/._001.Black_footed_Albatross"] = b"a resource fork"
    return pack(folder / "CUB_200_2011.tgz", files)


def dogs(folder: Path) -> list[Path]:
    savemat = pytest.importorskip("scipy.io").savemat
    lists = {}
    for name, files in {"train": DOGS[:1], "test": DOGS[1:], "file": DOGS}.items():
        cells = np.empty((len(files), 1), object)
        cells[:, 0] = files
        stream = io.BytesIO()
        savemat(stream, {"file_list": cells, "annotation_list": cells, "labels": np.ones((len(files), 1))})
        lists[f"{name}_list.mat"] = stream.getvalue()
    images = {f"Images/{name}": jpeg(name) for name in DOGS}
    return [pack(folder / "images.tar", images), pack(folder / "lists.tar", lists)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


FOOD = {f"train/{name}.jpg": jpeg(name) for name in FOOD_TRAIN} | {f"test/{name}.jpg": jpeg(name) for name in FOOD_TEST}
BIRD = {f"{part}/{name}": jpeg(name) for part, name in zip(("test", "train", "train"), BIRDS, strict=True)}
DOG = {f"{part}/{name}": jpeg(name) for part, name in zip(("train", "test"), DOGS, strict=True)}


@pytest.mark.parametrize("unpacked", [False, True])
@pytest.mark.parametrize(
    ("name", "make", "expected"), [("food101", food101, FOOD), ("cub200", cub200, BIRD), ("dogs", dogs, DOG)]
)
def test_official_archives(tmp_path, name, make, expected, unpacked):
    archives = make(tmp_path)
    archives = archives if isinstance(archives, list) else [archives]
    if unpacked:
        archives = [unpack(archive, tmp_path / archive.stem) for archive in archives]
    counts = prepare(name, archives, tmp_path / "new" / "out")
    assert contents(tmp_path / "new" / "out") == expected
    assert counts["train"] == sum(path.startswith("train/") for path in expected)
    assert counts["test"] == sum(path.startswith("test/") for path in expected)
    assert counts["classes"] == 2
    assert os.listdir(tmp_path / "new") == ["out"]


def test_the_unpacked_folder_itself(tmp_path):
    folder = unpack(food101(tmp_path), tmp_path / "there")
    prepare("food101", str(folder / "food-101"), tmp_path / "out")
    assert contents(tmp_path / "out") == FOOD


def test_an_empty_folder_is_accepted_and_a_filled_one_is_not(tmp_path):
    archive, out = food101(tmp_path), tmp_path / "out"
    out.mkdir()
    prepare("food101", archive, out)
    before = contents(out)
    for taken in (out, archive):
        with pytest.raises(UlsamError, match="not an empty folder"):
            prepare("food101", archive, taken)
    assert contents(out) == before


def test_command_line(tmp_path, capsys):
    assert main(["prepare", "food101", str(food101(tmp_path)), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert "6 train and 2 test images of 2 classes" in printed.out
    assert "75750 train and 25250 test images of 101 classes" in printed.err
    assert main(["prepare", "food101", str(tmp_path / "nowhere.tar"), str(tmp_path / "out2")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_two_archives_on_the_command_line(tmp_path, capsys):
    assert main(["prepare", "dogs", *map(str, dogs(tmp_path)), str(tmp_path / "out")]) == 0
    assert contents(tmp_path / "out") == DOG


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_official_counts_raise_no_warning(name):
    counts = OFFICIAL[name].counts
    assert mismatch(name, counts) is None
    assert all(mismatch(name, {**counts, one: count - 1}) for one, count in counts.items())


def test_with_the_official_counts_the_command_prints_no_warning(tmp_path, capsys):
    """As many files as CUB-200-2011 has; nothing decodes them, so they are empty."""
    train, test, classes = OFFICIAL["cub200"].counts.values()
    names = [f"{n % classes:03}.Bird/{n}.jpg" for n in range(train + test)]
    files = {f"CUB_200_2011/images/{name}": b"" for name in names}
    files["CUB_200_2011/images.txt"] = "".join(f"{n} {name}\n" for n, name in enumerate(names)).encode()
    split = "".join(f"{n} {int(n < train)}\n" for n in range(len(names)))
    files["CUB_200_2011/train_test_split.txt"] = split.encode()
    archive = pack(tmp_path / "CUB_200_2011.tar", files)
    assert main(["prepare", "cub200", str(archive), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path / 'out'}: 5994 train and 5794 test images of 200 classes\n"
    assert printed.err == ""


def fails(folder: Path, name: str, archives: Path | list[Path], match: str) -> None:
    """One line, and nothing left behind."""
    before = sorted(os.listdir(folder))
    with pytest.raises(UlsamError, match=match) as caught:
        prepare(name, archives, folder / "out")
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(folder)) == before


def test_a_listed_image_that_is_missing_is_named(tmp_path):
    archive = food101(tmp_path, **{"images/waffles/12.jpg": None})
    fails(tmp_path, "food101", archive, r"waffles/12\.jpg of the official split not found")
    archive = food101(tmp_path, **{"images/waffles/12.jpg": None, "images/waffles/22.jpg": None})
    fails(tmp_path, "food101", archive, r"waffles/12\.jpg and 1 more of the official split not found")


def test_lists_missing_empty_or_damaged(tmp_path):
    fails(tmp_path, "food101", food101(tmp_path, **{"meta/test.txt": None}), "no meta/test.txt in .*made from food-101")
    fails(tmp_path, "food101", food101(tmp_path, **{"meta/test.txt": b"", "meta/train.txt": b"\n"}), "name no images")
    fails(tmp_path, "food101", food101(tmp_path, **{"meta/test.txt": b"\xff\xfe"}), "damaged")
    images, lists = dogs(tmp_path)
    pack(lists, {"train_list.mat": b"MATLAB, or so it says", "test_list.mat": b""})
    fails(tmp_path, "dogs", [images, lists], "damaged")


def test_another_archive(tmp_path):
    fails(tmp_path, "cub200", food101(tmp_path), r"no images\.txt in .*CUB_200_2011\.tgz")
    fails(tmp_path, "dogs", dogs(tmp_path)[0], r"no train_list\.mat in .*images\.tar and lists\.tar")
    fails(tmp_path, "cub200", tmp_path, r"no images\.txt in ")
    with pytest.raises(UlsamError, match="food101, dogs, cub200"):
        prepare("food", tmp_path, tmp_path / "out")


@pytest.mark.parametrize("name", ["food101", "dogs"])
def test_a_cut_archive(tmp_path, name):
    archives = food101(tmp_path) if name == "food101" else dogs(tmp_path)
    first = archives[0] if isinstance(archives, list) else archives
    whole = first.read_bytes()
    length = len(whole) if first.suffix == ".gz" else max(n for n in range(len(whole)) if whole[n]) + 1
    for keep in [0, 1, *range(length // 10, length, length // 10)]:
        first.write_bytes(whole[:keep])
        fails(tmp_path, name, archives, "cut off")


def test_no_tar_archive(tmp_path):
    (tmp_path / "food-101.tar.gz").write_bytes(b"<html>404 not found</html>" * 99)
    fails(tmp_path, "food101", tmp_path / "food-101.tar.gz", "no tar archive: download it again")


def test_no_scipy(tmp_path, monkeypatch):
    archives = dogs(tmp_path)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    fails(tmp_path, "dogs", archives, r"pip install 'ulsam\[dogs\]'")


def test_a_hostile_archive_writes_nowhere_else(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    here = tmp_path / "here"
    here.mkdir()
    archive = food101(here)
    files = contents(unpack(archive, tmp_path / "unpacked"))
    evil = [
        "../../outside/x.jpg",
        "../x.jpg",
        "a/../../x.jpg",
        "..",
        "a/..",
        str(outside / "y.jpg"),
        "./x.jpg",
        "a/b/c.jpg",
    ]
    with tarfile.open(archive, "w:gz") as tar:
        link = tarfile.TarInfo("food-101/images/apple_pie")
        link.type, link.linkname = tarfile.SYMTYPE, str(outside)
        tar.addfile(link)
        hard = tarfile.TarInfo("food-101/images/waffles/99.jpg")
        hard.type, hard.linkname = tarfile.LNKTYPE, "/etc/hostname"
        tar.addfile(hard)
        for name, content in [(f"food-101/images/{name}", b"evil") for name in evil] + list(files.items()):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    prepare("food101", archive, here / "out")
    assert contents(here / "out") == FOOD
    assert os.listdir(outside) == []
    assert sorted(os.listdir(here)) == ["food-101.tar.gz", "out"]


def test_interrupted_leaves_nothing(tmp_path, monkeypatch):
    archive = food101(tmp_path)
    real = shutil.copyfileobj
    calls = []

    def interrupt(source, target):
        calls.append(source)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(shutil, "copyfileobj", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare("food101", archive, tmp_path / "out")
    assert os.listdir(tmp_path) == ["food-101.tar.gz"]


def test_what_a_killed_run_left_is_cleared(tmp_path):
    left = tmp_path / ".out.partial" / "unsorted" / "apple_pie"
    left.mkdir(parents=True)
    (left / "11.jpg").write_bytes(b"half")
    prepare("food101", food101(tmp_path), tmp_path / "out")
    assert contents(tmp_path / "out") == FOOD
    assert sorted(os.listdir(tmp_path)) == ["food-101.tar.gz", "out"]


def test_an_image_that_cannot_be_written_whole(tmp_path, interpreter):
    archive, out, log = (
        food101(tmp_path, **{"images/waffles/12.jpg": bytes(100_000)}),
        tmp_path / "out",
        tmp_path / "log",
    )
    words = ["prepare", "food101", archive, out]
    assert interpreter.run(words, log, file_size=50_000) == 2
    assert re.search(r"^ulsam: error: cannot make .*out: .*File too large\n\Z", log.read_text(), re.MULTILINE)
    assert sorted(os.listdir(tmp_path)) == ["food-101.tar.gz", "log"]


def test_the_commands_in_the_docs(tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "docs" / "datasets.md").read_text()
    commands = [line.split()[1:] for line in page.splitlines() if line.startswith("ulsam prepare ")]
    commands = [command for command in commands if command[1] != "csv"]  # tests/test_check.py makes tables
    assert {command[1] for command in commands} == set(OFFICIAL)
    food101(tmp_path), dogs(tmp_path), cub200(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert [main(command) for command in commands] == [0] * len(commands)
    assert contents(tmp_path / "data") == {
        f"{folder}/{path}": content
        for folder, expected in (("food101", FOOD), ("dogs", DOG), ("cub200", BIRD))
        for path, content in expected.items()
    }
