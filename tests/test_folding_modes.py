"""Folding of models of any output, layout, mode and dtype."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import ulsam
from folding_models import SIZE, Peeking, Random, by_torch, check, lively, norms, two
from tiny import TINY_MODEL
from ulsam.base.errors import UlsamError
from ulsam.model.build import build
from ulsam.model.spec import Edit, ModelSpec
from ulsam.surgery.fold import fold


@dataclass
class Found:
    maps: Any
    number: int = 3


class PuttingOut(nn.Module):
    """Outputs the maps in one form or another; ``peeks`` at a convolution's output."""

    def __init__(self, form: Callable[[Tensor], Any], peeks: bool) -> None:
        super().__init__()
        self.form, self.peeks = form, peeks
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Any:
        h = self.conv(x)
        y = self.norm(h)
        return self.form(y + h if self.peeks else y)


@pytest.mark.parametrize("peeks", [True, False])
@pytest.mark.parametrize(
    "form",
    [
        lambda y: {"logits": y, "size": 3},
        lambda y: [None, (y, "text")],
        lambda y: Found([y]),
        lambda y: (y > 0, y[:0], y),
        lambda y: (y, torch.full_like(y, torch.nan), y / 0),
        lambda y: y.to(torch.complex64),
    ],
)
def test_whatever_a_model_puts_out_is_compared(form: Callable[[Tensor], Any], peeks: bool) -> None:
    assert norms(fold(lively(PuttingOut(form, peeks)), SIZE)) == peeks


def test_a_model_that_puts_out_no_tensor_is_refused() -> None:
    with pytest.raises(UlsamError, match="this PuttingOut outputs no tensor, so folding cannot be checked"):
        fold(PuttingOut(lambda y: float(y.mean()), False), SIZE)


class Viewing(nn.Module):
    """Fails in channels_last, or computes something else there."""

    def __init__(self, strided: bool) -> None:
        super().__init__()
        self.strided = strided
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return y.as_strided((len(y), 8), (y.stride(0), 1)) if self.strided else y.view(len(y), -1)


@pytest.mark.parametrize("strided", [True, False])
def test_a_model_that_needs_the_other_layout_says_so(strided: bool) -> None:
    model = lively(Viewing(strided))
    with pytest.raises(UlsamError, match=r"this Viewing .* in channels_last.*; pass channels_last=False$"):
        fold(model, SIZE)
    check(model, set(), channels_last=False)


@pytest.mark.parametrize("made_in", [False, True])
@pytest.mark.parametrize("folded_in", [False, True])
def test_inference_mode(made_in: bool, folded_in: bool) -> None:
    with torch.inference_mode(made_in):
        model = lively(timm.create_model("mobilenetv2_035"))
    with torch.inference_mode(folded_in):
        folded = fold(model, SIZE)
    assert norms(folded) == 0
    assert not any(tensor.is_inference() for tensor in folded.state_dict().values())
    x = torch.randn(2, *SIZE)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
    folded(x).sum().backward()  # as an ordinary model does


class InferringItself(nn.Module):
    """Enters inference mode in its own code, where changes in place leave no trace."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.two, self.norm2 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.two(self.norm(self.one(x).relu_())))


def test_a_model_that_enters_inference_mode_itself() -> None:
    check(lively(InferringItself()), {"norm"})


def test_explaining_in_inference_mode() -> None:
    spec = ModelSpec("mobilenetv2_035", ("cat", "dog"), (Edit("replace", "17"),), input_size=SIZE)
    model = lively(build(spec)[0])
    image = np.random.default_rng(0).integers(0, 255, (70, 80, 3), np.uint8)
    expected = ulsam.explain(model, image, spec)
    with torch.inference_mode():
        made_inside = build(spec)[0].eval()
        made_inside.load_state_dict(model.state_dict())
        found = [ulsam.explain(model, image, spec), ulsam.explain(made_inside, image, spec)]
    found.append(ulsam.explain(made_inside, image, spec))
    assert expected.cam.max() == 1
    for one in found:
        assert one.cam_layer == expected.cam_layer
        assert one.cam == pytest.approx(expected.cam, abs=1e-5)
        assert one.probabilities == pytest.approx(expected.probabilities, abs=1e-5)
        assert [layer.place for layer in one.layers] == ["17"]
        assert one.layers[0].maps == pytest.approx(expected.layers[0].maps, abs=1e-5)


@pytest.mark.slow
def test_exporting_in_inference_mode(tmp_path: Path) -> None:
    spec = ModelSpec(TINY_MODEL, ("cat", "dog"), input_size=(3, 32, 32))
    with torch.inference_mode():
        model = lively(build(spec)[0])
        assert ulsam.export(model, tmp_path / "model.onnx", spec=spec).images == 16


class InPlace(nn.Module):
    """Changes a convolution's output in place before its BatchNorm, and outputs more than a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.relu, self.norm = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.norm(self.relu(self.one(x))), None


def test_a_change_in_place_is_seen() -> None:
    model = lively(InPlace())
    folded = fold(model, SIZE)
    x = torch.randn(2, *SIZE)
    torch.testing.assert_close(folded(x)[0], model(x)[0])
    assert norms(folded) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_of_another_dtype_keeps_it(dtype: torch.dtype) -> None:
    model = lively(timm.create_model("mobilenetv2_050")).to(dtype)
    folded = fold(model, SIZE)
    assert {parameter.dtype for parameter in folded.parameters()} == {dtype}
    assert norms(folded) == 0
    x = torch.randn(2, *SIZE).to(dtype)
    exact = model.double()(x.double())
    size = exact.abs().max()
    assert (folded(x).double() - exact).abs().max() <= (0.1 if dtype == torch.bfloat16 else 1e-9) * size


def test_a_model_of_two_dtypes_keeps_both() -> None:
    model = lively(timm.create_model("mobilenetv2_035"))
    model.conv_stem.bfloat16()
    model.scale = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    before = {name: tensor.dtype for name, tensor in model.named_parameters()}
    folded = fold(model, SIZE)
    after = {name: tensor.dtype for name, tensor in folded.named_parameters()}
    assert {name: after[name] for name in after if name in before} == {
        name: before[name] for name in before if name in after
    }
    assert after["conv_stem.weight"] == after["conv_stem.bias"] == torch.bfloat16
    assert after["blocks.0.0.conv_dw.bias"] == torch.float32
    assert norms(folded) == 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_a_compiled_and_a_scripted_model() -> None:
    model = lively(two())
    check(torch.compile(model, backend="eager"), set())
    check(torch.jit.script(model), set())
    peeking = lively(Peeking())
    compiled = torch.compile(peeking, backend="eager")
    compiled(torch.randn(2, *SIZE))
    check(compiled, {"_orig_mod.both", "_orig_mod.before"})
    assert norms(model) == 2


def test_threads_fold_at_a_time() -> None:
    models = [lively(Random(by_torch, peeks)) for peeks in (True, False)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda number: norms(fold(models[number % 2], (3, 16, 16))), range(16)))
    assert found == [1, 0] * 8
