"""Edits of modules of unusual kinds: wrapped, patched, hooked, compiled by themselves."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import ulsam
from tool_models import (
    FEATURES,
    LAST,
    SECOND,
    SIZE,
    Small,
    base,
    images,
    inserted,
    layer,
    randomised,
)
from ulsam.base.errors import UlsamError
from ulsam.layer.ulsam import ULSAM
from ulsam.surgery.edited import is_followed
from ulsam.surgery.layer_host import attach_layer


@pytest.fixture(autouse=True)
def _no_gradients_left() -> Iterator[None]:
    yield
    torch._dynamo.reset()


# wrapped models


class Forwarding(nn.Module):
    """A wrapper that looks like what it wraps."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compile", "DataParallel"])
@pytest.mark.parametrize("edit", [ulsam.replace, ulsam.insert, ulsam.remove])
def test_surgery_looks_through_wrappers(wrap: Callable[..., Any], edit: Callable[..., Any]) -> None:
    inner = base()
    wrapped = wrap(inner)
    assert edit(wrapped, LAST, input_size=SIZE) is wrapped
    assert ulsam.edits_of(wrapped) == ulsam.edits_of(inner) != []
    assert [c.name for c in ulsam.candidates(wrapped, SIZE)] == [c.name for c in ulsam.candidates(inner, SIZE)]
    ulsam.undo(wrapped)
    assert not ulsam.edits_of(inner)


def test_surgery_on_a_wrapper_of_another_kind_raises() -> None:
    wrapper = Forwarding(timm.create_model("mobilenetv2_035"))
    for edit in (ulsam.replace, ulsam.insert, ulsam.remove):
        with pytest.raises(UlsamError, match=r"no module of this Forwarding, which wraps the model: edit its \.inner"):
            edit(wrapper, "17", input_size=SIZE)
    assert not ulsam.edits_of(wrapper)
    ulsam.replace(wrapper, "inner.blocks.5.2", input_size=SIZE)
    assert ulsam.edits_of(wrapper) == ["replace inner.blocks.5.2 g=4"]


# hosts of unusual kinds


