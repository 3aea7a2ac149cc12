"""What attention layers do on images: against NumPy loops, on inert and on peaked layers, and on the command line."""

import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import ulsam
from tiny import TINY_MODEL, draw
from ulsam.base.errors import NotFinite, UlsamError
from ulsam.cli import main
from ulsam.data.folder import images_below
from ulsam.data.images import read_image
from ulsam.explanation.inspect_maps import LayerStats, inspect, warnings
from ulsam.explanation.measures import INERT
from ulsam.layer.ulsam import ULSAM
from ulsam.model.build import build, make_spec, save
from ulsam.model.spec import Edit
from ulsam.training.evaluate import spec_transform

SIZE = (3, 9, 9)


def images(number: int = 5) -> Tensor:
    return torch.randn(number, *SIZE, generator=torch.Generator().manual_seed(0))


def model_with(layer: ULSAM) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, layer.channels, 3), nn.BatchNorm2d(layer.channels), nn.ReLU(), layer).eval()


def only(model: nn.Module, batches: list[Tensor]) -> LayerStats:
    (found,) = inspect(model, batches)
    return found


@pytest.mark.parametrize(("groups", "form"), [(1, "equations"), (2, "released"), (4, "equations")])
def test_statistics_equal_a_naive_loop(groups: int, form: str) -> None:
    layer = ULSAM(8, groups, form=form)
    model = model_with(layer)
    with torch.no_grad():  # far from uniform
        layer.depthwise.weight.uniform_(2, 6)
        layer.pointwise.weight.uniform_(0.5, 2)
    stats = only(model, list(images().split(2)))  # of batches of 2, 2 and 1
    with torch.no_grad():
        x = model[:3](images())
        y = model(images()).double().numpy()
        maps = layer.attention(x).double().numpy()
    x = x.double().numpy()
    assert (stats.shape, stats.images, len(stats.subspaces)) == ((8, 7, 7), 5, groups)
    width, uniform = 8 // groups, x * (1 + 1 / 49)

    def norm(values: np.ndarray) -> float:
        return float(np.sqrt((values**2).sum()))

    for group, one in enumerate(stats.subspaces):
        own, part = maps[:, group], slice(group * width, (group + 1) * width)
        entropies = [-sum(p * math.log(p) for p in image.ravel()) for image in own]
        assert one.entropy == pytest.approx(np.mean(entropies), rel=1e-5)
        assert one.entropy_share == pytest.approx(np.mean(entropies) / math.log(49), rel=1e-5)
        assert one.maximum == pytest.approx(np.mean([image.max() for image in own]), rel=1e-5)
        assert one.peak == pytest.approx(49 * one.maximum)
        between = np.mean([((image - own.mean(0)) ** 2).sum() for image in own])
        assert one.variation == pytest.approx(between / np.mean([((p - 1 / 49) ** 2).sum() for p in own]), rel=1e-4)
        assert one.change == pytest.approx(norm((y - x)[:, part]) / norm(x[:, part]), rel=1e-4)
        assert one.effect == pytest.approx(norm((y - uniform)[:, part]) / norm(x[:, part]), rel=1e-4)
        assert not one.inert
    assert stats.change == pytest.approx(norm(y - x) / norm(x), rel=1e-4)
    assert stats.effect == pytest.approx(norm(y - uniform) / norm(x), rel=1e-4)
    if groups == 1:
        assert stats.agreement is None
    else:
        pairs = itertools.combinations(range(groups), 2)
        naive = [np.corrcoef(p[a].ravel(), p[b].ravel())[0, 1] for a, b in pairs for p in maps]
        assert stats.agreement == pytest.approx(np.mean(naive), abs=1e-5)


def test_a_uniform_layer_is_inert_and_a_peaked_one_is_not() -> None:
    flat, peaked = ULSAM(8, 2), ULSAM(8, 2)
    with torch.no_grad():
        flat.pointwise.weight.zero_()
        peaked.pointwise.weight.fill_(3)
        peaked.depthwise.weight.fill_(3)
    found = only(model_with(flat), [images()])
    for one in found.subspaces:
        assert one.entropy_share == pytest.approx(1) and one.peak == pytest.approx(1)
        assert (one.variation, one.effect) == (0, 0)
        assert one.change == pytest.approx(1 / 49)
    assert found.inert and found.agreement is None
    assert warnings([found]) == [
        "3 is inert: uniform maps instead of its own would change its features by 0.00 % (under 1 %); "
        "it does little more than multiply them by 1.0204"
    ]
    found = only(model_with(peaked), [images()])
    assert not found.inert and not any(one.inert for one in found.subspaces)
    assert all(one.peak > 10 and one.entropy_share < 0.6 for one in found.subspaces)
    assert warnings([found]) == []


