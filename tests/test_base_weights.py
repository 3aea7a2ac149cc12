"""Weights from files for models and their edits, and files that are refused."""

import copy
import os
import pickle
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from seeded_models import REPLACED, SMALL, V2, save_replaced, seeded
from ulsam.base.errors import UlsamError
from ulsam.model.build import (
    build,
    load,
    load_weights,
    make_spec,
    read_spec,
    read_weights,
    ulsam_parameters,
)
from ulsam.model.spec import Edit, ModelSpec
from ulsam.surgery.edit import undo

# -------------------------------------------------------------------------------------------------- weights


@pytest.fixture(scope="module")
def trained() -> dict[str, Tensor]:
    """A state dict of the small base model."""
    return seeded(timm.create_model(SMALL)).state_dict()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, trained) -> Path:
    """Weight files of one model in the ways that people write them."""
    path = tmp_path_factory.mktemp("weights")
    backbone = {name: value for name, value in trained.items() if not name.startswith("classifier.")}
    save_file(trained, path / "whole.safetensors")
    save_file(backbone, path / "backbone.safetensors")
    torch.save(trained, path / "plain.pth")
    torch.save({"state_dict": trained, "epoch": 3, "args": {"lr": 0.1}}, path / "nested.pth.tar")
    torch.save({"model": {f"module.{name}": value for name, value in trained.items()}}, path / "parallel.pt")
    return path


@pytest.mark.parametrize(
    ("file", "heads", "edit"),
    [
        ("whole.safetensors", 0, "replace 14,17"),
        ("whole.safetensors", 0, "insert 17:1"),
        ("whole.safetensors", 0, "remove 14"),
        ("backbone.safetensors", 2, "replace 14"),
        ("plain.pth", 0, "insert 3:1"),
        ("nested.pth.tar", 0, "replace 17"),
        ("parallel.pt", 0, "remove 17"),
    ],
)
def test_base_weights_fill_every_untouched_layer(folder, trained, file, heads, edit):
    spec = make_spec(SMALL, [str(n) for n in range(1000)], [Edit.parse(edit)], size=64)
    model, notes = build(spec, weights=folder / file)
    assert len(notes) == heads
    state = model.state_dict()
    touched = {name for name in state if name not in trained}
    assert touched == set(ulsam_parameters(model))
    same = [name for name in state if name in trained and not (heads and name.startswith("classifier."))]
    assert all(torch.equal(state[name], trained[name]) for name in same)
    assert model.training
    back = undo(model).state_dict()
    assert all(torch.equal(back[name], trained[name]) for name in trained if not (heads and name.startswith("class")))


def test_a_head_of_another_size_starts_fresh_and_is_said(folder, trained):
    model, notes = build(make_spec(SMALL, ["a", "b"], [Edit("replace", "17")]), weights=folder / "whole.safetensors")
    assert notes == [
        "classifier.weight: [1000, 1280] there, [2, 1280] here: skipped, starts fresh",
        "classifier.bias: [1000] there, [2] here: skipped, starts fresh",
    ]
    assert torch.equal(model.conv_stem.weight, trained["conv_stem.weight"])


def test_weights_of_the_edited_model_fill_the_layers_too(tmp_path):
    for edit in ["replace 14,17 g=2", "insert 17:1 form=released", "remove 14"]:
        spec = make_spec(SMALL, ["a", "b"], [Edit.parse(edit)])
        state = seeded(build(spec)[0]).state_dict()
        save_file(state, tmp_path / "edited.safetensors")
        model, notes = build(spec, weights=tmp_path / "edited.safetensors")
        assert notes == []
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("more", "new"), [("replace 17", "blocks.5.2."), ("remove 17", "blocks.5.2."), ("insert 17", "blocks.5.2.ulsam.")]
)
@pytest.mark.parametrize("first", ["replace 14", "insert 14", "remove 14"])
def test_weights_of_a_model_with_fewer_edits_fill_the_rest(first, more, new):
    before = seeded(build(ModelSpec(SMALL, ("a", "b"), (Edit.parse(first),), input_size=(3, 32, 32)))[0])
    model, _ = build(ModelSpec(SMALL, ("a", "b"), (Edit.parse(first), Edit.parse(more)), input_size=(3, 32, 32)))
    old, state = before.state_dict(), {name: value.clone() for name, value in model.state_dict().items()}
    assert load_weights(model, old) == []
    for name, value in model.state_dict().items():
        expected = state if name.startswith(new) else old  # the new layer stays as it was
        assert torch.equal(value, expected[name]), name
    del old["blocks.4.0.conv_pw.weight"]
    with pytest.raises(UlsamError, match=r"blocks\.4\.0\.conv_pw\.weight is missing"):
        load_weights(model, old)


