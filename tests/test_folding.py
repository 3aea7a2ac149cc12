"""Folding: outputs stay, norms go, and what cannot be folded is left."""

import random
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils import prune

import ulsam
from folding_models import SIZE, Peeking, Random, Shared, by_torch, check, lively, norms, two
from ulsam.base.errors import UlsamError
from ulsam.surgery.fold import fold
from ulsam.surgery.layer_host import attach_layer


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


def test_what_cannot_be_folded_is_left() -> None:
    model = lively(Shared())
    folded = fold(model, SIZE)
    x = torch.randn(2, *SIZE)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
    assert norms(folded) == 2
    assert isinstance(folded.behind, nn.Identity)


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
