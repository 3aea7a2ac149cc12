"""Narrow inverted residuals in edits, model files and training."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

import ulsam
from tiny import SETTINGS, TINY_MODEL, draw_shards, draw_splits
from ulsam.base.errors import UlsamError
from ulsam.data.opening import open_data
from ulsam.layer.make_layer import Layer
from ulsam.model.build import build, load, load_weights, save
from ulsam.model.spec import Edit, ModelSpec
from ulsam.training.config import TrainConfig
from ulsam.training.evaluate import ALONE
from ulsam.training.loop import Trainer
from ulsam.training.reconstruct_first import reconstruct_model
from ulsam.training.train import train

NARROW: Layer = "inverted_residual"


# in edits, files and training


@pytest.mark.parametrize(
    ("text", "edit", "children"),
    [
        (
            "replace 14 layer=inverted_residual width=32",
            Edit("replace", "14", layer=NARROW),
            ["conv1", "bn1", "conv2", "bn2", "conv3", "bn3"],
        ),
        ("replace 14 g=4 width=2", Edit("replace", "14", width=2), ["0", "1"]),
        ("insert 14:1 layer=se width=3", Edit("insert", "14:1", layer="se", width=3), ["0", "1"]),
    ],
)
def test_edits_with_a_width(text: str, edit: Edit, children: list[str], tmp_path: Path) -> None:
    assert str(edit) == text and Edit.parse(text) == edit
    spec = ModelSpec("mobilenetv2_035", ("a", "b"), (edit,), input_size=(3, 32, 32))
    model, _ = build(spec)
    place = model.blocks[4][2]
    made = place if edit.kind == "replace" else place.ulsam
    assert [name for name, _ in made.named_children()] == children
    save(model, spec, tmp_path / "model.safetensors")
    same, read = load(tmp_path / "model.safetensors")
    assert read == spec
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(same(x), model.eval()(x), rtol=0, atol=0)
    base = timm.create_model("mobilenetv2_035", num_classes=2)
    assert load_weights(model, base.state_dict()) == []  # a model from before the edit still fits
    torch.testing.assert_close(ulsam.undo(model)(x), base.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("remove 14 width=2", "a removal makes no layer"),
        ("replace 14 width=0", "width must be 1 or more, not 0"),
        ("replace 14 width=two", "cannot read the edit"),
        ("replace 14 width=2 width=3 x=1", "cannot read the edit"),
        ("replace 14 layer=inverted_residual g=4", "groups and form are for ULSAM alone"),
    ],
)
def test_edits_with_a_width_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(UlsamError, match=message):
        Edit.parse(text)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_splits(tmp_path_factory.mktemp("data"))


@pytest.mark.slow
def test_training_starts_from_reconstructed_layers(data: Path, tmp_path: Path, logged: Callable[[], str]) -> None:
    """From weights of the base model; not without weights or images, nor from weights of the edited one."""

    def start(name: str, **options: object) -> dict[str, Tensor]:
        still = {"lr": 1e-30, "weight_decay": 0.0, "epochs": 1}  # what it ends with is what it started from
        edits = ["replace blocks.3.0.se layer=inverted_residual width=3"]
        config = {**SETTINGS, **still, "data": str(data), "edits": edits, **options}
        train(TrainConfig.from_mapping(config), tmp_path / name)
        trained = load(tmp_path / name / "model.safetensors")[0].get_submodule("blocks.3.0.se")
        return {name: value.detach() for name, value in trained.named_parameters()}  # BatchNorm statistics continue

    base = timm.create_model(TINY_MODEL, num_classes=3)
    torch.save(base.state_dict(), tmp_path / "base.pt")
    torch.manual_seed(5)
    reconstructed = start("reconstructed", weights=str(tmp_path / "base.pt"))
    assert "reconstruct blocks.3.0.conv_pwl behind blocks.3.0.se: relative error" in logged()
    assert reconstructed["bn3.weight"].any()
    again = start("again", weights=str(tmp_path / "reconstructed" / "model.safetensors"))
    assert all(torch.equal(again[name], reconstructed[name]) for name in reconstructed)
    shown = {"weights": str(tmp_path / "base.pt"), "images_for_reconstruction": str(data / "val" / "class0")}
    other = start("unlabeled", **shown)  # type: ignore[arg-type]
    assert f"images of {data / 'val' / 'class0'}" in logged()
    assert not torch.equal(other["bn3.weight"], reconstructed["bn3.weight"])
    for wrong, message in [
        ({**shown, "images_for_reconstruction": "missing"}, "no folder missing"),
        ({**shown, "reconstruct_images": 0}, "`images_for_reconstruction` has nothing to reconstruct"),
        ({"images_for_reconstruction": str(data)}, "`images_for_reconstruction` has nothing to reconstruct"),
    ]:
        with pytest.raises(UlsamError, match=message):
            start("wrong", **wrong)  # type: ignore[arg-type]
    for name, options in [("off", {"weights": str(tmp_path / "base.pt"), "reconstruct_images": 0}), ("fresh", {})]:
        logged()
        assert start(name, **options)["bn3.weight"].abs().max() < 1e-20  # all but the zeros of a new layer
        assert "reconstruct " not in logged()


def test_training_reconstructs_nothing_that_is_frozen(data: Path, tmp_path: Path) -> None:
    images, _, _ = open_data(str(data))
    torch.save(timm.create_model(TINY_MODEL, num_classes=3).state_dict(), tmp_path / "base.pt")
    given = {**SETTINGS, "data": str(data), "weights": str(tmp_path / "base.pt"), "edits": ["remove blocks.3.0.se"]}

    def start(**options: object) -> tuple[list[str], list[str]]:
        config = TrainConfig.from_mapping({**given, **options})
        spec = ModelSpec(TINY_MODEL, images.classes, (Edit("remove", "blocks.3.0.se"),), input_size=(3, 32, 32))
        model, _ = build(spec, weights=config.weights)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        lines = reconstruct_model(config, spec, model, images, ALONE)
        return lines, [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]

    (line,), changed = start()
    assert line.startswith("blocks.3.0.conv_pwl behind blocks.3.0.se: relative error ")
    assert all(name.startswith("blocks.3.0.conv_pwl") for name in changed)
    (line,), changed = start(freeze=["blocks.3.0.conv_pwl"])
    assert not line.startswith("blocks.3.0.conv_pwl")
    assert not any(name.startswith("blocks.3.0.conv_pwl") for name in changed)
    lines, changed = start(freeze=["*"])
    assert lines == ["blocks.3.0.se: no block behind it that may change, so nothing is reconstructed"] and not changed


def test_a_stream_cannot_be_reconstructed_on(data: Path, tmp_path: Path) -> None:
    torch.save(timm.create_model(TINY_MODEL, num_classes=3).state_dict(), tmp_path / "base.pt")
    shards = tmp_path / "shards"
    shards.mkdir()
    draw_shards(shards, data / "train")
    settings = {**SETTINGS, "weights": str(tmp_path / "base.pt"), "edits": ["replace blocks.3.0.se width=3"]}
    stream = {"data": "wds/set", "data_dir": str(shards), "class_names": str(shards / "names.txt")}
    with pytest.raises(UlsamError, match="a stream of shards has no images to reconstruct on: name a folder"):
        train(TrainConfig.from_mapping({**settings, **stream, "val_split": "validation"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_reconstruction_moves_no_random_generator(data: Path, tmp_path: Path) -> None:
    """The run continues with the same numbers, whether it reconstructed or not."""
    torch.save(timm.create_model(TINY_MODEL, num_classes=3).state_dict(), tmp_path / "base.pt")
    config = {**SETTINGS, "data": str(data), "weights": str(tmp_path / "base.pt"), "epochs": 1}
    config["edits"] = ["replace blocks.3.0.se layer=inverted_residual width=3"]
    trainer = Trainer(TrainConfig.from_mapping(config), tmp_path / "run", ALONE)
    trainer.prepare()
    before = torch.get_rng_state(), random.getstate()
    images = open_data(str(data))[0]
    assert len(reconstruct_model(trainer.config, trainer.spec, trainer.model, images, ALONE)) == 1
    assert before[0].equal(torch.get_rng_state()) and before[1] == random.getstate()