def test_one_inert_map_of_several_is_named() -> None:
    layer = ULSAM(8, 4)
    with torch.no_grad():
        layer.pointwise.weight.fill_(3)
        layer.depthwise.weight.fill_(3)
        layer.pointwise.weight[2].zero_()
    found = only(model_with(layer), [images()])
    assert [one.inert for one in found.subspaces] == [False, False, True, False]
    assert found.agreement is not None  # of the three that are not flat
    (line,) = warnings([found])
    assert line.startswith("3 has inert maps among its 4 (number 3): uniform ones instead")


def test_a_map_that_is_the_same_on_every_image_does_not_vary() -> None:
    layer = ULSAM(4, 1)
    with torch.no_grad():
        layer.depthwise.weight.mul_(20)
    model = nn.Sequential(layer)
    same = torch.randn(1, 4, 5, 5, generator=torch.Generator().manual_seed(0)).expand(6, -1, -1, -1)
    assert only(model, [same]).subspaces[0].variation == pytest.approx(0, abs=1e-9)
    other = torch.randn(200, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    assert only(model, [other]).subspaces[0].variation > 0.9


def test_features_of_nothing_and_maps_of_one_position() -> None:
    found = only(nn.Sequential(ULSAM(4, 2)), [torch.zeros(2, 4, 3, 3)])
    assert (found.change, found.effect, found.inert) == (0, 0, True)
    found = only(nn.Sequential(ULSAM(4, 2)), [torch.ones(2, 4, 1, 1)])
    assert [(one.entropy, one.entropy_share, one.peak) for one in found.subspaces] == [(0, 1, 1)] * 2
    assert found.change == pytest.approx(1)


def test_the_model_is_left_as_it_was() -> None:
    model = timm.create_model(TINY_MODEL)
    ulsam.insert(model, "blocks.1", 2, form="released", input_size=(3, 32, 32))
    model.train()
    model.bn1.eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    inspect(model, [torch.randn(2, 3, 32, 32)])
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(RuntimeError):
        inspect(model, [torch.randn(2, 4, 32, 32)])
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert [module.training for module in model.modules()] == modes


def test_layers_have_the_papers_numbers_and_their_own_input() -> None:
    model = timm.create_model("mobilenetv2_035").eval()
    ulsam.replace(model, "14", 2)
    ulsam.insert(model, "14:1", 4)
    ulsam.insert(model, "17:1", layer="se")
    ulsam.insert(model, "blocks.5.2.ulsam", 4)
    into: list[Tensor] = []
    model.blocks[4][2].ulsam.register_forward_pre_hook(lambda module, args: into.append(args[0]))
    x = torch.randn(2, 3, 64, 64)
    found = inspect(model, [x])
    assert [(one.name, one.place) for one in found] == [
        ("blocks.4.2", "14"), ("blocks.4.2.ulsam", "14:1"), ("blocks.5.2.ulsam.ulsam", None),
    ]  # fmt: skip
    layer = model.blocks[4][2].ulsam.requires_grad_(False)
    maps = layer.attention(into[0]).double()
    wide = maps.repeat_interleave(layer.channels // 4, 1)
    x = into[0].detach()
    assert found[1].change == pytest.approx(float((wide * x).norm() / x.norm()), rel=1e-4)


@pytest.mark.parametrize(
    ("model", "batches", "kind", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 3, 1)), [], UlsamError, "this Sequential holds no ULSAM layer to inspect: put one"),
        (nn.Sequential(ULSAM(4)), [], UlsamError, "no image to inspect the layers on"),
        (nn.Sequential(ULSAM(4)), [torch.ones(1, 4, 5, 5), torch.ones(1, 4, 5, 6)], UlsamError,
         r"0 gets maps \[4, 5, 5\] and \[4, 5, 6\]: inspect images of one size"),
        (nn.Sequential(ULSAM(4)), [torch.full((1, 4, 5, 5), math.nan)], NotFinite, "maps of 0 are not finite"),
    ],
)  # fmt: skip
def test_mistakes_are_named(model: nn.Module, batches: list[Tensor], kind: type[UlsamError], message: str) -> None:
    with pytest.raises(kind, match=message):
        inspect(model, batches)


