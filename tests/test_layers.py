"""timm's attention layers in ULSAM's places: everything that holds for ULSAM's edits holds for theirs."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import timm
import torch
from timm.layers import EcaModule, SEModule
from timm.layers.cbam import CbamModule
from timm.layers.coord_attn import CoordAttn
from torch import Tensor, nn

import ulsam
from tiny import SETTINGS, TINY_MODEL, draw_splits, options
from ulsam.base.errors import UlsamError
from ulsam.cli import main
from ulsam.layer.make_layer import Layer, make_layer
from ulsam.layer.ulsam import ULSAM
from ulsam.model.build import build, load, load_weights, make_spec, save, ulsam_parameters
from ulsam.model.spec import Edit
from ulsam.surgery.edit import insert, remove, replace, undo
from ulsam.surgery.edited import added_layers
from ulsam.surgery.find import candidates
from ulsam.surgery.layer_host import host_class

SIZE = (3, 32, 32)
V2 = "mobilenetv2_035"
KINDS = {"se": SEModule, "eca": EcaModule, "cbam": CbamModule, "coord": CoordAttn}
PLACES = {"replace": "blocks.5.2", "insert": "blocks.5.2.ulsam"}
layers = pytest.mark.parametrize("layer", KINDS)
edits = pytest.mark.parametrize("kind", PLACES)
# Each layer in one of the two ways; in the other one in `make test-slow`.
placed = pytest.mark.parametrize(
    ("layer", "kind"),
    [
        pytest.param(layer, kind, marks=[pytest.mark.slow] * ((n + m) % 2))
        for n, layer in enumerate(KINDS)
        for m, kind in enumerate(PLACES)
    ],
)


def test_every_layer_is_tested() -> None:
    assert {*KINDS, "ulsam", "inverted_residual"} == set(get_args(Layer))


def edited(kind: str, layer: str, at: str = "17") -> nn.Module:
    """A lively model with the layer, in eval mode."""
    model = timm.create_model(V2, num_classes=3)
    {"replace": replace, "insert": insert}[kind](model, at, layer=layer, input_size=SIZE)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
    return model.eval()


def images(size: int = 32) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


@placed
def test_the_layer_is_timms_and_runs_at_its_place(layer: str, kind: str) -> None:
    model = edited(kind, layer)
    found = model.get_submodule(PLACES[kind])
    assert type(found) is KINDS[layer]
    assert list(added_layers(model)) == [PLACES[kind]]
    seen: list[tuple[Tensor, Tensor]] = []
    found.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    into: list[Tensor] = []
    model.blocks[6].register_forward_pre_hook(lambda module, args: into.append(args[0]))
    with torch.no_grad():
        assert model(images(64)).shape == (3, 3)  # of another size than the one traced
    ((x, y),) = seen
    assert x.shape == y.shape and not torch.equal(x, y)
    assert torch.equal(into[0], y)


@placed
def test_undone_bit_for_bit_with_every_name_kept(layer: str, kind: str) -> None:
    model = timm.create_model(V2, num_classes=3).eval()
    before = copy.deepcopy(model.state_dict())
    names = [name for name, _ in model.named_modules()]
    with torch.no_grad():
        y = model(images())
    {"replace": replace, "insert": insert}[kind](model, "17", layer=layer, input_size=SIZE)
    untouched = {key for key in before if kind == "insert" or not key.startswith("blocks.5.2.")}
    new = {f"{PLACES[kind]}.{key}" for key in model.get_submodule(PLACES[kind]).state_dict()}
    assert set(model.state_dict()) == untouched | new
    load_weights(model, before)  # the state of the plain model is that of the edited one, the new layer aside
    undo(model)
    assert [name for name, _ in model.named_modules()] == names
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(images()), y)


@placed
def test_a_model_file_brings_the_model_back(layer: str, kind: str, tmp_path: Path) -> None:
    spec = make_spec(TINY_MODEL, ["a", "b"], [Edit.parse(f"{kind} blocks.3.0.se layer={layer}")], size=32)
    model, _ = build(spec)
    save(model, spec, tmp_path / "model.safetensors")
    again, same = load(tmp_path / "model.safetensors")
    assert same == spec and str(same.edits[0]) == f"{kind} blocks.3.0.se layer={layer}"
    with torch.no_grad():
        assert torch.equal(again(images()), model.eval()(images()))


@placed
def test_cost_has_a_row_for_the_layer_and_adds_up(layer: str, kind: str) -> None:
    model = edited(kind, layer, "17,blocks.2.1.bn2")
    found = ulsam.cost(model, SIZE)
    rows = {row.name: row for row in found.rows}
    for name, module in added_layers(model).items():
        assert rows[name].type == KINDS[layer].__name__
        assert rows[name].params == sum(p.numel() for p in module.parameters())
    assert found.params == sum(p.numel() for p in model.parameters())
    assert found.macs == sum(row.macs for row in found.rows)
    c, weights = 56, 3  # layer 17 of this width
    expected = {"se": 2 * 8 * c, "eca": weights * c, "cbam": 2 * (2 * 4 * c) + 2 * 49, "coord": 8 * (2 * c + 2 * c)}
    assert rows[PLACES[kind]].macs == expected[layer]  # its map is 1 x 1 at 32 px, in two strips for coord


@placed
def test_fold_keeps_the_outputs(layer: str, kind: str) -> None:
    model = edited(kind, layer)
    with torch.no_grad():
        torch.testing.assert_close(ulsam.fold(model, SIZE)(images()), model(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_all_layers_compile_without_a_graph_break() -> None:
    model = timm.create_model(TINY_MODEL)
    for number, layer in enumerate(KINDS):
        insert(model, f"blocks.{number}", layer=layer, input_size=SIZE)
    replace(model, "blocks.4.0.se", layer="se", input_size=SIZE)
    torch.compiler.reset()
    with torch.no_grad():
        y = model.eval()(images())
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(images()), y)


class Block(nn.Module):
    """A block that keeps its shape and has a convolution of the name of ECA's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


