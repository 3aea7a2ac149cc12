"""Several labels an image: scores against naive counting, training, and every command on such a model."""

import csv
import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ulsam
from labelling import ATTRIBUTES, draw_attributes, write_table
from stopping import stop_after
from tiny import SETTINGS, TINY_MODEL, Warm, draw_splits, options
from ulsam import runtime
from ulsam.base.errors import UlsamError
from ulsam.cli import main
from ulsam.deploy.evaluate_labels import gives_several
from ulsam.model.build import load
from ulsam.training import parts

RECIPE: dict[str, Any] = {**SETTINGS, "batch_size": 10, "epochs": 6, "lr": 0.05}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 training, 30 validation and 20 test images."""
    return draw_attributes(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    ulsam.train(table, folder, edits=["insert blocks.1 g=4"], **RECIPE)
    return folder


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    """The run's model for ONNX Runtime."""
    pytest.importorskip("onnxruntime")
    ulsam.export(run / "model.safetensors", run.parent / "model.onnx")
    return run.parent / "model.onnx"


def truth(table: Path, split: str) -> list[tuple[str, set[str]]]:
    """The images of a split and their labels."""
    rows = csv.DictReader(table.open())
    return [
        (str(table.parent / row["path"]), set(filter(None, row["labels"].split(";"))))
        for row in rows
        if row["split"] == split
    ]


