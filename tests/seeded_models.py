"""Presets and models with seeded weights."""

from pathlib import Path

import torch
from torch import Tensor, nn

from ulsam.model.build import build, make_spec, save
from ulsam.model.spec import Edit

V2 = "ulsam_mobilenetv2_100_insert_17"
REPLACED = "ulsam_mobilenetv2_100_replace_14_17"
SMALL = "mobilenetv2_050"


def seeded(model: nn.Module, variance: float = 2.0) -> nn.Module:
    """Every parameter and statistic away from its initial value, the same each time, and the output not flat or huge.

    The weights of a layer with n inputs have the variance ``variance`` / n.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim > 1:
                value.copy_(noise * (variance / value[0].numel()) ** 0.5)
            elif value.is_floating_point():
                value.copy_(noise * 0.1 + (0 if name.endswith(("bias", "running_mean")) else 1))
    return model.eval()


def image(height: int = 64, width: int = 64, channels: int = 3, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


def save_replaced(path: Path) -> Path:
    """A model file with an edit and two classes."""
    spec = make_spec(SMALL, ["a", "b"], [Edit("replace", "17")], size=64)
    save(build(spec)[0], spec, path)
    return path
