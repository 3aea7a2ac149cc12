"""Folding keeps every model's outputs and takes out every BatchNorm that follows a convolution."""

import random
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils import prune

import ulsam
from tiny import TINY_MODEL
from ulsam.base.errors import UlsamError
from ulsam.model.build import build
from ulsam.model.spec import Edit, ModelSpec
from ulsam.surgery.fold import fold
from ulsam.surgery.layer_host import attach_layer

SIZE = (3, 64, 64)


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in eval mode, with statistics and parameters that a wrong fold would not survive."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize(
    "name", ["mobilenetv1_100", "mobilenetv2_100", "mobilenetv3_small_050", "resnet18", "ghostnet_050"]
)
@pytest.mark.parametrize("channels_last", [True, False])
def test_outputs_stay_and_norms_go(name: str, channels_last: bool) -> None:
    model = lively(timm.create_model(name))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    folded = fold(model, SIZE, channels_last=channels_last)
    x = torch.randn(3, *SIZE)
    expected = model(x)
    torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    assert norms(folded) == 0
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    kernels = [m.weight for m in folded.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
    assert all(
        kernel.is_contiguous(memory_format=torch.channels_last) == channels_last or kernel.shape[1] == 1
        for kernel in kernels
    )


def test_torchvision_and_ulsam_layers() -> None:
    model = torchvision.models.mobilenet_v2()
    ulsam.replace(model, "14", form="released", input_size=SIZE)
    ulsam.insert(model, "features.3", form="released", input_size=SIZE)
    lively(model)
    folded = fold(model, SIZE)
    x = torch.randn(2, *SIZE)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
    layers = [module for module in folded.modules() if isinstance(module, ulsam.ULSAM)]
    assert [layer.form for layer in layers] == ["folded", "folded"]
    assert norms(folded) == 0


class Shared(nn.Module):
    """One BatchNorm after two convolutions, one before a convolution, and one behind its convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3, bias=False)
        self.both, self.before = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.three, self.behind = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.both(self.one(x)) + self.both(self.two(x))
        return self.behind(self.three(self.before(h).relu()))


def test_what_cannot_be_folded_is_left() -> None:
    model = lively(Shared())
    folded = fold(model, SIZE)
    x = torch.randn(2, *SIZE)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
    assert norms(folded) == 2
    assert isinstance(folded.behind, nn.Identity)


class Peeking(Shared):
    """Uses the convolution's output beside its BatchNorm's."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        return self.behind(self.three(self.both(h) + h))


class FaintlyPeeking(Shared):
    """Uses it where no random image shows it: from values of 1000 on."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        return self.behind(self.three(self.both(h) + (h - 1000).relu()))


class UsingWeights(Shared):
    """Uses the convolution's weights beside its output."""

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.three(self.both(self.one(x)) + nn.functional.conv2d(x, self.one.weight)))


class ReadingNorm(Shared):
    """Reads an attribute of a BatchNorm that folding would take away."""

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.three(self.both(self.one(x)) * self.both.num_features))


@pytest.mark.parametrize("kind", [Peeking, FaintlyPeeking, UsingWeights, ReadingNorm])
def test_a_pair_that_others_use_is_left_and_the_next_one_folded(kind: type[Shared]) -> None:
    model = lively(kind())
    folded = fold(model, SIZE)
    x = 1e4 * torch.randn(2, *SIZE)
    expected = model(x)
    torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    assert isinstance(folded.both, nn.BatchNorm2d)
    assert isinstance(folded.behind, nn.Identity)