def test_two_independent_attributes_are_learned(table: Path, run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["scores"]["map"] > 0.95
    assert summary["outcomes"] is None
    assert summary["scores"]["images"] == 30
    model, spec = load(run)
    assert spec.thresholds == tuple(summary["spec"]["thresholds"])
    assert [summary["scores"]["per_class"][name]["threshold"] for name in ATTRIBUTES] == list(spec.thresholds)
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert float(rows[-1]["val_map"]) == summary["scores"]["map"]
    assert "val_top1" not in rows[0]
    found = ulsam.evaluate_labels(run / "model.safetensors", table, workers=0)
    assert (found.split, found.scores.images) == ("test", 20)
    assert found.scores.map is not None and found.scores.map > 0.95
    assert found.scores.thresholds == spec.thresholds
    own = {name: sum(name in labels for _, labels in truth(table, "test")) for name in ATTRIBUTES}
    assert {name: row["images"] for name, row in found.scores.table().items()} == own
    assert f"mAP     {100 * found.scores.map:.2f} %" in str(found)
    again = ulsam.evaluate_labels(model, table, spec=spec, workers=0, batch_size=7, split="val")
    assert again.scores.map == pytest.approx(summary["scores"]["map"], abs=1e-6)
    assert again.scores.f1 == pytest.approx(summary["scores"]["f1"], abs=1e-6)


def test_predictions_are_sigmoids_from_the_thresholds_on(table: Path, run: Path) -> None:
    model, spec = load(run)
    files = [path for path, _ in truth(table, "test")]
    found = list(ulsam.predict(run / "model.safetensors", files))
    everything = list(ulsam.predict(model, files, spec=spec, top=9))
    assert spec.thresholds
    transform = parts.spec_transform(spec)
    right = 0
    for one, whole, (path, labels) in zip(found, everything, truth(table, "test"), strict=True):
        with Image.open(path) as image:
            pixels = transform.pixels(np.asarray(image.convert("RGB")))
        with torch.no_grad():
            shares = torch.sigmoid(model(transform.normalize(pixels[None]))[0]).tolist()
        named = dict(zip(spec.classes, shares, strict=True))
        assert dict(whole.classes) == pytest.approx(named, abs=1e-5)
        reached = {name for name, cut in zip(spec.classes, spec.thresholds, strict=True) if named[name] >= cut}
        assert {name for name, _ in one.classes} == reached
        assert [share for _, share in one.classes] == sorted((share for _, share in one.classes), reverse=True)
        right += reached == labels
    assert right >= 18
    assert any(len(one.classes) == 2 for one in found)
    assert any(not one.classes for one in found)


def test_the_exported_model_gives_the_same_labels(table: Path, run: Path, exported: Path) -> None:
    spec = load(run)[1]
    files = [path for path, _ in truth(table, "test")]
    opened = runtime.load(exported)
    assert opened.thresholds == spec.thresholds
    assert list(opened.predict(files)) == list(ulsam.predict(exported, files))
    for mine, theirs in zip(opened.predict(files), ulsam.predict(run / "model.safetensors", files), strict=True):
        assert dict(mine.classes) == pytest.approx(dict(theirs.classes), abs=1e-5)
        assert [name for name, _ in mine.classes] == [name for name, _ in theirs.classes]
    models = (exported, run / "model.safetensors")
    one, two = (ulsam.evaluate_labels(model, table, workers=0).scores for model in models)
    assert one.table() == {
        name: {**row, "average_precision": pytest.approx(row["average_precision"])} for name, row in two.table().items()
    }


def test_an_exported_file_with_other_thresholds_is_refused(exported: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    for text, line in (
        ("[0.5]", "it has 1 thresholds, and 2 classes"),
        ("[0.5, 2]", "its thresholds are no list of shares"),
        ("0.5", "its thresholds are no list of shares"),
    ):
        model = onnx.load(exported)
        next(entry for entry in model.metadata_props if entry.key == runtime.THRESHOLDS).value = text
        onnx.save(model, tmp_path / "model.onnx")
        with pytest.raises(UlsamError, match=line):
            runtime.load(tmp_path / "model.onnx")


def test_a_score_on_the_images_that_chose_the_thresholds_is_called_optimistic(
    table: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, images in (("val", 30), ("test", 0)):
        assert main(["eval", str(run), str(table), "--split", split, "-j", "0"]) == 0
        note = f"note    the thresholds were chosen by the score on {images} of these {images} images: their score is"
        assert (note in capsys.readouterr().err) == bool(images)


def test_the_command_line_names_labels(
    table: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(run / "model.safetensors")
    labels = dict(truth(table, "val"))
    none = next(path for path, own in labels.items() if not own)
    both = next(path for path, own in labels.items() if len(own) == 2)
    assert main(["predict", model, none, both, "--csv", str(tmp_path / "found.csv")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{none}: no label"
    assert all(name in lines[1] for name in ATTRIBUTES)
    rows = list(csv.reader((tmp_path / "found.csv").open()))
    assert rows[0] == ["path", "error", "class_1", "probability_1", "class_2", "probability_2"]
    assert rows[1] == [none, "", "", "", "", ""]
    assert {rows[2][2], rows[2][4]} == set(ATTRIBUTES)
    assert main(["predict", model, none, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": none, "classes": {}, "error": None}
    assert main(["predict", model, none, "--top", "1", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["classes"]) == 1
    assert main(["eval", model, str(table), "-j", "0", "--csv", str(tmp_path / "classes.csv"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = list(csv.reader((tmp_path / "classes.csv").open()))
    assert rows[0] == ["class", "images", "named", "precision", "recall", "f1", "average_precision", "threshold"]
    assert float(rows[1][6]) == found["scores"]["per_class"]["red"]["average_precision"]
    assert main(["info", model]) == 0
    assert "labels      several an image, from " in capsys.readouterr().out


REFUSED: list[tuple[str, list[str], str]] = [
    ("eval", ["MODEL", "TABLE", "--confusion", "OUT.png"], "--confusion is for one class an image"),
    (
        "eval",
        ["MODEL", "FOLDER"],
        "is a folder of class folders, one class an image, and the model gives",
    ),
    (
        "eval",
        [TINY_MODEL, "--weights", "MODEL", "TABLE"],
        "is a model file, with its own classes and input size: name it in place of",
    ),
    ("explain", ["MODEL", "IMAGE", "--out", "OUT"], "an explanation is for one class an image"),
    ("report", ["RUN", "--out", "OUT.html"], "a report is for one class an image"),
    ("slim", ["MODEL", "TABLE", "--macs", "0.9", "--out", "OUT"], "slimming is for one class an image"),
    ("quantize", ["MODEL", "TABLE", "--out", "OUT.onnx"], "quantizing is measured by one class an image"),
    ("quantize", ["ONNX", "TABLE", "--out", "OUT.onnx"], "quantizing is measured by one class an image"),
    ("explore", ["MODEL", "--port", "0"], "an explanation is for one class an image"),
    (
        "compare",
        ["TABLE", "--arm", "base", "--arm", "insert blocks.1", "--out", "OUT"],
        "a comparison is for one class an image",
    ),
    ("train", ["TABLE", "--out", "OUT", "--sampler", "balanced"], "balanced sampling is for one class an image"),
    ("train", ["TABLE", "--out", "OUT", "--teacher", "MODEL"], "a teacher is for one class an image"),
    ("train", ["FOLDER", "--out", "OUT", "--teacher", "MODEL"], "teaching is for one class an image"),
    ("slim", ["SINGLE", "TABLE", "--macs", "0.9", "--out", "OUT"], "slimming is for one class an image"),
    ("eval", ["SINGLE", "TABLE"], "labels, where one class an image is needed"),
    ("quantize", ["SINGLE", "TABLE", "--out", "OUT.onnx"], "quantizing is for one class an image"),
]


@pytest.fixture(scope="module")
def single(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one class an image, with the classes of the table."""
    spec = ulsam.make_spec(TINY_MODEL, ATTRIBUTES, size=32)
    file = tmp_path_factory.mktemp("single") / "model.safetensors"
    ulsam.save(ulsam.build(spec)[0], spec, file)
    return file


@pytest.mark.parametrize(("command", "words", "line"), REFUSED)
def test_what_is_for_one_class_an_image_is_refused_in_one_line(
    command: str,
    words: Sequence[str],
    line: str,
    table: Path,
    run: Path,
    exported: Path,
    single: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {
        "MODEL": str(run / "model.safetensors"),
        "RUN": str(run),
        "ONNX": str(exported),
        "SINGLE": str(single),
        "TABLE": str(table),
        "IMAGE": truth(table, "val")[0][0],
        "OUT": str(tmp_path / "out"),
        "OUT.png": str(tmp_path / "out.png"),
        "OUT.html": str(tmp_path / "out.html"),
        "OUT.onnx": str(tmp_path / "out.onnx"),
        "FOLDER": str(tmp_path / "folder"),
    }
    if "FOLDER" in words:
        draw_splits(tmp_path / "folder", train=10, val=2, classes=2)
        for part in ("train", "val"):
            for number, name in enumerate(ATTRIBUTES):
                (tmp_path / "folder" / part / f"class{number}").rename(tmp_path / "folder" / part / name)
    settings = options(SETTINGS) if command in ("train", "compare") else []
    assert main([command, *(places.get(word, word) for word in words), *settings]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ulsam: error: ")
    assert error.count("\n") == 1
    assert line in error
    assert {path.name for path in tmp_path.iterdir()} <= {"folder"}


def test_functions_refuse_the_other_kind(table: Path, run: Path, single: Path) -> None:
    model, spec = load(run)
    with pytest.raises(UlsamError, match=r"gives several labels an image: `ulsam.evaluate_labels` measures it"):
        ulsam.evaluate(model, table, spec=spec)
    with pytest.raises(UlsamError, match=r"gives one class an image: `ulsam.evaluate` measures it"):
        ulsam.evaluate_labels(single, table)
    with pytest.raises(UlsamError, match="an explanation is for one class an image"):
        ulsam.explain(model, truth(table, "val")[0][0], spec)
    with pytest.raises(UlsamError, match=r"torch/cifar10 has one class an image"):
        ulsam.evaluate_labels(model, "torch/cifar10", spec=spec)
    assert gives_several(model, spec) and gives_several(run / "model.safetensors") and not gives_several(single)


def test_one_label_each_in_the_test_table_does_not_change_the_kind(table: Path, run: Path, tmp_path: Path) -> None:
    rows = [(path, *labels) for path, labels in truth(table, "test") if len(labels) == 1]
    other = write_table(tmp_path / "test.csv", [("path", "labels"), *rows])
    found = ulsam.evaluate_labels(run / "model.safetensors", other, workers=0)
    assert (found.split, found.scores.images) == ("all", len(rows))


def test_the_maps_of_its_layers_can_be_inspected(
    table: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(run / "model.safetensors"), *[path for path, _ in truth(table, "val")[:4]]]) == 0
    assert "blocks.1" in capsys.readouterr().out


@pytest.mark.slow
def test_a_broken_run_resumes_to_the_same_end(interpreter: Warm, table: Path, tmp_path: Path) -> None:
    settings = {**RECIPE, "epochs": 3, "mixup": 0.3, "cutmix": 0.5, "ema": 0.9, "save_seconds": 0, "workers": 1}
    whole, stopped, killed = (tmp_path / name for name in ("whole", "stopped", "killed"))
    ulsam.train(table, whole, **settings)
    with stop_after(8), pytest.raises(ulsam.Interrupted):
        ulsam.train(table, stopped, **settings)
    process = interpreter.start(["train", str(table), "--out", str(killed), *options(settings)], tmp_path / "log")
    while not (killed / "checkpoint.pt").exists():
        assert interpreter.poll(process) is None
    interpreter.kill(process)
    for run in (stopped, killed):
        assert not (run / "summary.json").exists()
        ulsam.resume(run)
        assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
        mine, theirs = (json.loads((one / "summary.json").read_text()) for one in (run, whole))
        assert mine["scores"] == theirs["scores"]


def test_a_run_does_not_resume_on_labels_of_the_other_kind(table: Path, tmp_path: Path) -> None:
    shutil.copytree(table.parent, tmp_path / "data")
    own = tmp_path / "data" / "labels.csv"
    with stop_after(2), pytest.raises(ulsam.Interrupted):
        ulsam.train(own, tmp_path / "run", **RECIPE)
    rows = list(csv.reader(own.open()))
    write_table(own, [rows[0], *((path, labels.split(";")[0] or "red", split) for path, labels, split in rows[1:])])
    with pytest.raises(UlsamError, match="started with images that have several labels, or one class, each: not both"):
        ulsam.resume(tmp_path / "run")


def test_images_that_cannot_be_read_are_left_out(table: Path, run: Path, tmp_path: Path) -> None:
    shutil.copytree(table.parent, tmp_path / "data")
    own = tmp_path / "data" / "labels.csv"
    for split in ("train", "val", "test"):
        Path(truth(own, split)[3][0]).write_bytes(b"no image")
    found = ulsam.evaluate_labels(run / "model.safetensors", own, workers=0)
    assert (found.scores.images, len(found.scores.unreadable)) == (19, 1)
    rest = [labels for number, (_, labels) in enumerate(truth(own, "test")) if number != 3]
    assert found.scores.truths.tolist() == [[name in labels for name in ATTRIBUTES] for labels in rest]
    summary = ulsam.train(own, tmp_path / "run", **{**RECIPE, "epochs": 1})
    assert (summary["scores"]["images"], summary["scores"]["unreadable"]) == (29, 1)
    assert len(summary["unreadable"]["train"]) == 1


def test_scores_without_a_positive_are_undefined(table: Path, tmp_path: Path) -> None:
    rows: list[tuple[object, ...]] = [("image", *ATTRIBUTES, "split")]
    rows += [(path, *(int(name in labels) for name in ATTRIBUTES), "train") for path, labels in truth(table, "train")]
    rows += [(path, 0, 0, "val") for path, _ in truth(table, "val")]
    own = write_table(tmp_path / "labels.csv", rows)
    summary = ulsam.train(own, tmp_path / "run", **SETTINGS)
    assert (summary["scores"]["map"], summary["scores"]["f1"]) == (None, None)
    assert summary["spec"]["thresholds"] == [0.5, 0.5]
    assert next(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))["val_map"] == ""
    text = str(ulsam.evaluate_labels(tmp_path / "run", own, workers=0))
    assert text.startswith("mAP     undefined\n")
    assert "note    2 of 2 classes have no image here, and no score" in text


def test_its_weights_start_another_run(table: Path, run: Path, tmp_path: Path) -> None:
    settings = {**SETTINGS, "epochs": 1, "reconstruct_images": 20, "weights": str(run / "model.safetensors")}
    found = ulsam.train(table, tmp_path / "more", edits=["insert blocks.1 g=4"], **settings)
    assert found["scores"]["map"] > 0.9
    draw_splits(tmp_path / "data", train=8, val=2)
    found = ulsam.train(tmp_path / "data", tmp_path / "other", edits=["insert blocks.1 g=4"], **settings)
    assert "top1" in found["scores"] and "thresholds" not in found["spec"]


def test_a_pushed_model_keeps_its_thresholds(run: Path, single: Path, table: Path, tmp_path: Path) -> None:
    ulsam.push(run / "model.safetensors", tmp_path / "hub")
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "An image may have several labels: a sigmoid of each output" in card
    assert "| mAP | " in card and "top-1" not in card
    thresholds = load(run)[1].thresholds
    assert load(tmp_path / "hub")[1].thresholds == thresholds
    plain = dataclasses.replace(load(single)[1], thresholds=(0.25, 0.75))
    ulsam.save(load(single)[0], plain, tmp_path / "plain.safetensors")
    ulsam.push(tmp_path / "plain.safetensors", tmp_path / "plain")
    assert load(f"local-dir:{tmp_path / 'plain'}")[1].thresholds == (0.25, 0.75)  # as from the hub, by timm


@pytest.mark.slow
def test_a_service_names_labels(table: Path, run: Path, tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    from serving import form, service

    labels = dict(truth(table, "val"))
    both = next(path for path, own in labels.items() if len(own) == 2)
    none = next(path for path, own in labels.items() if not own)
    with service(str(run / "model.safetensors"), folder=tmp_path / "service") as served:
        sent = [(Path(path).name, Path(path).read_bytes()) for path in (both, none)]
        found = served.ask("/predict", *form(sent))
        assert found.status == 200
        one, two = found.body["predictions"]
        assert {entry["name"] for entry in one["classes"]} == set(ATTRIBUTES)
        assert sum(entry["probability"] for entry in one["classes"]) > 1
        assert (two["classes"], two["error"]) == ([], None)
        alone = served.ask("/predict", Path(none).read_bytes())
        assert (alone.status, alone.body["predictions"][0]["classes"]) == (200, [])
        assert len(served.ask("/predict?top=2", Path(none).read_bytes()).body["predictions"][0]["classes"]) == 2
