"""Low-rank layers: what they compute, that fitting finds the best one, and what it leaves alone."""

import copy
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ulsam
from tiny import NET, SETTINGS, draw_shards, draw_splits
from ulsam.costs import cost
from ulsam.errors import UlsamError
from ulsam.fitting import fit, fit_apart
from ulsam.layers import make_layer
from ulsam.mixing import LowRank
from ulsam.models import build, load, load_weights, save_model
from ulsam.recipe import Edit, Recipe
from ulsam.train.config import TrainConfig
from ulsam.train.fit import fit_layers
from ulsam.train.loop import train

SIZE = (3, 12, 12)


class Residual(nn.Module):
    """x + a convolution of x, with something that is not linear in between."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(channels, 16, 1), nn.ReLU(), nn.Conv2d(16, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def net(seed: int = 0, channels: int = 6) -> nn.Sequential:
    torch.manual_seed(seed)
    stem = nn.Sequential(nn.Conv2d(3, channels, 3, stride=2), nn.BatchNorm2d(channels), nn.ReLU())
    made = nn.Sequential(stem, Residual(channels), Residual(channels), nn.Conv2d(channels, 4, 1)).train()
    made(torch.randn(64, *SIZE))  # BatchNorm gets statistics
    return made.eval()


def pictures(number: int = 40, seed: int = 1) -> Tensor:
    return torch.randn(number, *SIZE, generator=torch.Generator().manual_seed(seed))


def rows(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [positions, C] in float64."""
    return x.movedim(1, -1).flatten(0, -2).double()


def weight_of(layer: LowRank) -> Tensor:
    return (layer.up.weight[:, :, 0, 0] @ layer.down.weight[:, :, 0, 0]).double()


def zeros(layer: nn.Module) -> dict[str, Tensor]:
    """Of its low-rank layer what makes it a new one."""
    return {name: torch.zeros_like(value) for name, value in layer.state_dict().items() if "up." in name}


def maps() -> Tensor:
    return torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(3))


def best(x: Tensor, r: Tensor, rank: int) -> Tensor:
    """The predictions of the best linear map of this rank, found from the data matrices themselves."""
    x, r = x - x.mean(0), r - r.mean(0)
    fitted = x @ torch.linalg.lstsq(x, r).solution
    u, s, v = torch.linalg.svd(fitted, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]


@given(channels=st.integers(1, 9), data=st.data())
@settings(max_examples=30, deadline=None)
def test_the_layer_is_a_matrix_at_every_position(channels: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, channels))
    layer, x = LowRank(channels, rank), torch.randn(2, channels, 3, 4)
    assert torch.equal(layer(x), x)
    nn.init.normal_(layer.up.weight)
    nn.init.normal_(layer.up.bias)
    expected = rows(x) + rows(x) @ weight_of(layer).T + layer.up.bias.double()
    torch.testing.assert_close(rows(layer(x)), expected, rtol=1e-4, atol=1e-5)
    assert torch.linalg.matrix_rank(weight_of(layer), atol=1e-5) <= rank
    found = cost(layer, (channels, 3, 4))
    assert (found.params, found.macs) == ((2 * rank + 1) * channels, 2 * rank * channels * 12)


@pytest.mark.parametrize("rank", [0, 9])
@pytest.mark.parametrize("make", [LowRank, partial(make_layer, "lowrank"), partial(make_layer, "ulsam")])
def test_a_rank_that_cannot_be(make: Callable[..., nn.Module], rank: int) -> None:
    with pytest.raises(UlsamError, match=f"between 1 and the 8 channels, not {rank}"):
        make(channels=8, rank=rank)


@pytest.mark.parametrize("rank", [1, 2, 4, 6])
def test_a_fit_is_the_best_of_its_rank(rank: int) -> None:
    whole = net()
    model = ulsam.replace(copy.deepcopy(whole), "1", layer="lowrank", rank=rank, input_size=SIZE)
    (found,) = fit(model, list(pictures().split(7)))
    with torch.no_grad():
        given = whole[0](pictures())
    x, r = rows(given), rows(whole[1](given)) - rows(given)
    ours = rows(model[1](given)) - x
    theirs = best(x, r, rank) + r.mean(0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02 * r.std().item())
    least = (r - theirs).square().sum()
    assert least <= (r - ours).square().sum() * (1 + 1e-9) <= least * 1.01
    left = (r - ours).square().sum() / r.square().sum()
    assert found.explained == pytest.approx(1 - left.item(), abs=1e-4)
    assert (found.name, found.rank) == ("1", rank)


