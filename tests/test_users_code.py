"""What models and calls that are not ours bring along: code that works in place, hooks, half precision, slips."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import ulsam
from tiny import SETTINGS, TINY_MODEL, draw_splits
from ulsam.base.errors import UlsamError
from ulsam.cli import main

SIZE = (3, 16, 16)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_splits(tmp_path_factory.mktemp("data"), train=6, val=2)


# code that works in place


class Skip(nn.Module):
    """A block whose skip is added in place, or not."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        if self.inplace:
            out += x
        else:
            out = out + x
        return F.relu(out, inplace=self.inplace)


def activated(inplace: bool) -> nn.Module:
    """A block that begins with an activation that changes what it has changed before."""
    return nn.Sequential(nn.SiLU(inplace=inplace), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))


@pytest.mark.parametrize(
    ("block", "edit"),
    [
        (activated, lambda model: ulsam.remove(model, "2", input_size=SIZE)),
        (activated, lambda model: ulsam.replace(model, "2", input_size=SIZE)),
        (Skip, lambda model: ulsam.replace(model, "2.body", layer="inverted_residual", width=8, input_size=SIZE)),
        (Skip, lambda model: ulsam.replace(model, "2.body", input_size=SIZE)),
    ],
)
@pytest.mark.parametrize("scope", ["block", "joint"])
def test_reconstruction_of_code_that_works_in_place_is_that_of_other_code(
    block: Callable[[bool], nn.Module], edit: Callable[[nn.Module], nn.Module], scope: Any
) -> None:
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *(block(inplace) for _ in range(3))).eval()
        batches = [torch.randn(16, *SIZE) for _ in range(2)]
        before, whole = copy.deepcopy(batches), copy.deepcopy(model)
        entries = ulsam.reconstruct(edit(model), batches, steps=30, scope=scope)
        assert all(map(torch.equal, batches, before))
        found.append((entries, model.state_dict()))
        with torch.no_grad():  # the last place is the output here, so that the true error can be taken
            wanted, ours = (torch.cat([one(x.clone()) for x in batches]) for one in (whole, model))
        if entries[0].name == "3":
            assert float((wanted - ours).square().sum() / wanted.square().sum()) == pytest.approx(entries[0].after)
    (entries, state), (other, other_state) = found
    assert entries == other
    for name, value in state.items():
        torch.testing.assert_close(other_state[name], value)


# weights that come after the edit


def test_the_base_models_weights_reach_the_blocks_that_were_put_aside() -> None:
    state = timm.create_model(TINY_MODEL).state_dict()
    model = ulsam.insert(ulsam.replace(timm.create_model(TINY_MODEL), "blocks.4.0.se"), "blocks.2")
    model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    told = model.load_state_dict(state, strict=False)
    assert {key.rpartition(".")[0].rpartition(".")[0] for key in told.missing_keys} == {
        "blocks.4.0.se",
        "blocks.2.0.ulsam",
    }
    undone = ulsam.undo(model).state_dict()
    assert undone.keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in undone.items())


def test_old_files_lack_the_counters_of_batch_norm() -> None:
    blocks = [nn.Sequential(nn.Conv2d(n, 8, 3, padding=1), nn.BatchNorm2d(8)) for n in (3, 8)]
    model = nn.Sequential(*copy.deepcopy(blocks))
    state = {name: torch.rand_like(value) for name, value in model.state_dict().items() if "tracked" not in name}
    ulsam.remove(model, "1", input_size=SIZE).load_state_dict(state, strict=False)
    undone = ulsam.undo(model).state_dict()
    assert all(torch.equal(undone[name], value) for name, value in state.items())


