"""What `ulsam predict` reads paths from and writes: standard input, CSV, features; and its options."""

import contextlib
import csv
import functools
import io
import json
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import ulsam
from tiny import TINY_MODEL, draw
from ulsam.cli import main
from ulsam.data.images import read_pixels
from ulsam.model.build import build, load, make_spec, save
from ulsam.training.evaluate import spec_transform


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("predict")
    spec = make_spec(TINY_MODEL, ["class0", "class1", "class2"], size=32)
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


def test_parquet_holds_what_csv_does_with_types(world, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    words = ["predict", str(world / "model.safetensors"), str(world / "images"), str(world / "broken.jpg")]
    assert main([*words, "--parquet", str(tmp_path / "f.parquet"), "--csv", str(tmp_path / "f.csv")]) == 2
    found = parquet.read_table(tmp_path / "f.parquet").to_pylist()
    rows = list(csv.DictReader((tmp_path / "f.csv").read_text().splitlines()))
    assert len(found) == 7 and found[-1]["class_1"] is None and "broken.jpg" in found[-1]["error"]
    assert all(isinstance(one["probability_1"], float) and one["error"] is None for one in found[:-1])
    texts = [{name: "" if value is None else str(value) for name, value in one.items()} for one in found]
    assert texts == rows


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
    batch = look.normalize(torch.stack([look.pixels(read_pixels(path, look.reduction)) for path in images]))
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


def test_images_of_a_kind_that_is_not_read_are_named(world, tmp_path, capsys):
    shutil.copytree(world / "images", tmp_path / "images")
    for name in ("a.heic", "b.HEIC", "c.jxl", "notes.txt"):
        (tmp_path / "images" / "class0" / name).write_bytes(b"0" * 99)
    note = f"note    {tmp_path / 'images'}: 2 .heic files, 1 .jxl file are passed over: convert them to JPEG\n"
    for words in (["predict"], ["eval", "-j", "0"]):
        for folder, said in ((tmp_path / "images", True), (world / "images", False)):
            assert main([words[0], str(world / "model.safetensors"), str(folder), *words[1:]]) == 0
            assert (note in capsys.readouterr().err) == said


@pytest.mark.parametrize("sent", ["\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "a.png\0b.png\0"])
def test_other_bytes_on_standard_input_are_named_in_one_line(sent, world, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(sent))
    assert main(["predict", str(world / "model.safetensors"), "-"]) == 2
    error = capsys.readouterr().err
    assert "that holds the bytes of a file" in error and error.count("\n") == 1


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


@pytest.fixture
def site(world: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server of the images: under /short it ends too early, /moved leads to one, and /file out of the web."""

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "/images/class1/001.png")
                self.end_headers()
            elif self.path == "/file":
                self.send_response(302)
                self.send_header("Location", (world / "images" / "class0" / "000.png").as_uri())
                self.end_headers()
            elif self.path == "/short":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b"\x89PNG")
            elif self.path == "/large":
                self.send_response(200)
                self.end_headers()
                with contextlib.suppress(ConnectionError):
                    for _ in range(200):
                        self.wfile.write(bytes(1_000_000))
            else:
                super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(world))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_image_by_its_address_is_that_of_its_file(world: Path, site: str) -> None:
    file = world / "images" / "class1" / "001.png"
    names = [f"{site}/images/class1/001.png", f"{site}/moved", str(file)]
    found = list(ulsam.predict(world / "model.safetensors", names))
    assert [one.path for one in found] == names
    assert found[0].classes == found[1].classes == found[2].classes


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/none.png", "the server answers 404 File not found"),
        ("/short", "the connection ended 996 bytes too early"),
        ("/large", "larger than 100000000 bytes, the most that is fetched"),
        ("/broken.jpg", "not an image in a known format, or cut off"),
        ("/file", "the server answers 302"),
    ],
)
def test_an_address_that_gives_no_image_says_why(path: str, reason: str, world: Path, site: str) -> None:
    (found,) = ulsam.predict(world / "model.safetensors", [site + path])
    assert found.error and found.error.startswith(f"{site}{path}: ") and reason in found.error
    assert "\n" not in found.error and not found.classes


def test_a_server_that_is_not_there_costs_its_image_alone(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        gone = f"http://127.0.0.1:{closed.getsockname()[1]}/a.png"
    found = list(ulsam.predict(world / "model.safetensors", [gone, str(world / "images" / "class0" / "000.png")]))
    assert "cannot be fetched: " in str(found[0].error) and found[1].classes


def test_an_exported_model_has_no_features(tmp_path, world, capsys):
    (tmp_path / "model.onnx").write_bytes(b"")
    words = ["predict", str(tmp_path / "model.onnx"), str(world / "images")]
    assert main([*words, "--features", str(tmp_path / "f.npz")]) == 2
    assert "model.onnx outputs no features: name the model file" in capsys.readouterr().err
    assert main([*words, "--device", "cuda"]) == 2
    assert "for cuda install onnxruntime-gpu in its place" in capsys.readouterr().err
