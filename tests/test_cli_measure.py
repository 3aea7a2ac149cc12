"""`ulsam eval` and `ulsam predict` on a model file: the numbers are the model's own, and mistakes get one line."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from ulsam.cli import main
from ulsam.model.build import build, save
from ulsam.model.spec import Edit, ModelSpec
from ulsam.training.evaluate import spec_transform

CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model file, a folder with val/ and test/, and what the model itself says of each image."""
    root = tmp_path_factory.mktemp("measure")
    torch.manual_seed(0)
    spec = ModelSpec("mobilenetv2_035", CLASSES, (Edit("replace", "14"),), input_size=(3, 32, 32))
    model, _ = build(spec)
    for module in model.eval().modules():  # spread the outputs, so that the images get different answers
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight)
    save(model, spec, root / "model.safetensors")
    said = {}
    for split, count in (("val", 1), ("test", 3)):
        for label, name in enumerate(CLASSES):
            folder = root / "data" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                color = tuple(60 * number + 90 if channel == 2 - label else 30 for channel in range(3))
                Image.new("RGB", (40, 36), color).save(folder / f"{number}.png")
                image = spec_transform(spec)(Image.new("RGB", (40, 36), color))
                said[str(folder / f"{number}.png")] = model(image[None]).softmax(1)[0]
    (root / "data" / "train").mkdir()
    return root, said


def test_eval_reports_what_the_model_says(world, capsys):
    root, said = world
    arguments = ["eval", str(root / "model.safetensors"), str(root / "data"), "--workers", "0"]
    assert main(arguments) == 0
    right = [CLASSES[int(p.argmax())] == path.split("/")[-2] for path, p in said.items() if "/test/" in path]
    out = capsys.readouterr().out
    assert f"top-1   {100 * sum(right) / 9:.2f} %" in out
    assert "9 images, split test" in out
    assert main([*arguments, "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)
    assert entry["scores"]["top1"] == pytest.approx(sum(right) / 9)
    assert sum(one["images"] for one in entry["scores"]["per_class"].values()) == 9
    assert entry["cost"]["input_size"] == [3, 32, 32]
    assert main([*arguments, "--split", "val"]) == 0
    assert "3 images, split val" in capsys.readouterr().out


def test_predict_names_every_image_in_order(world, capsys):
    root, said = world
    assert main(["predict", str(root / "model.safetensors"), str(root / "data" / "test"), "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == sorted(path for path in said if "/test/" in path)
    for line in lines:
        path, answer = line.split(": ")
        named = dict(re.findall(r"(\w+) ([\d.]+) %", answer))
        best = said[path].topk(2)
        assert list(named) == [CLASSES[index] for index in best.indices]
        assert [float(v) for v in named.values()] == pytest.approx([100 * v for v in best.values.tolist()], abs=0.06)


def test_predict_as_json_continues_after_a_bad_image_and_exits_2(world, capsys):
    root, said = world
    (root / "broken.jpg").write_bytes(b"no image")
    good = next(iter(said))
    assert main(["predict", str(root / "model.safetensors"), str(root / "broken.jpg"), good, "--json"]) == 2
    captured = capsys.readouterr()
    bad, fine = (json.loads(line) for line in captured.out.splitlines())
    assert bad["error"].startswith(str(root / "broken.jpg")) and bad["classes"] == {}
    assert fine["error"] is None and sum(fine["classes"].values()) == pytest.approx(1, abs=1e-4)
    assert captured.err == "ulsam: error: 1 of 2 images could not be read; they are named above\n"


def test_an_unreadable_image_is_reported_and_left_out(world, capsys, tmp_path):
    root, _ = world
    shutil.copytree(root / "data", tmp_path / "data")
    line = tmp_path / "data" / "test" / CLASSES[0] / "line.png"
    Image.new("L", (1, 3_000_000)).save(line)  # resized by its shorter side: 10 GB
    message = f"unreadable {line}: one side is more than 100 times as long as the other"
    assert main(["predict", str(root / "model.safetensors"), str(line)]) == 2
    assert message in capsys.readouterr().out.splitlines()
    assert main(["eval", str(root / "model.safetensors"), str(tmp_path / "data"), "--workers", "0"]) == 0
    printed = capsys.readouterr().out
    assert message in printed.splitlines() and "9 images, split test; 1 unreadable ones left out" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "TINY_MODEL", "ROOT/nowhere"], "no such folder|no such file"),
        (["eval", "TINY_MODEL", "ROOT/data", "--split", "tset"], "no split 'tset'; it has train, val, test"),
        (["eval", "ROOT/nowhere.safetensors", "ROOT/data"], "no model file"),
        (["predict", "TINY_MODEL", "ROOT/data/train"], "no images in the folder"),
        (["predict", "TINY_MODEL", "ROOT/data", "--top", "0"], "--top must be 1 or more"),
        (["predict", "ROOT/broken.jpg", "ROOT/data"], "no safetensors file, or is cut off"),
        (["eval", "TINY_MODEL", "ROOT/data", "--batch-size", "0"], "--batch-size must be 1 or more, not 0"),
        (["eval", "TINY_MODEL", "ROOT/data", "--batch-size", "-3"], "--batch-size must be 1 or more, not -3"),
        (["eval", "TINY_MODEL", "ROOT/data", "--workers", "-1"], "--workers must be 0 or more, not -1"),
    ],
)
def test_mistakes_get_one_line(world, capsys, words, message):
    root, _ = world
    (root / "broken.jpg").write_bytes(b"no image")
    assert (
        main([w.replace("TINY_MODEL", str(root / "model.safetensors")).replace("ROOT", str(root)) for w in words]) == 2
    )
    error = capsys.readouterr().err
    assert error.startswith("ulsam: error: ") and error.count("\n") == 1
    assert re.search(message, error)


