"""Gray and multi-channel images: how they are read, and that every command computes the same of them."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform

import ulsam
from tiny import SETTINGS, TINY_MODEL, draw, draw_splits, options
from ulsam import runtime
from ulsam.base.errors import UlsamError
from ulsam.cli import main
from ulsam.data.augment import Normalize, TrainTransform
from ulsam.data.images import UnreadableImage, read_pixels
from ulsam.data.preprocessing import Preprocessing
from ulsam.deploy.classifier import open_classifier
from ulsam.deploy.export import export
from ulsam.deploy.hub import push
from ulsam.deploy.quantize import quantize
from ulsam.model.build import build, load
from ulsam.model.spec import ModelSpec
from ulsam.training.augmentation_sheet import augmentation_sheet
from ulsam.training.config import TrainConfig
from ulsam.training.evaluate import spec_transform
from ulsam.training.train import train

Pixels = NDArray[np.uint8]
RANDOM = np.random.default_rng(3)
SMOOTH = (np.add.outer(np.arange(40), np.arange(50)) * 2.8).astype(np.uint8)  # [40, 50], 0 to 246


def stored(image: Image.Image, format: str = "PNG", **options: Any) -> io.BytesIO:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream


def pages(planes: Any, **options: Any) -> io.BytesIO:
    """A TIFF of a page a plane."""
    first, *others = map(Image.fromarray, planes)
    return stored(first, "TIFF", save_all=True, append_images=others, **options)


# reading


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_gray_of_16_bits_keeps_its_upper_8(format: str) -> None:
    values = (np.arange(65536, dtype=np.uint32).reshape(256, 256)).astype(np.uint16)
    image = Image.fromarray(values)
    assert image.mode == "I;16"
    found = read_pixels(stored(image, format), channels=1)
    assert found.shape == (256, 256, 1) and found.dtype == np.uint8
    assert np.array_equal(found[:, :, 0], (values >> 8).astype(np.uint8))
    assert found.min() == 0 and found.max() == 255  # neither clipped nor wrapped around


def test_gray_is_the_luma_of_what_is_read_as_rgb() -> None:
    gray = Image.fromarray(SMOOTH)
    assert np.array_equal(read_pixels(stored(gray), channels=1)[:, :, 0], SMOOTH)
    colors = Image.fromarray(RANDOM.integers(0, 256, (9, 11, 3), np.uint8))
    expected = np.asarray(colors.convert("L"))[:, :, None]
    assert np.array_equal(read_pixels(stored(colors), channels=1), expected)
    alpha = Image.merge("LA", (gray, Image.new("L", gray.size, 0)))
    assert (read_pixels(stored(alpha), channels=1) == 255).all()  # over white, as ever
    jpeg = stored(gray, "JPEG", quality=95)
    assert np.array_equal(read_pixels(jpeg, channels=1), read_pixels(jpeg)[:, :, :1])
    assert read_pixels(jpeg, lambda width, height: 2, channels=1).shape == (20, 25, 1)


@pytest.mark.parametrize(("mode", "format"), [("LA", "PNG"), ("RGBA", "PNG"), ("RGBA", "TIFF"), ("CMYK", "TIFF")])
def test_bands_are_taken_as_they_are_stored(mode: str, format: str) -> None:
    count = len(Image.new(mode, (1, 1)).getbands())
    pixels = RANDOM.integers(0, 256, (6, 5, count), np.uint8)
    image = Image.merge(mode, [Image.fromarray(pixels[:, :, band]) for band in range(count)])
    assert np.array_equal(read_pixels(stored(image, format), channels=count), pixels)


def test_pages_of_a_tiff_are_channels() -> None:
    planes = RANDOM.integers(0, 256, (5, 7, 6), np.uint8)
    assert np.array_equal(read_pixels(pages(planes), channels=5), np.moveaxis(planes, 0, 2))
    deep = planes.astype(np.uint16) * 256 + 255
    assert np.array_equal(read_pixels(pages(deep), channels=5), np.moveaxis(planes, 0, 2))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = read_pixels(pages(planes, exif=exif), channels=5)
    assert np.array_equal(turned, np.rot90(np.moveaxis(planes, 0, 2), 3)), turned.shape


@pytest.mark.parametrize(
    ("image", "channels"),
    [
        (stored(Image.new("RGB", (4, 4))), 4),
        (stored(Image.new("RGBA", (4, 4))), 5),
        (stored(Image.new("L", (4, 4))), 2),
        (stored(Image.new("P", (4, 4))), 4),
        (stored(Image.new("RGB", (4, 4)), "JPEG"), 4),
        (pages(np.zeros((5, 4, 4), np.uint8)), 4),
        (pages(np.zeros((3, 4, 4), np.uint8)), 4),
        (pages([np.zeros((4, 4), np.uint8), np.zeros((4, 5), np.uint8)]), 2),
        (pages(np.zeros((2, 4, 4), np.float32)), 2),
        (pages(np.zeros((2, 4, 4, 3), np.uint8)), 2),
    ],
)
def test_an_image_of_other_channels_is_no_image(image: io.BytesIO, channels: int) -> None:
    with pytest.raises(
        UnreadableImage, match=rf"it does not have {channels} channels: store them as a TIFF of"
    ) as caught:
        read_pixels(image, channels=channels)
    assert "\n" not in str(caught.value)


def test_a_damaged_tiff_of_many_pages_is_one_line() -> None:
    whole = pages(RANDOM.integers(0, 256, (5, 30, 30), np.uint8)).getvalue()
    for length in range(0, len(whole) - 1, 97):
        with pytest.raises(UnreadableImage) as caught:
            read_pixels(io.BytesIO(whole[:length]), channels=5)
        assert "\n" not in str(caught.value)


# the model's input


def test_a_gray_image_is_resized_and_normalized_as_timm_does_it() -> None:
    spec = ModelSpec(TINY_MODEL, ("a", "b"), (), {"in_chans": 1}, (1, 24, 24), "bicubic", 0.875, (0.4,), (0.2,))
    gray = Image.fromarray(SMOOTH)
    theirs = create_transform((1, 24, 24), interpolation="bicubic", crop_pct=0.875, mean=(0.4,), std=(0.2,))
    torch.testing.assert_close(spec_transform(spec)(gray), theirs(gray), atol=1e-5, rtol=1e-5)


def test_each_channel_is_treated_like_one_of_rgb() -> None:
    pixels = RANDOM.integers(0, 256, (40, 50, 3), np.uint8)
    five = np.concatenate([pixels, pixels[:, :, :2]], 2)
    look = {"interpolation": "bilinear", "crop_pct": 0.9}
    rgb = Preprocessing((24, 24), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), **look)
    more = Preprocessing((24, 24), mean=(0.5, 0.4, 0.3, 0.5, 0.4), std=(0.2, 0.3, 0.4, 0.2, 0.3), **look)
    expected, found = rgb.crop(pixels), more.crop(five)
    assert np.array_equal(found, np.concatenate([expected, expected[:, :, :2]], 2))
    one, other = rgb.normalize(expected[None])[0], more.normalize(found[None])[0]
    assert np.array_equal(other, np.concatenate([one, one[:2]]))
    assert Preprocessing.from_json(more.to_json()) == more
    plain = {"hflip": 0.5, "color_jitter": 0, "rand_augment": None, "random_erasing": 1.0, "crop_scale": (0.3, 1.0)}
    import random

    for seed in range(4):
        (image, box), (image5, box5) = (
            TrainTransform((n, 24, 24), mean=[0.5] * n, std=[0.2] * n, interpolation="bicubic", **plain)(
                given, random.Random(seed)
            )
            for n, given in ((3, pixels), (5, five))
        )
        assert box == box5 and torch.equal(image5, torch.cat([image, image[:, :, :2]], 2))


def test_pixels_of_other_channels_are_never_taken_for_the_models() -> None:
    gray = Preprocessing((4, 4), "bilinear", 1.0, (0.5,), (0.5,))
    with pytest.raises(UlsamError, match=r"^the model takes images \[H, W, 1\], not \[4, 4, 3\]$"):
        gray.crop(np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(UlsamError, match=r"^the model takes images of 1 channels, not 3$"):
        Normalize([0.5], [0.5])(torch.zeros(1, 4, 4, 3, dtype=torch.uint8))
    with pytest.raises(UlsamError, match="no preprocessing of images"):
        Preprocessing.from_json(gray.to_json().replace('"std": [0.5]', '"std": [0.5, 0.5]'))


def test_weights_for_rgb_are_adapted_so_that_gray_gives_the_same(tmp_path: Path) -> None:
    """Where mean and deviation are the same for all channels, a gray image in RGB and in one channel is one input."""
    torch.manual_seed(0)
    rgb, _ = build(ModelSpec(TINY_MODEL, ("a", "b"), input_size=(3, 32, 32)))
    save_file(rgb.state_dict(), tmp_path / "rgb.safetensors")
    spec = ModelSpec(TINY_MODEL, ("a", "b"), (), {"in_chans": 1}, (1, 32, 32), mean=(0.4,), std=(0.2,))
    gray, notes = build(spec, weights=tmp_path / "rgb.safetensors")
    assert notes == []
    x = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(gray.eval()(x), rgb.eval()(x.expand(-1, 3, -1, -1)), atol=1e-5, rtol=1e-4)
    for channels in (2, 6):
        spec = spec_of(channels)
        model, _ = build(spec, weights=tmp_path / "rgb.safetensors")
        expected = timm.models.adapt_input_conv(channels, rgb.conv_stem.weight)
        torch.testing.assert_close(model.conv_stem.weight, expected)


# runs


def draw_pages(root: Path, channels: int) -> Path:
    """Images of so many channels: class by class another one is bright."""
    random = np.random.default_rng(channels)
    for split, number in (("train", 8), ("val", 4)):
        for label in range(2):
            (root / split / f"class{label}").mkdir(parents=True)
            for index in range(number):
                planes = random.integers(0, 100, (channels, 36, 40), np.uint8)
                planes[label] += 120
                (root / split / f"class{label}" / f"{index}.tif").write_bytes(pages(planes).getvalue())
    return root


@pytest.fixture(scope="module")
def gray(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16-bit gray PNG images: two classes that differ in their brightness."""
    root = tmp_path_factory.mktemp("gray")
    random = np.random.default_rng(0)
    for split, number in (("train", 8), ("val", 4)):
        for label in range(2):
            (root / split / f"class{label}").mkdir(parents=True)
            for index in range(number):
                values = random.integers(0, 20_000, (36, 40)).astype(np.uint16) + np.uint16(40_000 * label)
                Image.fromarray(values).save(root / split / f"class{label}" / f"{index}.png")
    return root