def check(model: nn.Module, left: set[str], size: tuple[int, int, int] = SIZE, **options: bool) -> nn.Module:
    """Fold, compare the outputs on another image, and check which BatchNorms are left."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    folded = fold(model, size, **options)
    x = torch.randn(3, *size)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    assert {name for name, module in folded.named_modules() if isinstance(module, nn.BatchNorm2d)} == left
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    return folded


def test_a_hybrid_model_keeps_its_preactivations_alone() -> None:
    model = lively(timm.create_model("coatnet_nano_rw_224", img_size=64))
    names = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    check(model, {name for name in names if name.endswith("pre_norm")})


def test_the_hybrid_model_of_the_issue() -> None:
    model = lively(timm.create_model("coatnet_0_rw_224", img_size=64))
    names = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    # squeeze-and-excitation lies before norm2
    check(model, {name for name in names if name.endswith(("pre_norm", "norm2"))})


def test_a_model_with_convolutions_of_five_dimensions() -> None:
    model = lively(timm.create_model("lambda_resnet26t"))
    folded = check(
        model, {name for name, _ in model.named_modules() if name.endswith(("norm_q", "norm_v", "post_attn"))}
    )
    assert folded.get_submodule("stages.0.0.conv2_kxk.conv").weight.is_contiguous(memory_format=torch.channels_last)


def two(width: int = 8) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 6, 3), nn.BatchNorm2d(6)
    )


def test_a_parametrized_convolution_is_left() -> None:
    model = two()
    torch.nn.utils.parametrizations.weight_norm(model[0])
    folded = check(lively(model), {"1"})
    assert torch.nn.utils.parametrize.is_parametrized(folded[0])


def pruned() -> nn.Module:
    model = two()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    prune.random_unstructured(model[0], "weight", amount=0.2)  # a second one behind the first
    prune.ln_structured(model[3], "weight", amount=0.5, n=2, dim=0)
    prune.l1_unstructured(model[4], "bias", amount=0.5)
    return model


def weight_normed() -> nn.Module:
    model = two()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(model[0])
    nn.init.uniform_(model[0].weight_g, 0.5, 2)
    return model


def spectrally_normed() -> nn.Module:
    model = two()
    torch.nn.utils.spectral_norm(model[0])
    model.train()(torch.randn(2, 3, 8, 8))  # the weight is no leaf from here on
    return model


@pytest.mark.parametrize("make", [pruned, weight_normed, spectrally_normed])
def test_weights_that_a_hook_computes_are_folded(make: Callable[[], nn.Module]) -> None:
    model = make()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
    folded = check(model.eval(), set())
    assert {key.rpartition(".")[2] for key in folded.state_dict()} == {"weight", "bias"}
    assert model[0]._forward_pre_hooks  # the model itself keeps its own


def test_what_cannot_be_copied_is_refused_in_one_line() -> None:
    model = two()
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(UlsamError, match=r"^this Sequential cannot be copied: .*pickle.*lock.*$"):
        fold(model, SIZE)


def hooked(model: nn.Sequential, index: int, before: bool) -> nn.Sequential:
    if before:
        model[index].register_forward_pre_hook(lambda _module, args: (args[0] * 2,))
    else:
        model[index].register_forward_hook(lambda _module, _args, output: output.abs())
    return model


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("before", [True, False])
def test_modules_with_hooks_are_left(index: int, before: bool) -> None:
    check(hooked(lively(two()), index, before), {"1"})


def test_a_forward_of_the_instance_is_left() -> None:
    model = lively(two())
    own = model[1].forward
    model[1].forward = lambda x: own(x).abs()
    folded = fold(model, SIZE)
    assert isinstance(folded[1], nn.BatchNorm2d)
    assert isinstance(folded[4], nn.Identity)


def test_a_transposed_convolution_is_left() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    check(lively(model), {"1"})


class Standardized(nn.Conv2d):
    """Not linear in its weight: what BatchNorm would multiply it by is taken out again."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight / self.weight.std((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight, self.bias)


