"""Narrow inverted residuals: what they compute, that reconstruction makes them do what a block did."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ulsam
from stopping import stop_after
from ulsam.base.errors import UlsamError
from ulsam.layer.inverted_residual import InvertedResidual
from ulsam.layer.make_layer import Layer, make_layer
from ulsam.model.build import build, load, load_weights, save
from ulsam.model.spec import Edit, ModelSpec
from ulsam.surgery.cost import cost
from ulsam.surgery.reconstruct_layers import new_layers, reconstruct_each, reconstruct_layers

NARROW: Layer = "inverted_residual"
SIZE = (3, 12, 12)


class Residual(nn.Module):
    """x + a convolution of x, with something that is not linear in between."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(channels, 16, 1), nn.ReLU(), nn.Conv2d(16, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def small_model(seed: int = 0, channels: int = 6) -> nn.Sequential:
    torch.manual_seed(seed)
    stem = nn.Sequential(nn.Conv2d(3, channels, 3, stride=2), nn.BatchNorm2d(channels), nn.ReLU())
    made = nn.Sequential(stem, Residual(channels), Residual(channels), nn.Conv2d(channels, 4, 1)).train()
    made(torch.randn(64, *SIZE))  # BatchNorm gets statistics
    return made.eval()


def images(number: int = 40, seed: int = 1) -> Tensor:
    return torch.randn(number, *SIZE, generator=torch.Generator().manual_seed(seed))


def maps() -> Tensor:
    return torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(3))


def random_residual(channels: int, width: int) -> InvertedResidual:
    """One that does something, BatchNorm statistics included."""
    layer = InvertedResidual(channels, width)
    for norm in (layer.bn1, layer.bn2, layer.bn3):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, 0.0, 1.0)
        norm.running_mean.uniform_(-0.1, 0.1)
        norm.running_var.uniform_(0.1, 0.3)
    return layer.eval()


def explained(x: Tensor, wanted: Tensor, ours: Tensor) -> float:
    """The share of what was added to x, in squares, that ours has."""
    return 1 - float((wanted - ours).square().sum() / (wanted - x).square().sum())


@given(channels=st.integers(1, 9), width=st.integers(1, 12))
@settings(max_examples=20, deadline=None)
def test_the_layer_against_loops_over_positions(channels: int, width: int) -> None:
    torch.manual_seed(channels * width)
    layer, x = InvertedResidual(channels, width), torch.randn(2, channels, 3, 4)
    assert layer.is_new and torch.equal(layer(x), x)
    layer = random_residual(channels, width).double().requires_grad_(False)

    def normed(values: Tensor, norm: nn.BatchNorm2d) -> Tensor:
        """[C, ...] by the running statistics."""
        parts = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        mean, variance, weight, bias = (part.view(-1, *[1] * (values.ndim - 1)) for part in parts)
        return (values - mean) / (variance + norm.eps).sqrt() * weight + bias

    expected = []
    for values in x.double():
        hidden = normed(torch.einsum("wc,chv->whv", layer.conv1.weight[:, :, 0, 0], values), layer.bn1).clamp(0, 6)
        padded = torch.zeros(width, 5, 6, dtype=torch.float64)
        padded[:, 1:4, 1:5] = hidden
        spread = torch.zeros_like(hidden)
        for row in range(3):
            for column in range(4):
                window = padded[:, row : row + 3, column : column + 3]
                spread[:, row, column] = (window * layer.conv2.weight[:, 0]).sum((1, 2))
        spread = normed(spread, layer.bn2).clamp(0, 6)
        expected.append(values + normed(torch.einsum("cw,whv->chv", layer.conv3.weight[:, :, 0, 0], spread), layer.bn3))
    torch.testing.assert_close(layer(x.double()), torch.stack(expected))
    found = cost(layer, (channels, 3, 4))
    assert found.params == 2 * channels * width + 13 * width + 2 * channels
    assert found.macs == (2 * channels + 9) * width * 12


@pytest.mark.parametrize("make", [InvertedResidual, partial(make_layer, NARROW), partial(make_layer, "ulsam")])
def test_a_width_that_cannot_be(make: Callable[..., nn.Module]) -> None:
    with pytest.raises(UlsamError, match="width must be 1 or more, not 0"):
        make(channels=8, width=0)


