"""What the pass on the meta device finds, against the running net."""

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ulsam.errors import UlsamError
from ulsam.trace import trace


class Odd(nn.Module):
    """Operators that change their input, by one tensor and by two, and one that changes no values but the shape."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.mul(2).relu_().clamp_(max=3).neg_()
        y += x.mean(1, keepdim=True)
        return y.squeeze_(0).unsqueeze_(0).flatten(2).logical_not_()


class Own(nn.Module):
    """What is computed on tensors of its own decides the shape, and how often a part is called."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        size = torch.tensor(x.shape[-2:]).float().div_(4).ceil_()
        for _ in range(int(torch.ones((), dtype=torch.long).add_(2))):
            x = self.again(x)
        x = F.adaptive_avg_pool2d(x, [int(n) for n in size])
        norm = F.batch_norm(torch.full((1, 2, 1, 1), 3.0), torch.zeros(2), torch.ones(2))
        return x[..., : int(norm[0, 0, 0, 0].round())]


class InPlace(nn.Module):
    def __init__(self, to: torch.dtype, name: str) -> None:
        super().__init__()
        self.to_dtype, self.operator = to, name

    def forward(self, x: Tensor) -> Tensor:
        return getattr(x.to(self.to_dtype), self.operator)()


NETS = {
    "own": Own,
    "odd": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False), nn.Hardswish(True), Odd()),
    "own statistics": lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
    **{
        name: lambda name=name: timm.create_model(name, num_classes=3)
        for name in ("mobilenetv2_035", "mobilenetv3_small_050", "efficientnet_b0", "resnet18")
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NETS)
def test_shapes_are_those_of_the_running_net(name: str, dtype: torch.dtype) -> None:
    net = NETS[name]().eval().to(dtype)
    found = trace(net, (3, 33, 47))
    put_out: dict[str, list[Any]] = {part: [] for part, _ in net.named_modules()}
    for part, module in net.named_modules():
        module.register_forward_hook(lambda _, args, output, part=part: put_out[part].append(output))
    with torch.no_grad():
        net(torch.randn(1, 3, 33, 47, dtype=dtype))
    assert {part: flow.calls for part, flow in found.items()} == {part: len(seen) for part, seen in put_out.items()}
    for part, seen in put_out.items():
        if len(seen) == 1:
            assert found[part].output_shape == tuple(seen[0].shape), part


@pytest.mark.parametrize(
    "wrong",
    [
        nn.Sequential(nn.Conv2d(3, 8, 3), InPlace(torch.long, "sigmoid_")),
        nn.Sequential(nn.Conv2d(3, 8, 3), InPlace(torch.bool, "neg_")),
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(4, affine=False)),
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.BatchNorm2d(8)),
    ],
)
def test_what_cannot_take_its_map_is_noticed(wrong: nn.Module) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        wrong.eval()(torch.randn(1, 3, 16, 16))
    with pytest.raises(UlsamError, match=r"Sequential does not run on one picture of \[3, 16, 16\]"):
        trace(wrong, (3, 16, 16))
