"""An exported model gives the answers of the model, also where nothing of PyTorch can be imported."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import PIL
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform
from torch import nn

import ulsam
from decoding import images_without_simplejpeg
from tiny import TINY_MODEL, draw_splits
from ulsam import runtime
from ulsam.base.errors import UlsamError
from ulsam.cli import main
from ulsam.data.images import read_pixels
from ulsam.data.preprocessing import Preprocessing
from ulsam.deploy.export import export
from ulsam.deploy.predict import predict
from ulsam.model.build import build, make_spec, save
from ulsam.model.spec import Edit

CLASSES = ("class0", "class1", "class2")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model file, the same model exported, and a folder with images, one of which cannot be read."""
    torch.manual_seed(0)
    spec = make_spec(TINY_MODEL, CLASSES, [Edit("insert", "blocks.1.0", 4)], size=48)
    model, _ = build(spec)
    nn.init.normal_(model.get_submodule("classifier").weight)
    root = tmp_path_factory.mktemp("runtime")
    save(model, spec, root / "model.safetensors")
    export(model, root / "model.onnx", spec=spec)
    data = draw_splits(root / "data", train=1, val=4, size=70)
    Image.open(data / "val" / "class0" / "000.png").resize((300, 410)).save(data / "val" / "class0" / "large.jpg")
    (data / "val" / "class1" / "002.png").write_bytes(b"no image")
    return root


def photograph(width: int, height: int) -> np.ndarray:
    coarse = np.random.default_rng(width * height).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