@pytest.mark.slow
def test_a_fit_finds_a_block_of_the_same_kind() -> None:
    whole = small_model()
    whole[1] = random_residual(6, 3)
    with torch.no_grad():
        x = whole[0](images(400))
        model = ulsam.replace(copy.deepcopy(whole), "1", layer=NARROW, width=12, input_size=SIZE)
        (found,) = reconstruct_layers(model, list(images(400).split(70)))
        seen = explained(x, whole[1](x), model[1](x))
        other = whole[0](images(100, seed=2))
        unseen = explained(other, whole[1](other), model[1](other))
    assert (found.name, found.width) == ("1", 12)
    assert found.explained == pytest.approx(seen, abs=1e-5)
    assert seen > 0.9 and unseen > 0.85


@pytest.mark.slow
def test_more_steps_and_more_width_give_more_of_a_block() -> None:
    def share(width: int, steps: int) -> float:
        torch.manual_seed(7)
        model = ulsam.replace(small_model(), "1", layer=NARROW, width=width, input_size=SIZE)
        return reconstruct_layers(model, [images(200)], steps=steps)[0].explained

    assert 0 < share(2, 100) + 0.05 < share(24, 100)
    assert share(24, 10) + 0.05 < share(24, 300)


def test_a_layer_is_fitted_on_what_the_fitted_ones_before_it_put_out() -> None:
    whole = small_model()
    torch.manual_seed(0)
    model = ulsam.replace(copy.deepcopy(whole), "1,2", layer=NARROW, width=2, input_size=SIZE)
    again = copy.deepcopy(model)
    first, second = reconstruct_layers(model, [images()], steps=30)
    assert (first.name, second.name) == ("1", "2")
    with torch.no_grad():
        x = whole[0](images())
        wanted = whole[2](whole[1](x))
        middle = model[1](x)  # not whole[1](x)
        assert second.explained == pytest.approx(explained(middle, wanted, model[2](middle)), abs=1e-5)
    again[1].load_state_dict(model[1].state_dict())
    assert [found.name for found in reconstruct_layers(again, [images()], steps=30)] == ["2"]  # bit for bit
    assert all(torch.equal(value, model[2].state_dict()[name]) for name, value in again[2].state_dict().items())


def test_fitting_apart_is_fitting_each_alone() -> None:
    whole = small_model()
    torch.manual_seed(4)
    layers = {
        "1": InvertedResidual(6, 3).eval(),
        "2": make_layer("ulsam", 6, groups=2, width=3).eval(),
        "0": nn.Identity(),
    }
    fresh = copy.deepcopy(layers)
    reconstruct_each(whole, layers, list(images().split(16)), steps=20)
    for name, options in (("1", {"layer": "inverted_residual"}), ("2", {"groups": 2})):
        model = ulsam.replace(copy.deepcopy(whole), name, width=3, input_size=SIZE, **options)
        model.get_submodule(name).load_state_dict(fresh[name].state_dict())
        reconstruct_layers(model, list(images().split(16)), steps=20)
        torch.testing.assert_close(model.get_submodule(name)(maps()), layers[name](maps()))
        assert not torch.allclose(layers[name](maps()), fresh[name](maps()))
        assert not layers[name].training


