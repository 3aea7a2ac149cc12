"""What `ulsam predict` reads paths from and writes: standard input, CSV, features; and its options."""

import csv
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import ulsam
from tiny import NET, draw
from ulsam.cli import main
from ulsam.data.images import read_pixels
from ulsam.model.build import build, load, make_spec, save
from ulsam.training.evaluate import spec_transform


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("predict")
    spec = make_spec(NET, ["class0", "class1", "class2"], size=32)
    model = build(spec)[0]
    nn.init.normal_(model.classifier.weight)
    save(model, spec, root / "model.safetensors")
    draw(root / "images", 2)
    (root / "broken.jpg").write_bytes(b"\xff\xd8\xffno")
    return root


def test_a_row_an_image_in_order_with_what_is_printed(world, tmp_path, capsys):
    table = tmp_path / "found.csv"
    words = ["predict", str(world / "model.safetensors"), str(world / "images"), str(world / "broken.jpg")]
    assert main([*words, "--topk", "2", "--csv", str(table), "--json", "--device", "cpu"]) == 2
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["path"] for row in rows] == [one["path"] for one in printed]
    for row, one in zip(rows[:-1], printed[:-1], strict=True):
        assert [row["class_1"], row["class_2"]] == list(one["classes"])
        assert float(row["probability_1"]) == pytest.approx(one["classes"][row["class_1"]], abs=1e-6)
        assert row["error"] == ""
    assert rows[-1]["error"] == printed[-1]["error"] and not rows[-1]["class_1"]


@pytest.mark.parametrize("ending", [".npz", ".csv"])
def test_features_are_what_the_classifier_is_given(ending, world, tmp_path, capsys):
    file = tmp_path / f"features{ending}"
    images = sorted(str(path) for path in (world / "images").rglob("*.png"))
    words = ["predict", str(world / "model.safetensors"), str(world / "broken.jpg"), *images]
    assert main([*words, "--features", str(file), "--device", "cpu"]) == 2  # one is broken
    if ending == ".npz":
        content = np.load(file)
        paths, features = content["paths"].tolist(), content["features"]
    else:
        rows = list(csv.reader(file.read_text().splitlines()))
        paths, features = [row[0] for row in rows[1:]], np.float32([row[1:] for row in rows[1:]])
    assert paths == images
    model, spec = load(world / "model.safetensors")
    look = spec_transform(spec)
    batch = look.normalise(torch.stack([look.pixels(read_pixels(path, look.reduction)) for path in images]))
    with torch.no_grad():
        pooled = model.forward_head(model.forward_features(batch), pre_logits=True)
    assert features.dtype == np.float32 and features.shape == (6, 256)
    np.testing.assert_allclose(features, pooled.numpy(), rtol=1e-4, atol=1e-5)


def test_features_leave_no_hook_behind(world):
    model, spec = load(world / "model.safetensors")
    found: list[np.ndarray] = []
    images = [str(world / "images" / "class0" / "000.png")]
    assert len(list(ulsam.predict(model, images, spec=spec, features=found.append))) == len(found) == 1
    assert not model.classifier._forward_pre_hooks


def test_paths_come_from_standard_input(world, monkeypatch, capsys):
    images = sorted(str(path) for path in (world / "images").rglob("*.png"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(images[1:]) + "\n\n"))
    assert main(["predict", str(world / "model.safetensors"), images[0], "-", "--top", "1"]) == 0
    assert [line.split(": ")[0] for line in capsys.readouterr().out.splitlines()] == images


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-"], "- reads the paths of images from standard input, one a line: there was none"),
        (["IMAGES", "--features", "f.txt"], "--features writes NAME.npz or NAME.csv, not f.txt"),
        (["IMAGES", "--csv", "nowhere/found.csv"], "cannot write nowhere/found.csv: no such folder"),
        (["IMAGES", "--device", "abacus"], "no device 'abacus' here"),
    ],
)
def test_mistakes_are_one_line(words, message, world, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    words = [str(world / "images") if word == "IMAGES" else word for word in words]
    assert main(["predict", str(world / "model.safetensors"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_an_exported_model_has_no_features(tmp_path, world, capsys):
    (tmp_path / "model.onnx").write_bytes(b"")
    words = ["predict", str(tmp_path / "model.onnx"), str(world / "images")]
    assert main([*words, "--features", str(tmp_path / "f.npz")]) == 2
    assert "model.onnx outputs no features: name the model file" in capsys.readouterr().err
    assert main([*words, "--device", "cuda"]) == 2
    assert "for cuda install onnxruntime-gpu in its place" in capsys.readouterr().err
