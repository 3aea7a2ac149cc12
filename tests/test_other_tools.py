"""PyTorch's own tools on an edited model: compilation, copies, fusing, quantization."""

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch
from timm.utils.model import reparameterize_model
from torch import nn
from torch.fx.experimental.optimization import fuse as fuse_by_fx
from torch.nn.utils import parametrizations, parametrize

import ulsam
from calibrating import calibrated
from tiny import SETTINGS, draw_splits
from tool_models import (
    EDITED,
    FIRST,
    LAST,
    SECOND,
    SIZE,
    Small,
    assert_same,
    base,
    images,
    inserted,
    randomised,
    released,
)
from ulsam.base.errors import UlsamError
from ulsam.layer.ulsam import ULSAM
from ulsam.model.build import load
from ulsam.training.config import TrainConfig
from ulsam.training.train import train


def removed() -> nn.Module:
    return ulsam.remove(base(), f"{SECOND},{LAST}", input_size=SIZE)


@pytest.fixture(autouse=True)
def _no_gradients_left() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def without_layer(model: nn.Module) -> nn.Module:
    return ulsam.undo(copy.deepcopy(model))


def assert_layer_matters(model: nn.Module) -> None:
    """Or the comparisons above would not see that it is gone."""
    with torch.no_grad():
        change = model(images()) - without_layer(model)(images())
    assert float(change.abs().max()) > 1e-3


# torch.compile


@pytest.mark.parametrize("make", [released, pytest.param(removed, marks=pytest.mark.slow)])
def test_compiled_is_eager_whatever_was_compiled_before(make: Callable[[], nn.Module]) -> None:
    plain = randomised(base())
    assert_same(torch.compile(plain, backend="aot_eager"), plain)
    model = randomised(make())
    assert_layer_matters(model)
    assert_same(torch.compile(model, backend="aot_eager"), model)


@pytest.mark.slow
def test_an_edit_of_a_compiled_model_and_its_undoing_take_effect() -> None:
    model = randomised(base())
    compiled = torch.compile(model, backend="aot_eager")
    assert_same(compiled, model)
    for edit in (
        lambda: ulsam.insert(compiled, LAST, 4, input_size=SIZE),
        lambda: ulsam.replace(compiled, SECOND, 4, input_size=SIZE),
        lambda: ulsam.remove(compiled, FIRST, input_size=SIZE),
        lambda: ulsam.undo(compiled),
        lambda: ulsam.insert(model, FIRST, 8, input_size=SIZE),
    ):
        before = model(images())
        assert edit() in (compiled, model)
        randomised(model)
        assert not torch.equal(model(images()), before)
        assert_same(compiled, model)


@pytest.mark.slow
def test_compiled_by_itself_and_edited_it_is_eager() -> None:
    model = randomised(base())
    model.compile(backend="aot_eager")
    model(images())
    ulsam.insert(model, LAST, 4, input_size=SIZE)
    assert_same(model, copy.deepcopy(randomised(model)))


@pytest.mark.slow
def test_training_compiled_gives_every_new_weight_the_gradient_of_eager() -> None:
    plain = base()
    torch.compile(plain, backend="aot_eager")(images()).sum().backward()
    eager = randomised(inserted()).train()
    compiled = copy.deepcopy(eager)
    for run in (eager, torch.compile(compiled, backend="aot_eager")):
        run(images(4)).square().sum().backward()
    for (name, one), other in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None, name
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-3 * float(one.grad.abs().max()), msg=name)