def test_weights_of_an_edited_model_are_not_those_of_the_block_before_it() -> None:
    """Its new layer has the same names and shapes as the block in whose place it stands."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), timm.layers.SEModule(8))
    state = copy.deepcopy(model.state_dict())
    edited = ulsam.replace(model, "1", layer="se", input_size=SIZE)
    edited.load_state_dict({name: torch.zeros_like(value) for name, value in edited.state_dict().items()})
    undone = ulsam.undo(edited).state_dict()
    assert all(torch.equal(undone[name], state[name]) for name in state if name.startswith("1."))


def test_a_frozen_model_stays_frozen_when_an_edit_is_undone() -> None:
    model = ulsam.replace(timm.create_model(TINY_MODEL), "blocks.4.0.se")
    model.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in ulsam.undo(model).parameters())
    whole = ulsam.undo(ulsam.remove(nn.Sequential(nn.Conv2d(3, 3, 1)), "0", input_size=SIZE))
    assert all(parameter.requires_grad for parameter in whole.parameters())


# hooks


def test_a_block_whose_hook_would_no_longer_be_called_is_refused() -> None:
    model = timm.create_model(TINY_MODEL)
    model.get_submodule("blocks.4.0.se").register_forward_hook(lambda *_: None)
    with pytest.raises(UlsamError, match=r"^blocks\.4\.0\.se has forward hooks.*: remove them before"):
        ulsam.replace(model, "blocks.4.0.se")
    pruned = timm.create_model(TINY_MODEL)
    prune.random_unstructured(pruned.get_submodule("blocks.4.0.se.conv_reduce"), "weight", 0.5)
    ulsam.replace(pruned, "blocks.4.0.se")


# a spec that is not the model's


@pytest.mark.parametrize("made", [{"act_layer": "silu"}, {"pad_type": "same"}])
def test_a_model_that_its_spec_does_not_build_is_not_saved(made: dict[str, Any], tmp_path: Path) -> None:
    names = ("a", "b")
    model = timm.create_model("mobilenetv2_035", num_classes=2, **made)
    with pytest.raises(UlsamError, match=r"computes something else than what its spec builds.*`model_args`"):
        ulsam.save(model, ulsam.make_spec("mobilenetv2_035", names, size=64), tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())
    before = torch.get_rng_state()
    spec = ulsam.make_spec("mobilenetv2_035", names, size=64, model_args=made)
    ulsam.save(model.half(), spec, tmp_path / "model.safetensors")
    assert torch.equal(torch.get_rng_state(), before) and model.training


@pytest.mark.parametrize("classes", [("a", "b"), ("a", "b", "c", "d")])
def test_as_many_names_as_outputs(classes: tuple[str, ...], tmp_path: Path) -> None:
    model, spec = timm.create_model(TINY_MODEL, num_classes=3), ulsam.make_spec(TINY_MODEL, classes, size=32)
    match = rf"the model gives \[3\] outputs an image, and its spec names {len(classes)} classes"
    with pytest.raises(UlsamError, match=match):
        list(ulsam.predict(model, [np.zeros((40, 40, 3), np.uint8)], spec=spec))
    with pytest.raises(UlsamError, match=match):
        ulsam.export(model, tmp_path / "model.onnx", spec=spec)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_another_type_predict(dtype: torch.dtype, data: Path) -> None:
    torch.manual_seed(0)
    model, spec = timm.create_model(TINY_MODEL, num_classes=3), ulsam.make_spec(TINY_MODEL, ("a", "b", "c"), size=32)
    images = sorted((data / "val").rglob("*.png"))
    wanted, found = (
        [dict(one.classes) for one in ulsam.predict(each, images, spec=spec)] for each in (model, model.to(dtype))
    )
    for one, other in zip(wanted, found, strict=True):
        assert other == pytest.approx(one, abs=2e-2)


# slips


IMAGES = [torch.zeros(2, *SIZE)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: ulsam.insert((model, None), "1"), "an nn.Module, not of tuple; ulsam.load gives (model, spec)"),
        (lambda model: ulsam.insert("mobilenetv2_100", "17"), "an edit is of a model, an nn.Module, not of str"),
        (lambda model: ulsam.replace(model, None), "a layer number, or a list of them, not None"),
        (lambda model: ulsam.replace(model, [1.0]), "a layer number, or a list of them, not [1.0]"),
        (lambda model: ulsam.replace(model, "1", momentum=0.1), "0 to 1, in the form released alone: not 0.1 in eq"),
        (lambda model: ulsam.replace(model, "1", form="released", momentum=5), "not 5 in released"),
        (lambda model: ulsam.reconstruct(model, [(IMAGES[0], 1)]), "[images for images, _ in loader]"),
        (lambda model: ulsam.reconstruct(model, [IMAGES[0].numpy()]), "a tensor, not of ndarray"),
        (lambda model: ulsam.reconstruct(model, [IMAGES[0].byte()]), "a batch is uint8 [2, 3, 16, 16]: give one"),
        (lambda model: ulsam.reconstruct(model, [IMAGES[0][:0]]), "a batch is float32 [0, 3, 16, 16]: give one"),
        (lambda model: ulsam.reconstruct(model, IMAGES, steps=0), "and `rate` one above 0, not 0 and 0.001"),
        (lambda model: ulsam.reconstruct(model, IMAGES, steps=1.5), "`steps` is a whole number above 0 and `rate` one"),
        (lambda model: ulsam.replace(model, "1", groups=True), "channels and groups are whole numbers, not 8 and True"),
        (
            lambda model: ulsam.replace(model, "1", layer="inverted_residual", width=True),
            "whole numbers, not 8 and True",
        ),
        (lambda model: ulsam.reconstruct(model, IMAGES, rate=-1), "and `rate` one above 0, not 500 and -1"),
    ],
)
def test_a_slip_is_one_line(call: Callable[[nn.Module], object], message: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
    with pytest.raises(UlsamError) as caught:
        call(model)
    assert message in str(caught.value) and "\n" not in str(caught.value)


class Pair(nn.Conv2d):
    """A model of two images."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return super().forward(left) + super().forward(right)