@given(
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.sampled_from([(32, 32), (32, 24), (24, 40), (1, 1)]),
    st.sampled_from([0.5, 0.875, 0.9, 1.0, 1.3]),
    st.sampled_from(["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]),
)
@settings(max_examples=150, deadline=None)
def test_the_crop_is_timms(image, size, crop_pct, interpolation):
    if int(min(size) / crop_pct) < 1:
        return  # timm resizes to nothing
    pixels = photograph(*image)
    theirs = create_transform((3, *size), crop_pct=crop_pct, interpolation=interpolation, normalize=False)
    ours = Preprocessing(size, interpolation, crop_pct, (0.5,) * 3, (0.5,) * 3)
    try:
        expected = theirs(Image.fromarray(pixels)).permute(1, 2, 0).numpy()
    except ValueError:  # Pillow: a side of 0
        with pytest.raises(ValueError, match="must be > 0"):
            ours.crop(pixels)
        return
    assert np.array_equal(ours.crop(pixels), expected)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_pillow_alone_reads_the_same_pixels(mode, factor):
    for number, (width, height) in enumerate([(97, 64), (201, 155), (33, 47)]):
        stream = io.BytesIO()
        options = {"subsampling": number, "progressive": number == 1, "exif": b"Exif\0\0"} if mode == "RGB" else {}
        if mode == "RGB":
            exif = Image.Exif()
            exif[0x0112] = 6  # to be turned
            options["exif"] = exif
        Image.fromarray(photograph(width, height)).convert(mode).save(stream, "jpeg", **options)
        expected = read_pixels(stream, lambda *_: factor)
        found = images_without_simplejpeg().read_pixels(stream, lambda *_: factor)
        assert np.array_equal(found, expected)


def test_predictions_are_the_models(world):
    paths = sorted(map(str, (world / "data" / "val").rglob("*.*")))
    expected = list(predict(world / "model.safetensors", paths))
    model = runtime.load(world / "model.onnx", threads=1)
    for batch in (1, 5, 32):
        found = list(model.predict(paths, batch=batch))
        assert [(one.path, one.error) for one in found] == [(one.path, one.error) for one in expected]
        for one, other in zip(found, expected, strict=True):
            assert [name for name, _ in one.classes] == [name for name, _ in other.classes]
            shares = [[share for _, share in each.classes] for each in (one, other)]
            np.testing.assert_allclose(*shares, atol=1e-5)
    assert sum(one.error is not None for one in found) == 1
    assert len({one.classes[0][0] for one in found if one.classes}) > 1


def test_streams_and_pixels_are_images_too(world):
    model = runtime.load(world / "model.onnx")
    path = world / "data" / "val" / "class0" / "large.jpg"
    by_path, by_stream, broken, by_pixels = model.predict(
        [path, io.BytesIO(path.read_bytes()), io.BytesIO(b""), read_pixels(path, model.preprocessing.reduction)]
    )
    assert by_path.classes == by_stream.classes == by_pixels.classes
    assert (by_path.path, by_stream.path, by_pixels.path) == (str(path), "<image 1>", "<image 3>")
    assert "empty file" in broken.error
    assert list(model.predict([])) == []


def test_what_is_no_image_or_no_number_is_reported(world):
    model = runtime.load(world / "model.onnx")
    path = world / "data" / "val" / "class0" / "large.jpg"
    gray, none = np.zeros((48, 48), np.uint8), np.zeros((0, 5, 3), np.uint8)
    for images, options, message in [
        ([path], {"batch": 0}, "`batch` must be 1 or more, not 0"),
        ([path], {"top": -1}, "`top` must be 1 or more, not -1"),
        (str(path), {}, "give a list, of one image too"),
        ([path.read_bytes()], {}, r"not bytes; io.BytesIO\(...\) makes a stream"),
        ([gray], {}, r"uint8 \[H, W, 3\], not uint8 \[48, 48\]"),
        ([none], {}, r"not uint8 \[0, 5, 3\]"),
        ([np.zeros((48, 48, 3))], {}, r"not float64 \[48, 48, 3\]"),
    ]:
        with pytest.raises(UlsamError, match=message):
            list(model.predict(images, **options))
    for threads in (0, -2):
        with pytest.raises(UlsamError, match=f"threads must be 1 or more, not {threads}"):
            runtime.load(world / "model.onnx", threads=threads)


def test_the_commands_say_the_same_of_both_files(world, capsys):
    printed = {}
    for suffix in (".safetensors", ".onnx"):
        model = str(world / f"model{suffix}")
        codes = [main(["predict", model, str(world / "data" / "val"), *more]) for more in ([], ["--json"])]
        assert codes == [2, 2]  # one image is none
        assert main(["eval", model, str(world / "data"), "--workers", "0"]) == 0
        printed[suffix] = capsys.readouterr().out
        assert main(["eval", model, str(world / "data"), "--workers", "0", "--json"]) == 0
        scores = json.loads(capsys.readouterr().out)
        printed[suffix + "s"] = [scores[key] for key in ("split", "cost", "spec")], scores["scores"]["top1"]
    # probabilities differ by 1e-6 at most, and are printed to 6 digits
    words, others = (printed[suffix].replace(".safetensors", ".onnx").split() for suffix in (".safetensors", ".onnx"))
    assert len(words) == len(others) > 60
    for word, other in zip(words, others, strict=True):
        try:
            assert float(word.strip(",};")) == pytest.approx(float(other.strip(",};")), abs=1.1e-3)
        except ValueError:
            assert word == other
    assert printed[".onnxs"] == printed[".safetensorss"]


BARE = """
import importlib, json, sys
sys.path[:0] = [{site!r}]
for name in ("torch", "timm", "torchvision", "safetensors", "simplejpeg", "tqdm", "scipy"):
    try:
        importlib.import_module(name)
    except ImportError:
        continue
    raise SystemExit(name + " can be imported")
import ulsam.runtime
model = ulsam.runtime.load({model!r})
print(json.dumps([[one.path, one.classes, one.error] for one in model.predict({paths!r}, batch=3)]))
from ulsam.cli import main
raise SystemExit(main(["predict", {model!r}, {folder!r}]))
"""


def test_it_runs_where_there_is_no_torch(world, tmp_path, capsys):
    """In an interpreter whose only packages are NumPy, Pillow and ONNX Runtime."""
    site = tmp_path / "site"
    site.mkdir()
    for package in (np, PIL, onnxruntime, ulsam):
        folder = Path(package.__file__).parent
        (site / folder.name).symlink_to(folder)
        for libraries in folder.parent.glob(f"{folder.name.lower()}.libs"):
            (site / libraries.name).symlink_to(libraries)
    for libraries in Path(PIL.__file__).parents[1].glob("pillow.libs"):
        (site / libraries.name).symlink_to(libraries)
    folder = str(world / "data" / "val")
    paths = sorted(map(str, Path(folder).rglob("*.*")))
    code = BARE.format(site=str(site), model=str(world / "model.onnx"), paths=paths, folder=folder)
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 2, done.stderr  # one image is none
    assert "1 of 13 images could not be read" in done.stderr
    lines = done.stdout.splitlines()
    here = list(runtime.load(world / "model.onnx").predict(paths))
    assert json.loads(lines[0]) == [[one.path, [list(pair) for pair in one.classes], one.error] for one in here]
    main(["predict", str(world / "model.onnx"), folder])
    assert lines[1:] == capsys.readouterr().out.splitlines()


def test_without_onnx_runtime_it_says_what_to_install(world, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["predict", str(world / "model.onnx"), str(world / "data")]) == 2
    assert capsys.readouterr().err.endswith("; pip install onnxruntime\n")


def renamed(source: Path, target: Path, **changes: str | None) -> str:
    """A copy of an exported file with other metadata; None takes a key away."""
    model = onnx.load(source)
    notes = {entry.key: entry.value for entry in model.metadata_props} | changes
    onnx.helper.set_model_props(model, {key: value for key, value in notes.items() if value is not None})
    onnx.save(model, target)
    return str(target)


def look(**changes: object) -> str:
    """Preprocessing with one mistake in it."""
    sound = {"size": [64, 64], "interpolation": "bicubic", "crop_pct": 0.9, "mean": [0.5] * 3, "std": [0.5] * 3}
    return json.dumps({**sound, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": None}, "was not exported by ulsam: its metadata has no classes; write it by `ulsam.export`"),
        ({"classes": None, "preprocessing": None}, "its metadata has no classes and no preprocessing; "),
        ({"classes": "wren"}, "has metadata that cannot be read"),
        ({"classes": "[" * 100_000}, "has metadata that cannot be read: "),
        ({"classes": "9"}, "has metadata that cannot be read: its classes are no list of names"),
        ({"classes": "[1, {}, null]"}, "has metadata that cannot be read: its classes are no list of names"),
        ({"classes": '["a"]'}, "has metadata that cannot be read: it names 1 classes, and has "),
        ({"preprocessing": "[" * 100_000}, "no preprocessing of images: RecursionError"),
        ({"preprocessing": look(size=[10**9, 10**9])}, "no preprocessing of images: ValueError"),
        ({"preprocessing": look(std=[1, 0, 1])}, "no preprocessing of images: ValueError"),
        ({"preprocessing": look(mean=[float("nan")] * 3)}, "no preprocessing of images: ValueError"),
        ({"preprocessing": "{}"}, "has metadata that cannot be read: no preprocessing of images: KeyError 'size'"),
    ],
)
def test_a_file_that_is_not_ours_says_what_is_missing(world, tmp_path, changes, message, capsys):
    path = renamed(world / "model.onnx", tmp_path / "other.onnx", **changes)
    with pytest.raises(UlsamError, match=r"other\.onnx") as caught:
        runtime.load(path)
    assert message in str(caught.value)
    image = str(world / "data" / "val" / "class0" / "000.png")
    assert main(["predict", path, image]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("place", ["../weights", "{folder}/weights", "/etc/passwd"])
def test_weights_outside_the_folder_of_the_file_are_not_read(world, tmp_path, place):
    model = onnx.load(world / "model.onnx")
    largest = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    (tmp_path / "weights").write_bytes(largest.raw_data)
    largest.ClearField("raw_data")
    largest.data_location = onnx.TensorProto.EXTERNAL
    entry = largest.external_data.add()
    entry.key, entry.value = "location", place.format(folder=tmp_path)
    path = tmp_path / "inner" / "model.onnx"
    path.parent.mkdir()
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UlsamError, match="is no ONNX file that can be run here"):
        runtime.load(path)


def test_what_is_no_exported_model(world, tmp_path, capsys):
    (tmp_path / "broken.onnx").write_bytes((world / "model.onnx").read_bytes()[:5000])
    (tmp_path / "folder.onnx").mkdir()
    spec_gone = renamed(world / "model.onnx", tmp_path / "nospec.onnx", spec=None)
    data = str(world / "data")
    for words, message in [
        (["predict", str(tmp_path / "broken.onnx"), data], "is no ONNX file that can be run here"),
        (["predict", str(tmp_path / "none.onnx"), data], f"no exported model {tmp_path / 'none.onnx'}"),
        (["predict", str(tmp_path / "folder.onnx"), data], f"no exported model {tmp_path / 'folder.onnx'}"),
        (["eval", spec_gone, data], "holds no spec: write it by ulsam export"),
        (
            ["eval", str(world / "model.onnx"), data, "--device", "cuda"],
            "for cuda install onnxruntime-gpu in its place",
        ),
    ]:
        assert main(words) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