@pytest.mark.parametrize("name", [SMALL, "efficientvit_m0", "levit_128s", "resnet18"])
def test_weights_go_to_and_from_a_model_without_classes(name):
    """Where timm leaves a norm out with the classifier too."""
    bare, full = (seeded(timm.create_model(name, num_classes=n), variance) for n, variance in ((0, 1.0), (3, 2.0)))
    state, before = bare.state_dict(), copy.deepcopy(full.state_dict())
    state = {key: value.clone() for key, value in state.items()}
    fresh = {note.partition(":")[0] for note in load_weights(full, state)}
    assert fresh == {key for key in before.keys() - state.keys() if not key.endswith("num_batches_tracked")}
    assert all(torch.equal(value, (state if key in state else before)[key]) for key, value in full.state_dict().items())
    notes = load_weights(bare, before)
    assert {note.partition(":")[0] for note in notes} == before.keys() - state.keys()
    assert all(note.endswith("there, but the model has no classes: skipped") for note in notes)
    assert all(torch.equal(value, before[key]) for key, value in bare.state_dict().items())
    trunk = next(key for key in state if key.endswith("weight"))
    for model, other in ((full, state), (bare, before)):
        with pytest.raises(UlsamError, match=rf"{re.escape(trunk)} is missing$"):
            load_weights(model, {key: value for key, value in other.items() if key != trunk})


def test_presets_take_their_bases_weights(folder, tmp_path):
    state = seeded(timm.create_model("mobilenetv2_100", num_classes=10)).state_dict()
    save_file(state, tmp_path / "base.safetensors")
    for name in [V2, REPLACED]:
        model, notes = build(make_spec(name, [str(n) for n in range(10)]), weights=tmp_path / "base.safetensors")
        assert notes == []
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items() if k not in ulsam_parameters(model))
    overlay = {"file": str(tmp_path / "base.safetensors"), "num_classes": 10}
    model = timm.create_model(REPLACED, pretrained=True, num_classes=10, pretrained_cfg_overlay=overlay)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items() if k not in ulsam_parameters(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.0.bn1.weight"), r"blocks\.1\.0\.bn1\.weight is missing$"),
        (lambda s: s.update(extra=torch.ones(1)), "extra belongs to no layer$"),
        (
            lambda s: s.update({"conv_stem.weight": torch.ones(3)}),
            r"conv_stem\.weight: \[3\] there, \[16, 3, 3, 3\] here",
        ),
        (lambda s: s.update({"blocks.5.2.bn1.weight": torch.ones(3)}), r"blocks\.5\.2\.bn1\.weight has another shape$"),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith("blocks.2.")], r"is missing \(and \d+ more\)$"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_nothing_is_loaded(trained, change, message):
    state = dict(trained)
    change(state)
    model, _ = build(make_spec(SMALL, [str(n) for n in range(1000)], [Edit("replace", "17")]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UlsamError, match=message) as caught:
        load_weights(model, state, "w.pth")
    assert str(caught.value).startswith("w.pth does not fit this model: ")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_of_another_model_are_refused(folder):
    with pytest.raises(UlsamError, match=r"backbone\.safetensors does not fit this model: .* more\)$"):
        build(make_spec("resnet18", ["a", "b"]), weights=folder / "backbone.safetensors")


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["bomb.pth", "bomb.safetensors", "bomb.bin"])
def test_a_pickle_with_code_in_it_is_not_run(tmp_path, name):
    sprung = tmp_path / "sprung"
    torch.save({"state_dict": {"a": torch.ones(1)}, "x": Bomb(sprung)}, tmp_path / name)
    for call in (read_weights, load, read_spec):
        with pytest.raises(UlsamError) as caught:
            call(tmp_path / name)
        assert "\n" not in str(caught.value)
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(sprung)))
    with pytest.raises(UlsamError):
        read_weights(tmp_path / name)
    assert not sprung.exists()
    pickle.loads((tmp_path / name).read_bytes())  # the bomb is a real one
    assert sprung.exists()


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"state_dict": [1]}, {3: torch.ones(1)}, torch.ones(2), None])
def test_a_checkpoint_that_is_no_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UlsamError, match=r"x\.pth (is no state dict|holds no weights)") as caught:
        read_weights(tmp_path / "x.pth")
    assert "\n" not in str(caught.value)


def test_truncated_checkpoints_are_refused(folder, tmp_path):
    for name in ["plain.pth", "whole.safetensors"]:
        whole = (folder / name).read_bytes()
        for tenth in range(10):
            (tmp_path / name).write_bytes(whole[: len(whole) * tenth // 10])
            with pytest.raises(UlsamError, match="holds no weights that can be read safely") as caught:
                read_weights(tmp_path / name)
            assert "\n" not in str(caught.value)
    with pytest.raises(UlsamError, match=r"no weight file .*nothing\.pth"):
        read_weights(tmp_path / "nothing.pth")
    with pytest.raises(UlsamError, match=r"is a folder without model\.safetensors$"):
        read_weights(tmp_path)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return save_replaced(tmp_path_factory.mktemp("file") / "model.safetensors")
