"""What is given in another file's place, or in the wrong order, is named in one line, with the remedy."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from tiny import TINY_MODEL, draw
from ulsam.base.errors import UlsamError
from ulsam.cli import main
from ulsam.data.images import FORMATS, UnreadableImage, read_image
from ulsam.model.build import build, load, make_spec, read_weights, save

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mistakes")
    spec = make_spec(TINY_MODEL, ["class0", "class1", "class2"], size=32)
    save(build(spec)[0], spec, root / "model.safetensors")
    torch.save(timm.create_model(TINY_MODEL).state_dict(), root / "weights.pth")
    draw(root / "images", 1)
    return root


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEIC, "HEIC, which is not read: convert it to JPEG or PNG"),
        (HEIC.replace(b"heic", b"mif1", 1), "HEIC, which is not read"),
        (b"\0\0\0\x18ftypisom\0\0\0\0isommp42" + bytes(99), "a video, or another MP4 file, which is not read"),
        (b"  <!DOCTYPE html><html>Not found</html>", "a web page: the download failed: get the file again"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS to the file: get the file itself"),
        (b"%PDF-1.7 ...", "a PDF document: convert it to JPEG or PNG"),
        (b"just a text", "not an image in a known format, or cut off within its header"),
    ],
)
def test_what_is_no_image_that_is_read_names_its_format(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(content)
    with pytest.raises(UnreadableImage, match=rf"photo\.jpg: {message}"):
        read_image(tmp_path / "photo.jpg")


def test_avif_that_pillow_cannot_read_names_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "photo.avif").write_bytes(b"\0\0\0\x18ftypavif\0\0\0\0mif1avif" + bytes(100))
    with pytest.raises(UnreadableImage) as caught:
        read_image(tmp_path / "photo.avif")
    assert ("pip install 'pillow>=11.3'" in str(caught.value)) == ("AVIF" not in FORMATS)


def test_a_cut_off_jpeg_is_called_damaged(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:300])
    with pytest.raises(UnreadableImage) as caught:
        read_image(tmp_path / "cut.jpg")
    assert "image (JPEG)" not in str(caught.value)


@pytest.mark.parametrize("command", [["predict", "model.safetensors", "photos"], ["train", "data"]])
def test_a_folder_of_heic_says_so(
    command: list[str], world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    for folder in ("photos", "data/a", "data/b"):
        (world / folder).mkdir(parents=True, exist_ok=True)
        (world / folder / "1.HEIC").write_bytes(HEIC)
    assert main(command) == 2
    assert "files .heic, which are not read: convert them to JPEG" in capsys.readouterr().err


def _whole(file: Path) -> None:
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 1)), file)


def _script(file: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), file)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        (
            "whole.pth",
            _whole,
            r"it holds a whole model, or other objects than weights: save the model's",
        ),
        ("script.pt", _script, "it is a TorchScript archive, which is a whole program: save the model's state_dict"),
        ("m.onnx", lambda file: file.write_bytes(b"\x08\x08"), "it is an exported model, whose weights are folded"),
        (
            "w.txt",
            lambda file: file.write_text("just text"),
            "it is neither a checkpoint of PyTorch nor safetensors",
        ),
        (
            "k.h5",
            lambda file: file.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)),
            "it is an HDF5 file",
        ),
        (
            "t.tflite",
            lambda file: file.write_bytes(b"\x1c\0\0\0TFL3" + bytes(99)),
            "it is an exported model, whose weights are folded",
        ),
    ],
)
def test_what_is_no_weight_file_says_what_it_is(name: str, make: object, message: str, tmp_path: Path) -> None:
    assert callable(make)
    make(tmp_path / name)
    with pytest.raises(UlsamError, match=rf"{name} holds no weights that can be read safely: {message}") as caught:
        read_weights(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_in_a_model_files_place_names_the_option(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(world / "weights.pth"), str(world / "images")]) == 2
    message = "it is a checkpoint of PyTorch: name timm's model in its place, and the file as its --weights"
    assert message in capsys.readouterr().err
    with pytest.raises(UlsamError, match=r"an image \(PNG\): it was named in another"):
        load(world / "images" / "class0" / "000.png")


@pytest.mark.parametrize("name", ["model.mlpackage", "model.tflite", "model.xml"])
def test_an_exported_model_is_no_model_file(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).mkdir() if name.endswith("package") else (tmp_path / name).write_bytes(b"TFL3")
    assert main(["predict", str(tmp_path / name), "image.jpg"]) == 2
    assert "is an exported model; this takes the .safetensors model file" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["eval", "predict", "explain", "inspect", "quantize", "slim"])
@pytest.mark.parametrize("model", ["model.safetensors", TINY_MODEL])
def test_swapped_arguments_are_put_in_order(
    command: str, model: str, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    assert main([command, "images", model, *["--macs", "0.8"] * (command == "slim")]) == 2
    error = capsys.readouterr().err
    assert error == f"ulsam: error: the model comes first: ulsam {command} {model} images\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train images --replace 14 17", "several values of --replace have commas between them, and no blanks: 14,17;"),
        ("train images --insert 14, 17", "several values of --insert have commas between them, and no blanks: 14,17;"),
        ("bench resnet18 --batch 1 8", "several values of --batch have commas between them, and no blanks: 1,8;"),
        ("train images --lr 0.1 17", "unexpected argument '17'; see"),
    ],
)
def test_blanks_for_commas(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_size_that_is_hardly_meant_is_noted(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(tmp_path / "data", 4)
    words = ["train", str(tmp_path / "data"), "--model", TINY_MODEL, "--size", "5", "-b", "4", "--epochs", "1"]
    main([*words, "--workers", "0", "--device", "cpu", "--out", str(tmp_path / "run")])
    assert "images of 5 px leave most models maps of a single pixel" in capsys.readouterr().out