def spec_of(channels: int) -> ModelSpec:
    look = {"mean": (0.4,) * channels, "std": (0.2,) * channels}
    return ModelSpec(TINY_MODEL, ("a", "b"), (), {"in_chans": channels}, (channels, 32, 32), **look)


def settings_for(data: Path, channels: int, **settings: Any) -> TrainConfig:
    plain = {"in_chans": channels, "epochs": 3, "amp": "none", "layout": "contiguous", "lr": 0.05, "mixup": 0.2}
    return TrainConfig.from_mapping({**SETTINGS, "data": str(data), **plain, **settings})


def test_gray_from_training_to_deployment(gray: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    start = timm.create_model(TINY_MODEL, num_classes=7)
    save_file(start.state_dict(), tmp_path / "start.safetensors")
    run = tmp_path / "run"
    chosen = {**SETTINGS, "epochs": 10, "batch_size": 4, "in_chans": 1, "weights": tmp_path / "start.safetensors"}
    assert main(["train", str(gray), "--insert", "blocks.2", "--out", str(run), *options(chosen)]) == 0
    assert "note    conv_stem.weight is for RGB: adapted to 1 channels" in capsys.readouterr().out
    summary = json.loads((run / "summary.json").read_text())
    assert summary["scores"]["top1"] == 1.0
    assert summary["cost"]["input_size"] == [1, 32, 32]
    model, spec = load(run / "model.safetensors")
    assert spec.input_size == (1, 32, 32) and spec.model_args["in_chans"] == 1 and len(spec.mean) == 1
    assert load_file(run / "model.safetensors")["conv_stem.weight"].shape[1] == 1

    assert main(["eval", str(run), str(gray), "-j", "0", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert scores["top1"] == 1.0 and scores["loss"] == pytest.approx(summary["scores"]["loss"], abs=1e-5)

    file = gray / "val" / "class1" / "0.png"
    look = spec_transform(spec)
    values = np.asarray(Image.open(file)) >> 8
    with torch.no_grad():
        by_hand = model(look.normalize(look.pixels(values.astype(np.uint8)[:, :, None])[None]))[0].softmax(0)
    (named,) = ulsam.predict(run / "model.safetensors", [file], top=2)
    assert named.classes[0][0] == "class1"
    assert named.classes[0][1] == pytest.approx(float(by_hand[1]), abs=1e-5)

    parity = export(run / "model.safetensors", tmp_path / "model.onnx", images=[gray / "val"])
    assert parity.same == parity.images
    opened = runtime.load(tmp_path / "model.onnx")
    (there,) = opened.predict([file], top=2)
    assert there.classes[0][0] == "class1"
    assert there.classes[0][1] == pytest.approx(named.classes[0][1], abs=1e-4)
    with pytest.raises(UlsamError, match=r"an image in memory is bytes, uint8 \[H, W, 1\], not uint8 \[8, 8, 3\]"):
        list(opened.predict([np.zeros((8, 8, 3), np.uint8)]))
    served = open_classifier(run / "model.safetensors")
    assert served.preprocessing.channels == 1

    found = ulsam.explain(run / "model.safetensors", file)
    assert found.pixels.shape == (32, 32, 1) and found.classes[found.target] == "class1"
    assert main(["explain", str(run), str(file), "--out", str(tmp_path / "explained")]) == 0
    assert main(["inspect", str(run), str(gray / "val")]) == 0
    assert main(["report", str(run), "--out", str(tmp_path / "report.html")]) == 0
    pushed = push(run / "model.safetensors", tmp_path / "pushed")
    assert torch.equal(load(Path(pushed) / "model.safetensors")[0].conv_stem.weight, model.conv_stem.weight)


@pytest.mark.slow
def test_a_gray_model_is_quantized(gray: Path, tmp_path: Path) -> None:
    train(settings_for(gray, 1), tmp_path / "run")
    found = quantize(tmp_path / "run" / "model.safetensors", gray, tmp_path / "int8.onnx", calibrate=8)
    assert found.images == 8
    (named,) = runtime.load(tmp_path / "int8.onnx").predict([gray / "val" / "class0" / "0.png"])
    assert named.error is None


@pytest.mark.parametrize(
    "channels", [pytest.param(2, marks=pytest.mark.slow), 4, pytest.param(6, marks=pytest.mark.slow)]
)
def test_more_channels_from_training_to_deployment(channels: int, tmp_path: Path) -> None:
    data = draw_pages(tmp_path / "data", channels)
    look = {"mean": [0.4] * channels, "std": [0.2] * channels}
    cached, read = (
        train(settings_for(data, channels, cache=cache, workers=workers, **look), tmp_path / cache)
        for cache, workers in (("true", 2), ("false", 0))
    )
    assert cached["scores"]["top1"] >= 0.5 and cached["scores"] == read["scores"]
    content = (tmp_path / "true" / "model.safetensors").read_bytes()
    assert content == (tmp_path / "false" / "model.safetensors").read_bytes()
    _, spec = load(tmp_path / "true" / "model.safetensors")
    assert (spec.input_size[0], spec.mean, spec.std) == (channels, (0.4,) * channels, (0.2,) * channels)
    export(tmp_path / "true" / "model.safetensors", tmp_path / "model.onnx", images=[data / "val"])
    files = sorted((data / "val").rglob("*.tif"))
    ours = ulsam.predict(tmp_path / "true" / "model.safetensors", files, top=2)
    theirs = runtime.load(tmp_path / "model.onnx").predict(files, top=2)
    for mine, its in zip(ours, theirs, strict=True):
        assert mine.classes[0][0] == its.classes[0][0]
        assert mine.classes[0][1] == pytest.approx(its.classes[0][1], abs=1e-3)
    with pytest.raises(UlsamError, match=rf"explain models of RGB or gray images; this one takes {channels} channels$"):
        ulsam.explain(tmp_path / "true" / "model.safetensors", files[0])
    with pytest.raises(UlsamError, match=rf"RGB or gray images, not those of {channels} channels$"):
        augmentation_sheet([str(files[0])], settings_for(data, channels))


@pytest.mark.parametrize("channels", [1, 5])
def test_a_pushed_model_keeps_its_first_convolution(channels: int, tmp_path: Path) -> None:
    """timm adapts a first convolution for RGB when it loads one; what is pushed has been adapted already."""
    spec = spec_of(channels)
    model, _ = build(spec)
    ulsam.save(model, spec, tmp_path / "model.safetensors")
    folder = push(tmp_path / "model.safetensors", tmp_path / "pushed")
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert torch.equal(theirs.conv_stem.weight, model.conv_stem.weight)
    ours, its = load(f"local-dir:{folder}")
    assert torch.equal(ours.conv_stem.weight, model.conv_stem.weight) and its.input_size == (channels, 32, 32)
    if channels == 5:  # what others push, without our spec in the model file
        config = json.loads((Path(folder) / "config.json").read_text())
        config["pretrained_cfg"]["first_conv"] = "conv_stem"
        (Path(folder) / "config.json").write_text(json.dumps(config))
        save_file(model.state_dict(), Path(folder) / "model.safetensors")
        with pytest.raises(UlsamError, match=r"takes 5 channels, with which timm cannot load its conv_stem$"):
            load(f"local-dir:{folder}")


def test_pages_of_five_channels_are_slimmed_and_reported_without_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = draw_pages(tmp_path / "data", 5)
    train(settings_for(data, 5, epochs=1), tmp_path / "run")
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "report.html")]) == 0
    assert "pages show RGB and gray images, and this model takes 5 channels" in capsys.readouterr().out
    words = [
        "slim",
        str(tmp_path / "run"),
        str(data),
        "--macs",
        "0.999",
        "--images",
        "4",
        "--no-train",
        "--device",
        "cpu",
    ]
    assert main([*words, "--reconstruct-images", "0", "--workers", "0", "--out", str(tmp_path / "slim")]) == 0
    with pytest.raises(UlsamError, match=r"cannot teach: it takes images of 5 channels, and these have 6$"):
        teacher = str(tmp_path / "run" / "model.safetensors")
        train(settings_for(draw_pages(tmp_path / "six", 6), 6, teacher=teacher), tmp_path / "taught")