@pytest.mark.parametrize(
    ("model", "place", "layer"),
    [
        (lambda: timm.create_model(V2), "blocks.5.2", "coord"),  # both the layer and the block have a bn1
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), Block()), "1", "eca"),  # all names of the layer are the block's too
        (lambda: timm.create_model(TINY_MODEL), "blocks.3.0.se", "eca"),
    ],
)
def test_weights_of_the_plain_and_of_the_edited_model_are_distinguished(
    model: Callable[[], nn.Module], place: str, layer: str
) -> None:
    plain, one, other = model(), *(replace(model(), place, layer=layer, input_size=SIZE) for _ in range(2))
    own = {key: value.clone() for key, value in other.get_submodule(place).state_dict().items()}
    assert load_weights(other, plain.state_dict()) == []
    assert all(torch.equal(value, own[key]) for key, value in other.get_submodule(place).state_dict().items())
    assert load_weights(other, one.state_dict()) == []
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())
    undo(other)  # the block was filled by the plain model's weights, and not touched by the edited one's
    block = plain.get_submodule(place).state_dict()
    assert all(torch.equal(value, block[key]) for key, value in other.get_submodule(place).state_dict().items())


@layers
def test_dtype_device_and_mode_follow_the_place(layer: str) -> None:
    model = timm.create_model(V2).double().train()
    insert(model, "17", layer=layer, input_size=SIZE)
    made = model.blocks[5][2].ulsam
    assert made.training and {p.dtype for p in made.parameters()} == {torch.float64}
    with torch.device("meta"):
        far = replace(timm.create_model(V2), "17", layer=layer)
    assert {p.device.type for p in far.parameters()} == {"meta"}


def test_edits_in_a_stage_and_around_other_edits_are_undone() -> None:
    model = timm.create_model("resnet18").eval()
    before, x = copy.deepcopy(model.state_dict()), images()
    with torch.no_grad():
        y = model(x)
    replace(model, "layer1", layer="se", input_size=SIZE)  # a Sequential stays one
    insert(model, "layer1", layer="coord", input_size=SIZE)
    remove(model, "layer2.1", input_size=SIZE)
    insert(model, "layer2.1", 4, input_size=SIZE)
    assert {name: host_class(module).__name__ for name, module in added_layers(model).items()} == {
        "layer1.0": "SEModule", "layer1.0.ulsam": "CoordAttn", "layer2.1.ulsam": "ULSAM",
    }  # fmt: skip
    undo(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(x), y)


@pytest.mark.parametrize(
    ("base", "texts", "place"),
    [
        ("mobilenetv3_small_050", ["insert blocks.1.0.se g=2"], "blocks.1.0.se.ulsam"),  # behind the model's own
        (TINY_MODEL, ["insert blocks.2.0 layer=se", "insert blocks.2.0.ulsam g=2"], "blocks.2.0.ulsam.ulsam"),
        (TINY_MODEL, ["replace blocks.3.0.se layer=se", "insert blocks.3.0.se g=2"], "blocks.3.0.se.ulsam"),
    ],
)
def test_ulsam_on_top_of_se(base: str, texts: list[str], place: str, tmp_path: Path) -> None:
    spec = make_spec(base, ["a", "b"], [Edit.parse(text) for text in texts], size=32)
    plain = timm.create_model(base, num_classes=2).state_dict()
    model, _ = build(spec)
    layer = model.get_submodule(place)
    assert isinstance(layer, ULSAM)
    assert ulsam_parameters(model) == [f"{place}.depthwise.weight", f"{place}.pointwise.weight"]
    below = model.eval().get_submodule(place.removesuffix(".ulsam"))
    order: list[str] = []
    layer.register_forward_pre_hook(lambda module, args: order.append("ulsam"))
    below.register_forward_pre_hook(lambda module, args: order.append("below"))
    model(images()).sum().backward()
    assert order == ["below", "ulsam"]
    assert layer.depthwise.weight.grad is not None and all(p.grad is not None for p in below.parameters())
    save(model, spec, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "model.safetensors")[0](images()), model(images()))
    undo(model)
    assert list(model.state_dict()) == list(plain)