def test_a_layer_that_is_not_called_is_named() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = ULSAM(4), ULSAM(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    with pytest.raises(UlsamError, match="idle is not called in a forward pass"):
        inspect(Idle(), [torch.ones(1, 4, 5, 5)])


# ------------------------------------------------------------------------------------------ the command line


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file with an inert and a peaked layer, one without a layer, and 18 images, one of them broken."""
    folder = tmp_path_factory.mktemp("inspect")
    draw(folder / "data", 6)
    (folder / "data" / "class1" / "zzz.png").write_bytes(b"no image")
    spec = make_spec(TINY_MODEL, ["a", "b"], [Edit("insert", "blocks.2", 2), Edit("insert", "blocks.3", 2)], size=64)
    model, _ = build(spec)
    with torch.no_grad():
        model.get_submodule("blocks.2.0.ulsam").pointwise.weight.zero_()
        model.get_submodule("blocks.3.0.ulsam").pointwise.weight.fill_(50)
        model.get_submodule("blocks.3.0.ulsam").depthwise.weight.fill_(50)
    save(model, spec, folder / "model.safetensors")
    plain = make_spec(TINY_MODEL, ["a", "b"], [Edit("insert", "blocks.2", layer="se")], size=64)
    save(build(plain)[0], plain, folder / "plain.safetensors")
    return folder


@pytest.mark.slow
def test_the_command_says_what_the_library_finds(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["inspect", str(root / "model.safetensors"), str(root / "data")]
    assert main(words) == 0
    out = capsys.readouterr().out
    model, spec = ulsam.load(root / "model.safetensors")
    paths = [path for path in images_below(root / "data")[0] if "zzz" not in path]
    transform = spec_transform(spec)
    expected = inspect(model, [torch.stack([transform(read_image(path)) for path in paths])])
    assert re.search(r"unreadable .*zzz\.png", out)
    assert "18 of 19 images" in out
    rows = {
        line.split()[0]: line.split() for line in out.splitlines() if line.startswith("  ") or "blocks" in line[:20]
    }
    assert rows["blocks.3.0.ulsam"][1:4] == ["4x4", "1", f"{expected[1].subspaces[0].entropy:.3f}"]
    warned = [line for line in out.splitlines() if line.startswith("warning ")]
    assert len(warned) == 1 and warned[0].startswith("warning blocks.2.0.ulsam is inert")
    assert main([*words, "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)
    assert [layer["inert"] for layer in entry["layers"]] == [True, False]
    assert entry["inert_below"] == INERT and list(entry["unreadable"]) == [str(root / "data" / "class1" / "zzz.png")]
    for layer, stats in zip(entry["layers"], expected, strict=True):
        assert layer["effect"] == pytest.approx(stats.effect, rel=1e-3, abs=1e-9)
        assert [one["variation"] for one in layer["subspaces"]] == pytest.approx(
            [one.variation for one in stats.subspaces], rel=1e-3, abs=1e-9
        )


@pytest.mark.slow
def test_so_many_images_are_spread_over_all(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [str(root / "data" / f"class{n}") for n in (0, 2)]
    assert main(["inspect", str(root / "model.safetensors"), *good, "--images", "4"]) == 0
    assert "4 of 12 images" in capsys.readouterr().out
    model, spec = ulsam.load(root / "model.safetensors")
    paths = [path for folder in good for path in images_below(folder)[0]][::3]
    transform = spec_transform(spec)
    stats = inspect(model, [torch.stack([transform(read_image(path)) for path in paths])])
    assert main(["inspect", str(root / "model.safetensors"), *paths]) == 0
    assert f"{100 * stats[1].effect:.2f} %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plain.safetensors", "data"], "this EfficientNet holds no ULSAM layer to inspect"),
        (["model.safetensors", "data", "--images", "0"], "--images must be 1 or more, not 0"),
        (["model.safetensors", "data/class1/zzz.png"], "no image to inspect the layers on"),
        (["nothing.safetensors", "data"], "no model file"),
    ],
)
def test_mistakes_get_one_line(root: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", *(str(root / word) if re.search("[./]|data", word) else word for word in words)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ulsam: error: ") and error.count("\n") == 1
    assert re.search(message, error)
