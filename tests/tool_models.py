"""Edited models for other tools, and whether these keep the layer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from torch import Tensor, nn

import ulsam
from ulsam.layer.ulsam import ULSAM

SIZE = (3, 48, 48)  # maps of 6 x 6 at the last blocks: small ones are flat, whatever the weights
FIRST, SECOND, LAST = "blocks.1.1", "blocks.1.2", "blocks.2.1"  # the blocks that can go


def randomised(model: nn.Module) -> nn.Module:
    """``model`` in eval mode with weights and statistics that are all different from what a new one has."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if "running_var" in name or (value.ndim == 1 and name.endswith("weight")):
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
            elif value.is_floating_point() and (value.ndim < 2 or "ulsam" in name or "blocks.2.1" in name):
                value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    return model.eval()


def base() -> nn.Module:
    """A MobileNet-V2 of 6 blocks, as compilers and exporters take a second a block."""
    torch.manual_seed(0)
    blocks = decode_arch_def([["ds_r1_k3_s1_c8"], ["ir_r3_k3_s2_e3_c16"], ["ir_r2_k3_s2_e3_c24"]])
    return EfficientNet(blocks, num_classes=5, stem_size=8, num_features=64, act_layer=nn.ReLU6)


def inserted() -> nn.Module:
    return ulsam.insert(base(), f"{LAST},blocks.2.0.se", 4, input_size=SIZE)


def replaced() -> nn.Module:
    return ulsam.replace(base(), f"{SECOND},{LAST}", 4, input_size=SIZE)


def released() -> nn.Module:
    return ulsam.insert(ulsam.replace(base(), LAST, 4, form="released", input_size=SIZE), FIRST, 8, input_size=SIZE)


EDITED = pytest.mark.parametrize("make", [inserted, replaced, released])


def images(batch: int = 2, height: int = 48, width: int = 48) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same(model: Callable[..., Any], other: Callable[..., Any], tolerance: float = 1e-5) -> None:
    x = images()
    expected, found = other(x), model(x)
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


class Small(nn.Module):
    """A convolution, its BatchNorm and an activation, and a block of these."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.tail = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.relu(self.bn(self.conv(x))))


def layer(form: str = "equations") -> ULSAM:
    torch.manual_seed(0)
    made = ULSAM(16, 4, form=form)  # type: ignore[arg-type]
    return randomised(made)  # type: ignore[return-value]


FEATURES = torch.randn(2, 16, 6, 5, generator=torch.Generator().manual_seed(2))