def test_pages_that_differ_behind_the_first_are_no_copies(tmp_path: Path) -> None:
    first, rng = np.full((8, 8), 7, np.uint8), np.random.default_rng(0)
    for number in range(4):
        planes = [first, *rng.integers(0, 255, (2, 8, 8), np.uint8)]
        file = tmp_path / f"class{number % 2}" / f"{number}.tif"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(pages(planes).getvalue())
    found = ulsam.check(tmp_path)
    assert not any(pair.identical for pair in (*found.duplicates, *found.conflicts))


def test_rgb_images_for_a_model_of_four_channels_end_the_run(tmp_path: Path, logged: Callable[[], str]) -> None:
    draw_splits(tmp_path / "data", train=12, val=2)
    with pytest.raises(
        UlsamError, match=r"^more than 3 images .* `max_unreadable`; all of them: it does not have 4 channels: store"
    ):
        train(settings_for(tmp_path / "data", 4, batch_size=12), tmp_path / "run")
    assert logged().count("unreadable ") == 4  # no page of what is the same for all


def test_the_sheet_shows_gray(tmp_path: Path) -> None:
    draw(tmp_path, 2)
    (image,) = (
        Image.open(io.BytesIO(augmentation_sheet([str(next(tmp_path.rglob("*.png")))], settings_for(tmp_path, 1)))),
    )
    pixels = np.asarray(image)
    assert pixels.shape[2] == 3 and (pixels == pixels[:, :, :1]).all()