def test_a_convolution_that_is_not_linear_in_its_weight_is_left() -> None:
    model = nn.Sequential(Standardized(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    check(lively(model), {"1"})


def test_kinds_of_norms() -> None:
    norms = {
        "cumulative": nn.BatchNorm2d(8, momentum=None),
        "not_affine": nn.BatchNorm2d(8, affine=False),
        "of_the_batch": nn.BatchNorm2d(8, track_running_stats=False),
    }
    for name, norm in norms.items():
        model = nn.Sequential(nn.Conv2d(3, 8, 3), norm)
        model(3 + torch.randn(4, *SIZE))  # moves the running statistics
        check(model.eval(), {"1"} if name == "of_the_batch" else set())


def test_a_model_without_norms_is_only_copied() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(1, *SIZE))
    folded = check(model.eval(), set())
    assert [type(module) for module in folded] == [nn.Conv2d, nn.ReLU, nn.Flatten, nn.Linear]


class Named(nn.Module):
    """Has two names for a convolution and for a BatchNorm, and calls another pair twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.also_conv, self.also_norm = self.conv, self.norm
        self.often, self.often_norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.also_norm(self.conv(x))
        for _ in range(2):
            h = self.often_norm(self.often(h))
        return h


def test_modules_of_two_names_and_of_two_calls() -> None:
    folded = check(lively(Named()), {"often_norm"})
    assert folded.norm is folded.also_norm and folded.conv is folded.also_conv


def test_a_norm_that_a_layer_follows_is_folded_and_a_convolution_is_not() -> None:
    model = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 8, 3), norm=BatchNormAct2d(8, inplace=False)))
    model.add_module("conv2", nn.Conv2d(8, 8, 3))
    model.add_module("norm2", nn.BatchNorm2d(8))
    with pytest.warns(UserWarning, match="norm is a BatchNorm"):
        ulsam.insert(model, "norm", form="released", groups=2, input_size=SIZE)
    attach_layer(model.conv2, ulsam.ULSAM(8, 2))  # ulsam.insert would put it behind norm2
    folded = check(lively(model), {"norm2"})
    assert [name for name, _ in folded.norm.named_children()] == ["drop", "act", "ulsam"]
    assert folded.norm.ulsam.form == "folded"
    assert isinstance(folded.norm.act, nn.ReLU)


runs: list[int] = []


class Counted(nn.Module):
    """A chain of pairs, of which the sixth is used by others; each run of any copy is listed in ``runs``."""

    def __init__(self, pairs: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(pairs))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(pairs))

    def forward(self, x: Tensor) -> Tensor:
        runs.append(len(self.convs))
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            h = conv(x)
            x = norm(h) + h if number == 5 else norm(h)
        return x


def test_one_pair_among_many_is_found_in_few_runs() -> None:
    model = lively(Counted(64))
    runs.clear()
    folded = fold(model, (3, 4, 4))
    assert len(runs) <= 3 + 2 * 6 + 1  # two as it is, a test of all pairs, two for each halving, and one when folded
    assert [isinstance(norm, nn.BatchNorm2d) for norm in folded.norms] == [number == 5 for number in range(64)]
    model.convs = nn.ModuleList(model.convs[6:])
    model.norms = nn.ModuleList(model.norms[6:])
    model.norms[5] = nn.Identity()  # none is used by others
    runs.clear()
    fold(model, (3, 4, 4))
    assert len(runs) == 4


class Random(nn.Module):
    """Outputs random numbers in eval mode too; ``peeks`` at a convolution's output."""

    def __init__(self, draw: Callable[[Tensor], Tensor], peeks: bool) -> None:
        super().__init__()
        self.draw, self.peeks = draw, peeks
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        y = self.draw(self.norm(h))
        return y + h if self.peeks else y


def by_torch(x: Tensor) -> Tensor:
    return nn.functional.dropout(x, 0.5, training=True)


def by_python(x: Tensor) -> Tensor:
    return x + random.random()


@pytest.mark.parametrize("draw", [by_torch, by_python])
@pytest.mark.parametrize("peeks", [True, False])
def test_a_random_model_is_folded_where_that_is_right(draw: Callable[[Tensor], Tensor], peeks: bool) -> None:
    model = lively(Random(draw, peeks))
    before = torch.get_rng_state()
    folded = fold(model, SIZE)
    assert torch.equal(torch.get_rng_state(), before)
    assert norms(folded) == peeks
    model.draw = folded.draw = torch.abs
    x = torch.randn(2, *SIZE)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


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
