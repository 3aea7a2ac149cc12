"""Tiny models to explain."""

import torch
from torch import Tensor, nn

from tiny import TINY_MODEL
from ulsam.explanation import Explainer
from ulsam.model.build import build, make_spec
from ulsam.model.spec import Edit, ModelSpec


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny_model(*edits: Edit) -> tuple[nn.Module, ModelSpec]:
    torch.manual_seed(0)
    spec = make_spec(TINY_MODEL, ["a", "b", "c"], edits, size=64)
    return build(spec)[0], spec


def images(number: int, size: int = 64, seed: int = 0) -> list[Tensor]:
    drawn = torch.randint(256, (number, size, size, 3), generator=torch.Generator().manual_seed(seed))
    return list(drawn.to(torch.uint8))


class Spot(nn.Module):
    """Gray of the pixel in row 3 and column 11 of 16, and 0 everywhere else: [B, 3, 16, 16] -> [B, 1, 16, 16]."""

    def forward(self, x: Tensor) -> Tensor:
        there = torch.zeros_like(x[:1, :1])
        there[:, :, 3, 11] = 1
        return x.mean(1, keepdim=True).relu() * there


class OnePixel(nn.Module):
    """Says "bright" by one pixel of the image alone."""

    def __init__(self) -> None:
        super().__init__()
        self.see, self.weight = Spot(), nn.Parameter(torch.tensor(4.0))

    def forward(self, x: Tensor) -> Tensor:
        pixel = self.weight * self.see(x).sum((1, 2, 3))
        return torch.stack([pixel, torch.ones_like(pixel)], 1)


def one_pixel() -> Explainer:
    look = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    return Explainer(
        OnePixel(), ModelSpec("one pixel", ("bright", "dark"), input_size=(3, 16, 16), crop_pct=1.0, **look)
    )