@pytest.mark.slow
def test_a_compiled_training_after_another_one_trains_the_layers_as_eager_does(tmp_path: Path) -> None:
    """The layers of the second training were once left without a gradient: it ran the first one's code."""
    data = draw_splits(tmp_path / "data")
    trained = {}
    for name, edits, compiler, rate in (
        ("plain", [], "inductor", 0.1),
        ("compiled", ["insert blocks.3.0 g=2"], "inductor", 0.1),
        ("eager", ["insert blocks.3.0 g=2"], "none", 0.1),
        ("start", ["insert blocks.3.0 g=2"], "none", 1e-9),
    ):
        settings = {**SETTINGS, "data": str(data), "size": 96, "epochs": 1}
        settings |= {"compile": compiler, "edits": edits, "lr": rate}
        train(TrainConfig.from_mapping(settings), tmp_path / name)
        trained[name] = load(tmp_path / name / "model.safetensors")[0]
    one, other, start = (trained[name].blocks[3][0].ulsam for name in ("compiled", "eager", "start"))
    for weight, wanted, before in zip(one.parameters(), other.parameters(), start.parameters(), strict=True):
        moved = float((wanted - before).detach().abs().max())
        assert float((weight - wanted).detach().abs().max()) < 0.1 * moved


# copies, pickles, state dicts


@EDITED
def test_copies_and_pickles_hold_the_layer_and_can_be_undone(make: Callable[[], nn.Module]) -> None:
    model = randomised(make())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(twin, model, 0)
        assert ulsam.edits_of(twin) == ulsam.edits_of(model)
        assert_same(ulsam.undo(twin), without_layer(model), 0)


def test_other_names_and_a_checkpoint_of_the_base_model_stay() -> None:
    model = base()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ulsam.insert(model, f"{LAST},{FIRST}", 4, input_size=SIZE)
    missing, unexpected = model.load_state_dict(before, strict=False)
    assert not unexpected and all(".ulsam." in name for name in missing) and missing
    new = {name for name, _ in model.named_parameters()} - set(dict(base().named_parameters()))
    assert new == set(missing)


@pytest.mark.parametrize("first", ["norm", "layer"])
def test_a_parametrized_module_and_an_insertion_behind_it_are_independent(first: str) -> None:
    model = randomised(base())
    model.bn2 = nn.Identity()  # or the layer would follow the BatchNorm
    conv = model.conv_head
    if first == "norm":
        parametrizations.weight_norm(conv)
    ulsam.insert(model, "conv_head", 4, input_size=SIZE)
    if first == "layer":
        parametrizations.weight_norm(conv)
    randomised(model.conv_head.ulsam)
    expected = model(images())
    assert_same(copy.deepcopy(model), model, 0)
    parametrize.remove_parametrizations(conv, "weight")
    torch.testing.assert_close(model(images()), expected)
    ulsam.undo(model)
    assert type(conv) is nn.Conv2d
    assert not torch.allclose(model(images()), expected)


# passes that fuse, convert and quantize


@EDITED
@pytest.mark.parametrize("transform", [torch.fx.symbolic_trace, fuse_by_fx], ids=["symbolic_trace", "fuse"])
def test_fx_keeps_the_layer(make: Callable[[], nn.Module], transform: Callable[[nn.Module], nn.Module]) -> None:
    model = randomised(make())
    assert_layer_matters(model)
    transformed = transform(copy.deepcopy(model))
    assert sum(isinstance(module, ULSAM) for module in transformed.modules()) == 2
    assert_same(transformed, model, 1e-5)


@pytest.mark.slow
@EDITED
@pytest.mark.filterwarnings("ignore")
def test_graph_mode_quantization_keeps_the_layer(make: Callable[[], nn.Module]) -> None:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    model = randomised(make())
    prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("x86"), (images(),))
    assert_same(prepared, model, 1e-5)
    quantized = convert_fx(prepared)
    layers = [module for module in quantized.modules() if isinstance(module, ULSAM)]
    assert len(layers) == 2
    with torch.no_grad():
        before = quantized(images())
        for layer in layers:  # each of them runs
            layer.depthwise.weight.mul_(-30)
            after = quantized(images())
            assert not torch.equal(before, after)
            before = after