def test_a_layer_is_fitted_on_what_the_fitted_ones_before_it_put_out() -> None:
    whole = net()
    model = ulsam.replace(copy.deepcopy(whole), "1,2", layer="lowrank", rank=2, input_size=SIZE)
    assert [found.name for found in fit(model, [pictures()])] == ["1", "2"]
    middle = model[1](whole[0](pictures()))
    wanted = whole[2](whole[1](whole[0](pictures())))  # not whole[2](middle)
    theirs = best(rows(middle), rows(wanted) - rows(middle), 2) + (rows(wanted) - rows(middle)).mean(0)
    ours = rows(model[2](middle)) - rows(middle)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02 * theirs.std().item())


def test_fitting_apart_is_fitting_each_alone() -> None:
    whole = net()
    layers = {"1": LowRank(6, 3), "2": make_layer("ulsam", 6, groups=2, rank=3).eval()}
    with torch.no_grad():
        layers["2"][0].pointwise.weight.mul_(30)  # far from the identity
    fit_apart(whole, layers, list(pictures().split(16)))
    for name, layer in layers.items():
        options = {"layer": "lowrank"} if name == "1" else {"groups": 2}
        model = ulsam.replace(copy.deepcopy(whole), name, rank=3, input_size=SIZE, **options)
        model.get_submodule(name).load_state_dict({**layer.state_dict(), **zeros(layer)})
        fit(model, [pictures()])
        torch.testing.assert_close(model.get_submodule(name)(maps()), layer(maps()), rtol=1e-3, atol=1e-4)


def test_fitting_leaves_all_else_alone() -> None:
    whole = net()
    model = ulsam.replace(copy.deepcopy(whole).train(), "1", groups=2, rank=2, input_size=SIZE)
    model[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert [found.name for found in fit(model, [pictures()])] == ["1"]
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert changed == {"1.1.down.weight", "1.1.up.weight", "1.1.up.bias"}
    assert not model[0].training and model[1].training and model[2].training
    assert fit(model, [pictures(seed=2)]) == []  # it is no new layer any more
    back = ulsam.remove(model).eval()
    torch.testing.assert_close(back(pictures()), whole(pictures()), rtol=0, atol=0)


def test_nothing_to_fit() -> None:
    with pytest.raises(UlsamError, match="no pictures"):
        fit(net(), [])
    assert fit(ulsam.replace(net(), "1", groups=2, input_size=SIZE), [pictures()]) == []
    inserted = ulsam.insert(net(), "1", layer="lowrank", rank=2, input_size=SIZE)
    assert fit(inserted, [pictures()]) == []  # it stands for no block


def test_a_block_that_does_nothing_and_pictures_without_spread() -> None:
    whole = net()
    for parameter in whole[1].parameters():
        nn.init.zeros_(parameter)
    model = ulsam.replace(copy.deepcopy(whole), "1", layer="lowrank", rank=2, input_size=SIZE)
    assert fit(model, [pictures()])[0].explained == 1.0
    torch.testing.assert_close(model(pictures()), whole(pictures()), rtol=0, atol=1e-6)
    model = ulsam.replace(net(), "1", layer="lowrank", rank=2, input_size=SIZE)
    fit(model, [torch.zeros(4, *SIZE)])
    assert all(value.isfinite().all() for value in model.state_dict().values())


# in edits, files and training


@pytest.mark.parametrize(
    ("text", "edit", "children"),
    [
        ("replace 14 layer=lowrank rank=8", Edit("replace", "14", layer="lowrank"), ["down", "up"]),
        ("replace 14 g=4 rank=2", Edit("replace", "14", rank=2), ["0", "1"]),
        ("insert 14:1 layer=se rank=3", Edit("insert", "14:1", layer="se", rank=3), ["0", "1"]),
    ],
)
def test_edits_with_a_rank(text: str, edit: Edit, children: list[str], tmp_path: Path) -> None:
    assert str(edit) == text and Edit.parse(text) == edit
    recipe = Recipe("mobilenetv2_035", ("a", "b"), (edit,), input_size=(3, 32, 32))
    model, _ = build(recipe)
    place = model.blocks[4][2]
    made = place if edit.kind == "replace" else place.ulsam
    assert [name for name, _ in made.named_children()] == children
    save_model(model, recipe, tmp_path / "net.safetensors")
    same, read = load(tmp_path / "net.safetensors")
    assert read == recipe
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(same(x), model.eval()(x), rtol=0, atol=0)
    base = timm.create_model("mobilenetv2_035", num_classes=2)
    assert load_weights(model, base.state_dict()) == []  # a net from before the edit still fits
    torch.testing.assert_close(ulsam.remove(model)(x), base.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("drop 14 rank=2", "a drop makes no layer"),
        ("replace 14 rank=0", "rank must be 1 or more, not 0"),
        ("replace 14 rank=two", "cannot read the edit"),
        ("replace 14 rank=2 rank=3 x=1", "cannot read the edit"),
        ("replace 14 layer=lowrank g=4", "groups and form are for ULSAM alone"),
    ],
)
def test_edits_with_a_rank_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(UlsamError, match=message):
        Edit.parse(text)