def test_fitting_leaves_all_else_alone() -> None:
    whole = small_model()
    model = ulsam.replace(copy.deepcopy(whole).train(), "1", groups=2, width=2, input_size=SIZE)
    model[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert [found.name for found in reconstruct_layers(model, [images()])] == ["1"]
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert {name.split(".")[0] for name in changed} == {"1"}
    assert {"1.0.depthwise.weight", "1.1.conv1.weight", "1.1.bn3.weight", "1.1.bn3.running_var"} <= changed
    assert not model[0].training and model[1].training and model[1][1].bn1.training and model[2].training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert reconstruct_layers(model, [images(seed=2)]) == []  # it is no new layer any more
    back = ulsam.undo(model).eval()
    torch.testing.assert_close(back(images()), whole(images()), rtol=0, atol=0)


def test_nothing_to_reconstruct_layers() -> None:
    with pytest.raises(UlsamError, match="no images"):
        reconstruct_layers(small_model(), [])
    assert reconstruct_layers(ulsam.replace(small_model(), "1", groups=2, input_size=SIZE), [images()]) == []
    inserted = ulsam.insert(small_model(), "1", layer=NARROW, width=2, input_size=SIZE)
    assert reconstruct_layers(inserted, [images()]) == []  # it stands for no block


def test_a_full_memory_is_one_line_and_leaves_the_layer_new() -> None:
    model = ulsam.replace(small_model(), "1", layer=NARROW, width=2, input_size=SIZE)
    too_many = torch.zeros(1, *SIZE).expand(2**40, *SIZE)  # takes no memory itself
    with pytest.raises(UlsamError, match=r"^the memory is full: reconstruct on fewer images"):
        reconstruct_layers(model, [too_many])
    assert new_layers(model)


def test_a_block_that_does_nothing_and_images_without_spread() -> None:
    whole = small_model()
    for parameter in whole[1].parameters():
        nn.init.zeros_(parameter)
    model = ulsam.replace(copy.deepcopy(whole), "1", layer=NARROW, width=2, input_size=SIZE)
    assert reconstruct_layers(model, [images()])[0].explained == 1.0
    torch.testing.assert_close(model(images()), whole(images()), rtol=0, atol=1e-6)
    model = ulsam.replace(small_model(), "1", layer=NARROW, width=2, input_size=SIZE)
    reconstruct_layers(model, [torch.zeros(4, *SIZE)])
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_what_later_layers_do_in_place_is_not_fitted_to() -> None:
    whole = nn.Sequential(small_model()[:2], nn.ReLU(inplace=True), nn.Conv2d(6, 4, 1)).eval()
    model = ulsam.replace(copy.deepcopy(whole), "0.1", layer=NARROW, width=8, input_size=SIZE)
    (found,) = reconstruct_layers(model, [images()], steps=50)
    with torch.no_grad():
        x = whole[0][0](images())
        assert found.explained == pytest.approx(explained(x, whole[0][1](x), model[0][1](x)), abs=1e-5)


def test_one_image_of_one_pixel_is_too_little() -> None:
    model = ulsam.replace(small_model(), "1", layer=NARROW, width=2, input_size=SIZE)
    with pytest.raises(
        UlsamError, match="1 cannot be reconstructed on one image at a time, whose map is one pixel there: give more"
    ):
        reconstruct_layers(model, [torch.randn(1, 3, 3, 3)] * 2)
    assert len(reconstruct_layers(model, [torch.randn(1, 3, 3, 3), torch.randn(4, 3, 3, 3)], steps=5)) == 1


@pytest.mark.parametrize("edit", ["replace 14 layer=inverted_residual width=4", "remove 14"])
def test_a_block_that_the_weights_lack_is_not_fitted_to(edit: str) -> None:
    """A model is slimmed once more: the blocks that went the first time come from nowhere."""
    size = (3, 32, 32)
    before, _ = build(ModelSpec("mobilenetv2_035", ("a", "b"), (Edit.parse(edit),), input_size=size))
    for module in before.modules():
        if isinstance(module, InvertedResidual):
            nn.init.ones_(module.bn3.weight)
    shown = [torch.randn(16, *size) for _ in range(2)]
    for batch in shown:
        before(batch)
    model, _ = build(
        ModelSpec(
            "mobilenetv2_035",
            ("a", "b"),
            (Edit.parse(edit), Edit("replace", "17", layer=NARROW)),
            input_size=size,
        )
    )
    assert load_weights(model, before.state_dict()) == []
    maps: list[tuple[Tensor, Tensor]] = []
    before.eval().blocks[5][2].register_forward_hook(lambda _, args, output: maps.append((args[0], output)))
    (found,) = reconstruct_layers(model, shown, steps=30)
    assert found.name == "blocks.5.2"
    with torch.no_grad():
        for batch in shown:
            before(batch)
        ours = [model.eval().blocks[5][2](x) for x, _ in maps]
    x, wanted = (torch.cat(each) for each in zip(*maps, strict=True))
    assert found.explained == pytest.approx(explained(x, wanted, torch.cat(ours)), abs=1e-4)
    again, _ = build(ModelSpec("mobilenetv2_035", ("a", "b"), (Edit("replace", "14", layer=NARROW),), input_size=size))
    if edit == "remove 14":
        load_weights(again, before.state_dict())
        assert new_layers(again) == {} and reconstruct_layers(again, shown) == []
    load_weights(again, timm.create_model("mobilenetv2_035", num_classes=2).state_dict())
    assert list(new_layers(again)) == ["blocks.4.2"]


@pytest.mark.slow
def test_a_model_from_a_file_is_fitted_to_what_the_file_holds(tmp_path: Path) -> None:
    size = (3, 32, 32)
    spec = ModelSpec(
        "mobilenetv2_035", ("a", "b"), (Edit("insert", "8:1", layer="se"), Edit("remove", "14")), input_size=size
    )
    before, _ = build(spec)
    for _ in range(2):
        before(torch.randn(16, *size))  # BatchNorm gets statistics
    save(before, spec, tmp_path / "model.safetensors")
    shown = [torch.randn(8, *size)]
    maps: list[tuple[Tensor, Tensor]] = []
    before.eval().blocks[5][2].register_forward_hook(lambda _, args, output: maps.append((args[0], output)))
    with torch.no_grad():
        before(shown[0])
    spec = ModelSpec(spec.base, spec.classes, (*spec.edits, Edit("replace", "17", layer=NARROW)), input_size=size)
    by_weights, _ = build(spec, weights=tmp_path / "model.safetensors")
    loaded, _ = load(tmp_path / "model.safetensors")
    for model in (by_weights, ulsam.replace(loaded, "17", layer=NARROW, input_size=size)):
        (found,) = reconstruct_layers(model, shown, steps=30)
        with torch.no_grad():
            ours = model.eval().blocks[5][2](maps[0][0])
        assert found.explained == pytest.approx(explained(*maps[0], ours), abs=1e-4)
        with pytest.raises(UlsamError, match=r"blocks\.4\.2 cannot return: the model's file holds no weights"):
            ulsam.undo(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_layer_keeps_its_dtype_and_is_fitted_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = ulsam.replace(small_model(), "1", layer=NARROW, width=12, input_size=SIZE)
    exact = copy.deepcopy(model)
    (found,) = reconstruct_layers(model.to(dtype), [images(64).to(dtype)], steps=100)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert found.explained == pytest.approx(reconstruct_layers(exact, [images(64)], steps=100)[0].explained, abs=0.05)


def test_a_frozen_layer_is_fitted_and_stays_frozen() -> None:
    model = ulsam.replace(small_model(), "1", layer=NARROW, width=2, input_size=SIZE).requires_grad_(False)
    assert reconstruct_layers(model, [images()], steps=5)[0].name == "1"
    assert not model[1].is_new and not any(parameter.requires_grad for parameter in model.parameters())


def test_an_interrupted_fit_leaves_the_layer_new() -> None:
    model = ulsam.replace(small_model().train(), "1", layer=NARROW, width=2, input_size=SIZE)
    before = copy.deepcopy(model.state_dict())
    with stop_after(3), pytest.raises(KeyboardInterrupt):
        reconstruct_layers(model, [images()])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model[1].training and all(parameter.grad is None for parameter in model.parameters())
    assert [found.name for found in reconstruct_layers(model, [images()], steps=5)] == ["1"]


def test_what_is_not_finite_and_what_is_no_list_is_said_in_a_line() -> None:
    model = ulsam.replace(small_model(), "1", layer=NARROW, width=2, input_size=SIZE)
    with pytest.raises(UlsamError, match="batches is a list of images"):
        reconstruct_layers(model, images())  # type: ignore[arg-type]
    nn.init.constant_(model[0][0].weight, torch.nan)
    with pytest.raises(UlsamError, match="the model outputs NaN or infinity at 1: its weights are broken"):
        reconstruct_layers(model, [images()])