def test_predict_skips_what_is_hidden(world, capsys, tmp_path):
    root, said = world
    for name in ("a.png", ".a.png", ".thumbnails/a.png", "more/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(next(iter(said)), tmp_path / name)
    assert main(["predict", str(root / "model.safetensors"), str(tmp_path)]) == 0
    named = [line.split(": ")[0] for line in capsys.readouterr().out.splitlines()]
    assert named == [str(tmp_path / "a.png"), str(tmp_path / "more" / "b.png")]


def test_names_do_not_command_the_terminal(capsys, tmp_path):
    spec = ModelSpec("mobilenetv2_035", ("a\x1b[2J", "b\nc"), input_size=(3, 32, 32))
    save(build(spec)[0], spec, tmp_path / "model.safetensors")
    folder = tmp_path / "data"
    for name in spec.classes:
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(folder / name / "1\x1b.png")
    assert main(["predict", str(tmp_path / "model.safetensors"), str(folder)]) == 0
    assert main(["eval", str(tmp_path / "model.safetensors"), str(folder), "--workers", "0"]) == 0
    (folder / "d\x1b").mkdir()
    shutil.copy(folder / "b\nc" / "1\x1b.png", folder / "d\x1b" / "1.png")
    assert main(["eval", str(tmp_path / "model.safetensors"), str(folder), "--workers", "0"]) == 2
    captured = capsys.readouterr()
    assert "a?[2J" in captured.out and "b?c" in captured.out
    assert "not trained on: d?" in captured.err and captured.err.count("\n") == 2  # a note of the other one
    assert "\x1b" not in captured.out + captured.err


@pytest.mark.parametrize("command", ["predict", "eval"])
def test_a_folder_that_may_not_be_listed_is_one_line(command, world, capsys, monkeypatch):
    root, _ = world
    scandir, denied = os.scandir, root / "data" / "test" / "green"

    def guarded(path):
        if Path(path) == denied:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    assert main([command, str(root / "model.safetensors"), str(root / "data")]) == 2
    assert capsys.readouterr().err == f"ulsam: error: cannot list the folder {denied}: permission denied\n"


@pytest.mark.parametrize("command", ["predict", "eval"])
def test_what_may_not_be_looked_at_is_one_line(command, world, capsys, monkeypatch):
    root, _ = world
    stat, denied = os.stat, str(root / "data")

    def guarded(path, *arguments, **options):
        if not isinstance(path, int) and os.fspath(path) == denied:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return stat(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", guarded)
    assert main([command, str(root / "model.safetensors"), denied]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("ulsam: error: ") and captured.err.count("\n") == 1
    assert denied in captured.out + captured.err


def test_a_model_file_that_may_not_be_read_is_one_line(world, capsys, monkeypatch):
    root, _ = world
    file, real = str(root / "model.safetensors"), open

    def guarded(path, *arguments, **options):
        if path == file or path == Path(file):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr("builtins.open", guarded)  # permissions do not bind root, who may run the tests
    for words in (["info", file], ["predict", file, str(root)], ["profile", file]):
        assert main(words) == 2
        assert capsys.readouterr().err == f"ulsam: error: cannot read {file}: permission denied\n"


def test_eval_of_a_flat_folder_says_that_training_images_may_be_in_it(world, capsys, tmp_path):
    root, _ = world
    shutil.copytree(root / "data" / "test", tmp_path / "flat")
    for data, may_be in ((tmp_path / "flat", True), (root / "data" / "test", False)):
        words = ["eval", str(root / "model.safetensors"), str(data), "--workers", "0"]
        assert main(words) == 0
        said = capsys.readouterr()
        assert ("nothing says that the model was not trained on these images" in said.err) == may_be
        assert "note" not in said.out


def test_eval_takes_classes_by_number_on_wish(world, capsys, tmp_path):
    root, _ = world
    for number in range(3):
        (tmp_path / f"n{number}").mkdir()
        Image.new("RGB", (32, 32)).save(tmp_path / f"n{number}" / "1.png")
    words = ["eval", str(root / "model.safetensors"), str(tmp_path), "--workers", "0"]
    assert main(words) == 2
    assert "--classes-by-number takes them by their position" in capsys.readouterr().err
    assert main([*words, "--classes-by-number"]) == 0
    assert "on      3 images" in capsys.readouterr().out


def test_eval_refuses_images_of_classes_that_the_model_does_not_know(world, capsys, tmp_path):
    root, _ = world
    (tmp_path / "purple").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "purple" / "1.png")
    assert main(["eval", str(root / "model.safetensors"), str(tmp_path)]) == 2
    assert "not trained on: purple" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["table", "folder"])
def test_labels_that_are_numbers_are_those_of_the_classes(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where some are absent, and in the order of numbers, not of letters."""
    spec = ModelSpec("test_efficientnet", tuple(f"c{number:02}" for number in range(12)), input_size=(3, 32, 32))
    save(build(spec)[0], spec, tmp_path / "model.safetensors")
    labels = [2, 9, 10, 11, 9]
    for turn, label in enumerate(labels):
        (tmp_path / "data" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.effect_noise((32, 32), 60 + 30 * turn).convert("RGB").save(tmp_path / "data" / str(label) / f"{turn}.png")
    data = tmp_path / "data"
    if kind == "table":
        data = data / "labels.csv"
        rows = [f"{label}/{turn}.png,{label}" for turn, label in enumerate(labels)]
        data.write_text("\n".join(["path,label", *rows]))
    assert (
        main(["eval", str(tmp_path / "model.safetensors"), str(data), "--classes-by-number", "-j", "0", "--json"]) == 0
    )
    found = json.loads(capsys.readouterr().out)["scores"]["per_class"]
    assert {name: row["images"] for name, row in found.items() if row["images"]} == {
        "c02": 1,
        "c09": 2,
        "c10": 1,
        "c11": 1,
    }


def test_no_file_that_is_read_is_written_over(world, capsys, tmp_path):
    root, _ = world
    image = tmp_path / "images" / "a" / "1.png"
    image.parent.mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(image)
    table = tmp_path / "labels.csv"
    table.write_text("path,label\nimages/a/1.png,a\n")
    model, before = str(root / "model.safetensors"), {path: path.read_bytes() for path in (image, table)}
    for words, said in (
        (["predict", model, "--csv", str(image), str(image)], "--csv writes NAME.csv, not "),
        (["predict", model, str(image), "--parquet", "1.jpg"], "--parquet writes NAME.parquet, not 1.jpg"),
        (
            ["predict", model, str(image), "--csv", "x.csv", "--features", "./x.csv"],
            "--features and --csv name the same file, ./x.csv: name two",
        ),
        (["predict", model, str(image), "--csv", "-"], "--csv writes NAME.csv, not -"),
        (["eval", model, str(table), "--csv", str(table)], f"--csv would replace {table}, which is read: name another"),
        (["eval", model, str(table), "--csv", model], "--csv writes NAME.csv, not "),
        (["check", str(tmp_path / "images"), "--sheet", str(image)], f"--sheet would replace {image}, which is read"),
        (["check", str(tmp_path / "images"), "--sheet", model], "--sheet writes NAME.png, not "),
    ):
        assert main(words) == 2, words
        assert said in capsys.readouterr().err, words
    assert {path: path.read_bytes() for path in before} == before