def test_a_rank_above_the_channels_leaves_the_net_alone() -> None:
    model = timm.create_model("mobilenetv2_035", num_classes=2)
    keys = list(model.state_dict())
    with pytest.raises(UlsamError, match=r"blocks\.4\.2: rank must lie between 1 and the 32 channels, not 33"):
        ulsam.replace(model, "14", layer="lowrank", rank=33)
    assert list(model.state_dict()) == keys


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_splits(tmp_path_factory.mktemp("data"))


def test_training_starts_from_a_fit(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From weights of the base net; not without weights, with --fit-pictures 0, or from weights of the edited net."""

    def start(name: str, **options: object) -> dict[str, Tensor]:
        still = {"lr": 1e-30, "weight_decay": 0.0, "epochs": 1}  # what it ends with is what it started from
        edits = ["replace blocks.3.0.se layer=lowrank rank=3"]
        config = {**SETTINGS, **still, "data": str(data), "edits": edits, **options}
        train(TrainConfig.from_mapping(config), tmp_path / name)
        return load(tmp_path / name / "model.safetensors")[0].get_submodule("blocks.3.0.se").state_dict()

    base = timm.create_model(NET, num_classes=3)
    torch.save(base.state_dict(), tmp_path / "base.pt")
    torch.manual_seed(5)
    fitted = start("fitted", weights=str(tmp_path / "base.pt"))
    assert "fit     blocks.3.0.se: rank 3 gives" in capsys.readouterr().out
    assert fitted["up.weight"].any()
    again = start("again", weights=str(tmp_path / "fitted" / "model.safetensors"))
    assert all(torch.equal(again[name], fitted[name]) for name in fitted)
    for name, options in [("off", {"weights": str(tmp_path / "base.pt"), "fit_pictures": 0}), ("fresh", {})]:
        capsys.readouterr()
        assert start(name, **options)["up.weight"].abs().max() < 1e-20  # all but the zeros of a new layer
        assert "fit " not in capsys.readouterr().out


def test_a_stream_cannot_be_fitted_on(data: Path, tmp_path: Path) -> None:
    torch.save(timm.create_model(NET, num_classes=3).state_dict(), tmp_path / "base.pt")
    shards = tmp_path / "shards"
    shards.mkdir()
    draw_shards(shards, data / "train")
    settings = {**SETTINGS, "weights": str(tmp_path / "base.pt"), "edits": ["replace blocks.3.0.se rank=3"]}
    stream = {"data": "wds/set", "data_dir": str(shards), "class_names": str(shards / "names.txt")}
    with pytest.raises(UlsamError, match="cannot be fitted on a stream of shards: --fit-pictures 0"):
        train(TrainConfig.from_mapping({**settings, **stream, "val_split": "validation"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_fitting_moves_no_random_generator(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run goes on with the same numbers, whether it fitted or not."""
    seen = []

    def listen(*args: Any) -> list[str]:
        before = torch.get_rng_state(), random.getstate()
        lines = fit_layers(*args)
        seen.append((len(lines), before[0].equal(torch.get_rng_state()), before[1] == random.getstate()))
        return lines

    monkeypatch.setattr("ulsam.train.loop.fit_layers", listen)
    torch.save(timm.create_model(NET, num_classes=3).state_dict(), tmp_path / "base.pt")
    config = {**SETTINGS, "data": str(data), "weights": str(tmp_path / "base.pt"), "epochs": 1}
    train(
        TrainConfig.from_mapping({**config, "edits": ["replace blocks.3.0.se layer=lowrank rank=3"]}), tmp_path / "run"
    )
    assert seen == [(1, True, True)]
