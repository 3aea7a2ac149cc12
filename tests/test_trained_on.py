"""Every command that measures says when it may be measuring on training images."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tiny import SETTINGS, draw, draw_splits
from ulsam.cli import main
from ulsam.data.folder import image_paths
from ulsam.deploy.export import export
from ulsam.training.config import TrainConfig
from ulsam.training.parts import open_images
from ulsam.training.train import train
from ulsam.training.trained_on import held_out_settings, note_trained_on, run_of

SEEN = "note    the model was trained on "
UNKNOWN = "note    nothing says that the model was not trained on these images"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flat folder of class folders, a run that held images of it out, and its exported model."""
    root = tmp_path_factory.mktemp("world")
    draw(root / "flat", 10)
    draw_splits(root / "split", train=2, val=3)
    train(
        TrainConfig(
            str(root / "flat"),
            **{**SETTINGS, "epochs": 1, "val_fraction": 0.3, "seed": 5, "edits": ["insert blocks.2"]},
        ),
        root / "run",
    )
    export(root / "run" / "model.safetensors", root / "run" / "model.onnx")
    (root / "alone").mkdir()
    shutil.copy(root / "run" / "model.safetensors", root / "alone")
    shutil.copy(root / "run" / "model.onnx", root / "alone")
    return root


@pytest.mark.parametrize(
    ("command", "model", "images", "note"),
    [
        ("eval -j 0", "run/model.safetensors", "flat", SEEN + "21 of these 30 images"),
        ("eval -j 0", "run/model.onnx", "split/val", None),
        ("eval -j 0", "alone/model.safetensors", "flat", UNKNOWN),
        ("eval -j 0", "alone/model.safetensors", "split", None),
        ("inspect", "run/model.safetensors", "flat", SEEN + "21 of these 30 images"),
        ("inspect", "alone/model.safetensors", "split/train", UNKNOWN),
        ("explain --numbers --out out", "run/model.safetensors", "flat/class0", SEEN + "7 of these 10 images"),
        ("explain --out out", "alone/model.safetensors", "split/train/class0", None),
    ],
)
def test_commands_that_measure(
    command: str, model: str, images: str, note: str | None, world: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    verb, *options = command.split()
    monkeypatch.chdir(tmp_path)
    assert main([verb, str(world / model), str(world / images), *options]) == 0
    errors = capsys.readouterr().err
    assert errors.startswith(note) if note else "note" not in errors


@pytest.mark.slow
@pytest.mark.parametrize("model", ["run/model.safetensors", "run/model.onnx", "alone/model.onnx"])
def test_quantization_measures_on_what_the_run_held_out(model: str, world: Path, tmp_path: Path, capsys) -> None:
    words = [
        "quantize",
        str(world / model),
        str(world / "flat"),
        "--out",
        str(tmp_path / "int8.onnx"),
        "--calibrate",
        "8",
    ]
    assert main([*words, "--measure", "30"]) in (0, 2)  # or the model is worse by then
    printed = capsys.readouterr()
    held_out = "on 9 images" in printed.out + printed.err
    assert held_out is model.startswith("run/")
    assert (UNKNOWN in printed.err) is not held_out


def test_held_out_images_of_the_run_are_no_training_images(world: Path, logged: Callable[[], str]) -> None:
    config = TrainConfig(str(world / "flat"), val_fraction=0.3, seed=5)
    trained, held_out, _ = open_images(config)
    for images, said in ((held_out, ""), (trained, SEEN + "21 of these 21 images: they are no fair test\n")):
        paths = [path for path, _ in images.samples]
        note_trained_on(world / "run" / "model.onnx", paths, [world / "flat"])
        assert logged() == said
    link = world / "link"
    link.symlink_to(world / "flat")
    paths = [path.replace("flat", "link") for path, _ in trained.samples]
    note_trained_on(str(world / "run" / "model.safetensors"), paths, [link])
    assert SEEN in logged()
    note_trained_on(None, paths, [link])
    assert UNKNOWN in logged()


@pytest.mark.parametrize(("folder", "known"), [("Testing", True), ("validation_set", True), ("x", False)])
def test_a_folder_called_like_a_split_to_measure_on_is_held_out(
    folder: str, known: bool, world: Path, logged: Callable[[], str]
) -> None:
    note_trained_on(None, [str(world / folder / "robin" / "1.png")], [world])
    assert (UNKNOWN in logged()) is not known


def test_of_a_run_with_splits_the_folder_says_what_it_was_trained_on(
    world: Path, tmp_path: Path, logged: Callable[[], str]
) -> None:
    data, elsewhere = draw_splits(tmp_path / "data", train=2, val=2), tmp_path / "elsewhere"
    (data / "train" / "class2").rename(elsewhere)
    (data / "train" / "class2").symlink_to(elsewhere)
    model = tmp_path / "run" / "model.safetensors"
    model.parent.mkdir()
    model.with_name("config.yaml").write_text(TrainConfig(str(data)).to_yaml())
    model.touch()
    for folder, said in (
        (data / "val", ""),
        (data / "train", SEEN + "4 of these 4 images: they are no fair test\n"),
        (elsewhere, SEEN + "2 of these 2 images: they are no fair test\n"),
    ):
        note_trained_on(model, image_paths([str(folder)]), [folder])
        assert logged() == said


def test_settings_are_those_of_the_run(world: Path) -> None:
    model = str(world / "run" / "model.safetensors")
    assert held_out_settings(model, str(world / "flat"), {}) == {"split_seed": 5, "val_fraction": 0.3, "fold": None}
    assert held_out_settings(model, "torch/cifar10", {}) == {}
    assert run_of(world / "alone" / "model.safetensors") is None
