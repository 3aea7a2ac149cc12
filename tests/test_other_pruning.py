"""What hangs on a layer's parts, such as counters and hooks, and pruning."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

import ulsam
from tool_models import (
    FEATURES,
    SIZE,
    images,
    inserted,
    layer,
    randomised,
    released,
    replaced,
)
from ulsam.base.errors import UlsamError
from ulsam.layer.ulsam import ULSAM
from ulsam.surgery.pruners import customized_pruners, keep_channels


@pytest.fixture(autouse=True)
def _no_gradients_left() -> Iterator[None]:
    yield
    torch._dynamo.reset()


# what hangs on the layer's parts


@pytest.mark.parametrize("form", ["equations", "released"])
@pytest.mark.parametrize(
    "change",
    [
        lambda part: prune.l1_unstructured(part, "weight", 0.5),
        lambda part: prune.random_structured(part, "weight", 0.5, dim=0),
        pytest.param(
            lambda part: nn.utils.weight_norm(part), marks=pytest.mark.filterwarnings("ignore::FutureWarning")
        ),
        lambda part: parametrizations.weight_norm(part),
        lambda part: parametrizations.spectral_norm(part),
    ],
    ids=["prune", "prune channels", "old weight_norm", "weight_norm", "spectral_norm"],
)
def test_pruned_and_normalized_weights_are_those_that_are_used(change: Callable[[nn.Module], Any], form: str) -> None:
    model = layer(form)
    for part in (model.depthwise, model.pointwise):
        change(part)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):  # the second backward pass raised where the weights were those of the first
        optimizer.zero_grad()
        model(FEATURES).square().sum().backward()
        optimizer.step()
    model.eval()
    y = model(FEATURES)
    with torch.no_grad():
        inference = model(FEATURES)
    fresh = layer(form)
    state = {name: value for name, value in model.state_dict().items() if name in fresh.state_dict()}
    fresh.load_state_dict(state, strict=False)
    for name in ("depthwise", "pointwise"):
        getattr(fresh, name).weight.data.copy_(getattr(model, name).weight)
    torch.testing.assert_close(y, fresh(FEATURES))
    torch.testing.assert_close(inference, fresh(FEATURES))
    torch.testing.assert_close(model.attention(FEATURES), fresh.attention(FEATURES))


def test_counters_that_hang_on_modules_count_both_convolutions() -> None:
    model, macs = layer(), []

    def count(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        macs.append(output.numel() * module.weight[0].numel())  # type: ignore[index, union-attr]

    handles = [part.register_forward_hook(count) for part in model.modules() if isinstance(part, nn.Conv2d)]
    hooked = model(FEATURES)
    assert sum(macs) == 2 * FEATURES.numel()
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(hooked, model(FEATURES))


def test_pytorchs_counter_counts_the_layer_in_both_directions() -> None:
    model, x = layer(), FEATURES.clone().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        y = model(x)
    assert counter.get_total_flops() == 4 * x.numel()
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() >= 8 * x.numel()  # PyTorch counts the weights of grouped convolutions as whole


def test_gradient_hooks_on_the_parts_run() -> None:
    model, seen = layer(), []
    model.depthwise.register_full_backward_hook(lambda *_: seen.append("backward"))
    model(FEATURES.clone().requires_grad_()).sum().backward()
    assert seen == ["backward"]


# pruning of channels


@pytest.mark.parametrize("form", ["equations", "released"])
def test_a_layer_of_fewer_channels_is_what_is_left_of_it(form: str) -> None:
    model = layer(form)
    kept = [0, 3, 5, 6, 8, 11, 14, 15]
    small = copy.deepcopy(model)
    keep_channels(small, kept)
    silent = copy.deepcopy(model)  # with the other channels' part in the maps taken out
    with torch.no_grad():
        gone = [channel for channel in range(16) if channel not in kept]
        silent.pointwise.weight.view(-1)[gone] = 0
    torch.testing.assert_close(small(FEATURES[:, kept]), silent(FEATURES)[:, kept])
    assert small.train()(FEATURES[:, kept]).shape == (2, 8, 6, 5)
    fresh = ULSAM(8, 4, form=form)  # type: ignore[arg-type]
    fresh.load_state_dict(small.state_dict())
    for wrong in ([], [0, 1, 2, 4], list(range(4))):
        with pytest.raises(UlsamError, match="every subspace must keep as many channels"):
            keep_channels(copy.deepcopy(model), wrong)


@pytest.mark.parametrize("make", [inserted, replaced, released])
def test_torch_pruning_prunes_every_subspace_alike(make: Callable[[], nn.Module]) -> None:
    tp = pytest.importorskip("torch_pruning")
    model = randomised(make())
    options = {"importance": tp.importance.MagnitudeImportance(), "ignored_layers": [model.classifier]}
    before = sum(parameter.numel() for parameter in model.parameters())
    channels = [part.channels for part in model.modules() if isinstance(part, ULSAM)]
    groups = [part.groups for part in model.modules() if isinstance(part, ULSAM)]
    pruners = customized_pruners(model)
    tp.pruner.BasePruner(model, images(1), pruning_ratio=0.5, customized_pruners=pruners, **options).step()
    layers = [part for part in model.modules() if isinstance(part, ULSAM)]
    assert sum(parameter.numel() for parameter in model.parameters()) < 0.8 * before
    assert [part.channels for part in layers] == [number // 2 for number in channels]
    assert [part.groups for part in layers] == groups
    model.train()(images(4)).sum().backward()
    assert all(part.depthwise.weight.grad.abs().sum() > 0 for part in layers)


def test_without_its_pruner_torch_pruning_makes_a_model_that_refuses_to_run() -> None:
    tp = pytest.importorskip("torch_pruning")
    model = randomised(replaced())
    options = {"importance": tp.importance.MagnitudeImportance(), "ignored_layers": [model.classifier]}
    tp.pruner.BasePruner(model, images(1), pruning_ratio=0.5, **options).step()
    with pytest.raises(UlsamError, match=r"ULSAM takes a feature map \[B, 16, H, W\]"):
        model(images(1))


def test_the_attention_of_pruned_weights_in_training_trains_them_and_moves_no_statistics() -> None:
    model = layer("released").train()
    prune.l1_unstructured(model.depthwise, "weight", 0.5)
    model(FEATURES).sum().backward()
    before = [buffer.clone() for buffer in model.buffers()]
    model.zero_grad()
    model.attention(FEATURES).square().sum().backward()
    assert model.pointwise.weight.grad.abs().sum() > 0
    assert all(torch.equal(buffer, old) for buffer, old in zip(model.buffers(), before, strict=True))
    with pytest.raises(UlsamError, match=r"take it off first, as by prune\.remove"):
        model.fold()


def test_torch_pruning_refuses_a_layer_that_its_graph_hides() -> None:
    pytest.importorskip("torch_pruning")
    model = ulsam.insert(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1)), "0", 4, input_size=SIZE)
    with pytest.raises(UlsamError, match="would not see the layer inserted behind 0, a Conv2d"):
        customized_pruners(model)