class Named(nn.Module):
    """Calls its block by the name of the argument, as Hugging Face's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(input=x))


def test_a_host_may_be_called_by_keyword_and_scripted() -> None:
    model = Named()
    expected = nn.ReLU()(model.conv(images()))
    attach_layer(model.conv, nn.ReLU())
    torch.testing.assert_close(model.conv(input=images()), expected)
    torch.testing.assert_close(torch.jit.script(model.conv)(images()), expected)
    up = nn.ConvTranspose2d(3, 8, 3)  # has an optional second argument
    attach_layer(up, nn.ReLU())
    torch.testing.assert_close(torch.jit.script(up)(images()), up(images()))
    torch.testing.assert_close(up(images(), [100, 100][:0] or None), up(images()))


def test_a_patch_of_the_hosts_class_takes_effect() -> None:
    class Patched(Small):
        pass

    model = Patched()
    attach_layer(model, nn.Sigmoid())
    Patched.forward = lambda self, x: self.conv(x)  # type: ignore[method-assign]
    torch.testing.assert_close(model(images()), model.conv(images()).sigmoid())


def test_a_forward_that_hangs_on_a_part_runs() -> None:
    model = layer()
    wrapped, calls = model.depthwise.forward, []
    model.depthwise.forward = lambda x: calls.append(1) or wrapped(x) * 3  # type: ignore[method-assign, func-returns-value]
    with torch.no_grad():
        y = model(FEATURES)
    del model.depthwise.forward
    model.depthwise.weight.data *= 3
    assert calls
    torch.testing.assert_close(y, model(FEATURES))


class Switching(nn.Sequential):
    def other(self, x: Tensor) -> Tensor:
        return 2 * nn.Sequential.forward(self, x)


def test_a_container_whose_forward_is_another_one_is_refused() -> None:
    host = Switching(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    host.forward = host.other  # type: ignore[method-assign]
    expected = host(images())
    with pytest.raises(UlsamError, match="would no longer run"):
        attach_layer(host, nn.ReLU())
    torch.testing.assert_close(host(images()), expected)
    plain = Switching(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    attach_layer(plain, nn.ReLU())
    with pytest.raises(UlsamError, match="would no longer run"):
        plain.forward = plain.other  # type: ignore[method-assign]
    assert not is_followed(plain[:2])


def test_what_wraps_the_forward_around_the_layer_keeps_it_and_is_taken_off_before_the_undoing() -> None:
    model = randomised(inserted())
    expected = model(images())
    host = model.blocks[2][1]
    present = host.forward

    @functools.wraps(present)
    def logged(*args: Any, **kwargs: Any) -> Any:
        return present(*args, **kwargs)

    host.forward = logged
    torch.testing.assert_close(model(images()), expected)
    edits = ulsam.edits_of(model)
    with pytest.raises(UlsamError, match="take its hook off"):
        ulsam.undo(model)
    assert ulsam.edits_of(model) == edits  # none was undone
    host.forward = present
    ulsam.undo(model)
    with pytest.raises(UlsamError, match="would no longer run"):
        attach_layer(host, nn.ReLU())
        host.forward = lambda x: x


def test_accelerates_hooks_run_and_so_does_the_layer() -> None:
    hooks = pytest.importorskip("accelerate.hooks")

    class Doubling(hooks.ModelHook):  # type: ignore[misc, name-defined]
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return 2 * output

    model = randomised(inserted())
    host = model.blocks[2][1]
    x = torch.randn(1, 24, 3, 3)
    expected = host(x)
    hooks.add_hook_to_module(host, Doubling())
    torch.testing.assert_close(host(x), 2 * expected)
    hooks.remove_hook_from_module(host)
    torch.testing.assert_close(host(x), expected)
    part = host.ulsam.depthwise
    hooks.add_hook_to_module(part, Doubling())
    hooked = host.ulsam(x)
    hooks.remove_hook_from_module(part)
    part.weight.data *= 2
    torch.testing.assert_close(hooked, host.ulsam(x))


def test_modules_that_are_compiled_by_themselves_are_refused() -> None:
    compiled = nn.Sequential(torch.compile(nn.Sequential(nn.Conv2d(3, 8, 1)), backend="aot_eager"), nn.Sigmoid())
    traced = nn.Sequential(torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 8, 1))), nn.Sigmoid())
    for model in (compiled, traced):
        with pytest.raises(UlsamError, match="is compiled or traced by itself"):
            ulsam.insert(model, "0", 2, input_size=SIZE)
        assert not ulsam.edits_of(model)


def test_a_wrapper_that_synchronizes_gradients_is_refused(tmp_path: Path) -> None:
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(base())
        with pytest.raises(UlsamError, match="edit the model before DistributedDataParallel wraps it"):
            ulsam.insert(wrapped, LAST, 4, input_size=SIZE)
    finally:
        dist.destroy_process_group()


class Shortcut(nn.Module):
    """The norm is on one of two branches behind the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x + self.norm(x).relu()


def test_a_convolution_that_others_read_too_is_its_own_place() -> None:
    model = ulsam.insert(Shortcut(), "conv", 2, input_size=SIZE)
    assert ulsam.edits_of(model) == ["insert conv g=2"]


def test_edits_are_all_made_or_none() -> None:
    model = ulsam.replace(base(), SECOND, 4, input_size=SIZE)
    with pytest.raises(UlsamError, match="no module is named"):
        ulsam.apply(model, [f"insert {SECOND} g=2", f"replace {LAST}", "replace nosuch"], input_size=SIZE)
    assert ulsam.edits_of(model) == ["replace blocks.1.2 g=4"]


def test_an_edit_in_inference_mode_can_be_trained() -> None:
    model = base()
    with torch.inference_mode():
        ulsam.insert(model, LAST, 4, input_size=SIZE)
    model(images()).square().sum().backward()
    gradients = [parameter.grad for parameter in model.blocks[2][1].ulsam.parameters()]
    assert gradients and all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


def test_half_precision_maps_of_a_large_image_are_no_zeros() -> None:
    model = ULSAM(4, 2).half().eval()
    x = torch.ones(1, 4, 300, 300, dtype=torch.float16)
    maps = model._maps(x)
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(1, 2), rtol=1e-2, atol=1e-2)