def test_the_parts_of_a_layer_are_no_places() -> None:
    model = edited("insert", "cbam")
    assert not any(".ulsam" in candidate.name for candidate in candidates(model, SIZE, leaves=True))
    with pytest.raises(UlsamError, match=r"blocks\.5\.2\.ulsam\.channel is part of an attention layer"):
        insert(model, "blocks.5.2.ulsam.channel", input_size=SIZE)
    with pytest.raises(UlsamError, match=r"blocks\.5\.2\.ulsam is a CbamModule layer already"):
        replace(model, "blocks.5.2.ulsam", input_size=SIZE)
    with pytest.raises(UlsamError, match="has a layer inserted behind it"):
        replace(model, "17", layer="se", input_size=SIZE)
    with pytest.raises(UlsamError, match="holds something named ulsam already"):
        insert(model, "17", layer="se", input_size=SIZE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": "bam"}, r"blocks\.5\.2: unknown layer 'bam'; valid: ulsam, inverted_residual, se, eca, cbam, coord"),
        ({"layer": "eca", "groups": 4}, "groups: for ULSAM alone, not for the layer eca"),
        ({"layer": "se", "form": "released", "momentum": 0.1}, "form, momentum: for ULSAM alone"),
    ],
)
@edits
def test_mistaken_arguments_are_refused(kind: str, arguments: dict[str, object], message: str) -> None:
    model = timm.create_model(V2)
    before = list(model.state_dict())
    with pytest.raises(UlsamError, match=message) as caught:
        {"replace": replace, "insert": insert}[kind](model, "17", input_size=SIZE, **arguments)
    assert "\n" not in str(caught.value)
    assert list(model.state_dict()) == before


@pytest.mark.parametrize("channels", [1, 5, 512])
@layers
def test_any_number_of_channels_will_do(layer: str, channels: int) -> None:
    x = torch.randn(2, channels, 4, 6)
    assert make_layer(layer, channels).eval()(x).shape == x.shape


def test_profile_takes_a_layer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", V2, "--replace", "17", "--insert", "14:1", "--layer", "eca"]) == 0
    out = capsys.readouterr().out
    assert "replace 17 layer=eca; insert 14:1 layer=eca: parameters" in out
    assert any(line.split()[:2] == ["blocks.4.2.ulsam", "EcaModule"] for line in out.splitlines())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([V2, "--replace", "17", "--layer", "bam"], "--layer: 'bam' is not one of ulsam, inverted_residual, se, eca"),
        (
            [V2, "--replace", "17", "--layer", "se", "--groups", "4"],
            "groups and form are for ULSAM alone: the layer se",
        ),
        ([V2, "--insert", "17", "--layer", "se", "--form", "equations"], "groups and form are for ULSAM alone"),
        ([V2, "--layer", "se"], "--layer has nothing to act on: add --replace AT or --insert AT"),
        ([V2, "--remove", "17", "--layer", "se"], "--layer has nothing to act on"),
        (["ulsam_mobilenetv2_100_replace_14_17", "--layer", "se", "--groups", "8"], "--layer has nothing to act on"),
    ],
)
def test_mistakes_on_the_command_line_get_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"ulsam: error: {message}") and error.count("\n") == 1


def test_training_with_a_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = draw_splits(tmp_path / "data", 6, 2)
    run = tmp_path / "run"
    words = options({**SETTINGS, "epochs": 1, "model": TINY_MODEL})
    arguments = ["train", str(data), "--insert", "blocks.1", "--layer", "coord", "--out", str(run), *words]
    assert main(arguments) == 0
    assert main(["info", str(run / "model.safetensors")]) == 0
    assert "edits       insert blocks.1 layer=coord" in capsys.readouterr().out
    model, _ = load(run / "model.safetensors")
    assert model.get_submodule(
        "blocks.1.0.ulsam" if len(model.blocks[1]) == 1 else "blocks.1.1.ulsam"
    ).bn1.num_batches_tracked
