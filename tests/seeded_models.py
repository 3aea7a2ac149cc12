"""Presets and models with seeded weights."""

import torch
from torch import Tensor, nn

V2 = "ulsam_mobilenetv2_100_insert_17"
REPLACED = "ulsam_mobilenetv2_100_replace_14_17"
SMALL = "mobilenetv2_050"


def seeded(model: nn.Module) -> nn.Module:
    """Weights that depend on PyTorch's generator alone, scaled so that the output is neither flat nor huge."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim > 1:
                value.copy_(noise * (2 / value[0].numel()) ** 0.5)
            elif value.is_floating_point():
                value.copy_(noise * 0.1 + (0 if name.endswith(("bias", "running_mean")) else 1))
    return model.eval()


def image(height: int = 64, width: int = 64, channels: int = 3, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))
