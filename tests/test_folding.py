"""Folding keeps every net's outputs and takes out every BatchNorm that follows a convolution."""

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import ulsam
from ulsam.errors import UlsamError
from ulsam.folding import fold

SIZE = (3, 64, 64)


def lively(net: nn.Module, seed: int = 0) -> nn.Module:
    """The net in eval mode, with statistics and parameters that a wrong fold would not survive."""
    torch.manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return net.eval()


def norms(net: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())


@pytest.mark.parametrize(
    "name", ["mobilenetv1_100", "mobilenetv2_100", "mobilenetv3_small_050", "resnet18", "ghostnet_050"]
)
@pytest.mark.parametrize("channels_last", [True, False])
def test_outputs_stay_and_norms_go(name: str, channels_last: bool) -> None:
    net = lively(timm.create_model(name))
    state = {key: value.clone() for key, value in net.state_dict().items()}
    folded = fold(net, SIZE, channels_last=channels_last)
    x = torch.randn(3, *SIZE)
    expected = net(x)
    torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    assert norms(folded) == 0
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    kernels = [m.weight for m in folded.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
    assert all(
        kernel.is_contiguous(memory_format=torch.channels_last) == channels_last or kernel.shape[1] == 1
        for kernel in kernels
    )


def test_torchvision_and_ulsam_layers() -> None:
    net = torchvision.models.mobilenet_v2()
    ulsam.replace(net, "14", form="released", input_size=SIZE)
    ulsam.insert(net, "features.3", form="released", input_size=SIZE)
    lively(net)
    folded = fold(net, SIZE)
    x = torch.randn(2, *SIZE)
    torch.testing.assert_close(folded(x), net(x), rtol=1e-4, atol=1e-5)
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
    net = lively(Shared())
    folded = fold(net, SIZE)
    x = torch.randn(2, *SIZE)
    torch.testing.assert_close(folded(x), net(x), rtol=1e-4, atol=1e-5)
    assert norms(folded) == 2
    assert isinstance(folded.behind, nn.Identity)


class Peeking(Shared):
    """Uses the convolution's output beside its BatchNorm's."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        return self.both(h) + h


def test_a_net_that_uses_what_lies_between_is_refused() -> None:
    with pytest.raises(UlsamError, match="folding changes what this Peeking puts out"):
        fold(lively(Peeking()), SIZE)


def test_a_norm_with_a_layer_behind_it_stays() -> None:
    net = lively(ulsam.insert(Shared(), "behind", input_size=SIZE))
    folded = fold(net, SIZE)
    x = torch.randn(2, *SIZE)
    torch.testing.assert_close(folded(x), net(x), rtol=1e-4, atol=1e-5)
    assert isinstance(folded.behind, nn.BatchNorm2d)


class InPlace(nn.Module):
    """Changes a convolution's output in place before its BatchNorm, and puts out more than a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.relu, self.norm = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.norm(self.relu(self.one(x))), None


def test_a_change_in_place_is_seen() -> None:
    net = lively(InPlace())
    folded = fold(net, SIZE)
    x = torch.randn(2, *SIZE)
    torch.testing.assert_close(folded(x)[0], net(x)[0])
    assert norms(folded) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_net_of_another_dtype_keeps_it(dtype: torch.dtype) -> None:
    net = lively(timm.create_model("mobilenetv2_050")).to(dtype)
    folded = fold(net, SIZE)
    assert {parameter.dtype for parameter in folded.parameters()} == {dtype}
    assert norms(folded) == 0
    x = torch.randn(2, *SIZE).to(dtype)
    exact = net.double()(x.double())
    size = exact.abs().max()
    assert (folded(x).double() - exact).abs().max() <= (0.1 if dtype == torch.bfloat16 else 1e-9) * size