@pytest.mark.parametrize("place", ["conv", "bn", "relu", "tail"])
def test_eager_fusing_of_modules_keeps_the_layer_or_refuses(place: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = randomised(ulsam.insert(Small(), place, 2, input_size=SIZE))
    expected = model(images())
    try:
        fused = torch.ao.quantization.fuse_modules(copy.deepcopy(model), [["conv", "bn", "relu"]])
    except (NotImplementedError, AssertionError) as error:
        assert "LayerHost" in str(error)
        fused = torch.ao.quantization.fuse_modules(copy.deepcopy(model), [["tail.0", "tail.1"]])
    torch.testing.assert_close(fused(images()), expected)


@pytest.mark.parametrize("place", ["conv", "bn", "tail", "tail.1"])
def test_behind_a_convolution_that_a_batchnorm_follows_the_place_is_the_pair(place: str) -> None:
    model = Small()
    if place.startswith("tail"):  # the container holds the layer
        ulsam.insert(model, place, 2, input_size=SIZE)
        assert ulsam.edits_of(model) == ["insert tail g=2"]
    else:
        with pytest.warns(UserWarning, match=r"bn is a BatchNorm.*SyncBatchNorm"):
            ulsam.insert(model, place, 2, input_size=SIZE)
        assert ulsam.edits_of(model) == ["insert bn g=2"]
    randomised(model)
    assert_same(ulsam.fold(model, SIZE), model, 1e-5)
    assert_same(fuse_by_fx(copy.deepcopy(model)), model, 1e-5)
    if place.startswith("tail"):
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)).eval()
        assert_same(converted, model, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "repvit_m0_9",
        "mobileone_s0",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("levit_conv_128s", "fastvit_t8", "repghostnet_050")),
    ],
)
def test_timms_reparameterization_keeps_the_layers(name: str) -> None:
    torch.manual_seed(0)
    size = (3, 64, 64) if "levit" not in name else (3, 224, 224)
    model = timm.create_model(name, num_classes=5)
    children = {f"{stage}.{block}" for stage in "0123" for block in "01"}
    found = [c.name for c in ulsam.candidates(model, size)]
    places = [place for place in found if ".".join(place.split(".")[-2:]) in children][:2] or found[:2]
    ulsam.insert(model, places, 1, input_size=size)
    calibrated(model, size[1])  # or the outputs would hardly depend on the layers
    for layer in model.modules():
        if isinstance(layer, ULSAM):
            nn.init.normal_(layer.depthwise.weight, std=3)
    x = torch.randn(1, *size)
    with torch.no_grad():
        expected, plain = model(x), without_layer(model)(x)
        reparameterized = reparameterize_model(model)
        assert sum(isinstance(module, ULSAM) for module in reparameterized.modules()) == len(places)
        found_y = reparameterized(x)
    scale = float(expected.abs().max())
    assert float((found_y - expected).abs().max()) <= 1e-3 * scale < float((plain - expected).abs().max())


@pytest.mark.slow
def test_a_host_that_becomes_another_module_by_fuse_takes_the_layer_with_it() -> None:
    torch.manual_seed(0)
    model = timm.create_model("repvit_m0_9", num_classes=5)
    name = next(n for n, m in model.named_modules() if type(m).__name__ == "RepVggDw")
    ulsam.insert(model, name, 2, input_size=(3, 64, 64))
    randomised(model)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        fused = reparameterize_model(model)
    assert isinstance(fused.get_submodule(f"{name}.ulsam"), ULSAM) and isinstance(fused.get_submodule(name), nn.Conv2d)
    torch.testing.assert_close(fused(x), expected, rtol=1e-3, atol=1e-3)
    for inside, block in ((f"{name}.conv", name), (f"{name}.conv.bn", f"{name}.conv")):
        with pytest.raises(UlsamError, match=f"lies inside {block}, which fuses"):
            ulsam.insert(timm.create_model("repvit_m0_9"), inside, 2, input_size=(3, 64, 64))