@pytest.mark.parametrize("call", [ulsam.cost, ulsam.fold, lambda model: ulsam.insert(model, "0", groups=1)])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Sequential(Pair(3, 4, 1)), "does not run on one image of [3, 224, 224] (C, H, W): Pair.forward()"),
        (lambda: nn.Sequential(nn.LazyConv2d(4, 1)), "without a shape yet (0.weight): run it on a batch first"),
    ],
)
def test_a_model_that_cannot_be_run_on_an_image_is_named(
    call: Callable[[nn.Module], object], model: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(UlsamError) as caught:
        call(model())
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_is_no_class_of_its_own_data(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, words in ((data / "train", []), (data, ["--out", "train/run"])):
        monkeypatch.chdir(folder)
        assert main(["train", ".", "--model", TINY_MODEL, *words]) == 2
        assert "lies among the class folders of" in capsys.readouterr().err
        assert sorted(path.name for path in (data / "train").iterdir()) == ["class0", "class1", "class2"]
    with pytest.raises(UlsamError, match="lies among the class folders"):
        ulsam.compare(data / "train", ["base", "insert blocks.2"], data / "train" / "out", settings=SETTINGS)


def test_options_for_something_else_are_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = ulsam.make_spec(TINY_MODEL, ("class0", "class1", "class2"), size=32)
    model = tmp_path / "model.safetensors"
    ulsam.save(ulsam.build(spec)[0], spec, model)
    checkpoint = tmp_path / "checkpoint.pt"
    torch.save({}, checkpoint)
    for words, message in (
        (["eval", model, data, "--class-names", "none.txt"], "--class-names is for data sets by name"),
        (["train", data, "--model", checkpoint], "name timm's model in its place, and the file as its --weights"),
        (["push", model, tmp_path / "pushed", "--private"], "--private is for hf-hub:USER/NAME"),
        (
            ["compare", data, "--arm", "base", "--out", tmp_path / "c", "--ray-address", "x"],
            "--ray-address is for the launcher ray",
        ),
        (["slim", model, data, "--macs", "0.9", "--engine", "onnxruntime"], "--engine is how time is taken, for a"),
        (["slim", model, data, "--params", "0.9", "--latency-batch", "4"], "--latency-batch is how time is taken"),
    ):
        assert main(list(map(str, words))) == 2
        assert message in capsys.readouterr().err
