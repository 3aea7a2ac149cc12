"""What the models of benchmarks/zoo.py showed."""

import pytest
import timm
import torch
from torch import Tensor, nn

import ulsam
from ulsam.base.errors import UlsamError


def test_heads_of_tokens_are_no_feature_map() -> None:
    model = timm.create_model("test_vit", qk_norm=True)
    with pytest.raises(UlsamError, match=r"q_norm normalizes the last dimension of \[1, 2, 101, 32\]; an edit needs a"):
        ulsam.insert(model, "blocks.1.attn.q_norm")
    assert not [place.name for place in ulsam.candidates(model, leaves=True) if "attn" in place.name]


def test_a_norm_of_channels_is_a_feature_map() -> None:
    model = timm.create_model("test_convnext")
    names = [place.name for place in ulsam.candidates(model, (3, 64, 64), leaves=True)]
    assert "stages.1.downsample.0" in names  # a LayerNorm2d


class Amplified(nn.Module):
    """Makes differences ten thousand times larger, as some deep models do."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(1e4 * x)


@torch.no_grad()
def test_rounding_that_a_model_amplifies_does_not_stop_folding() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3), Amplified()).eval()
    image = torch.rand(1, 3, 32, 32)
    folded = ulsam.fold(model, (3, 32, 32))
    assert folded[0].weight.dtype == torch.float32
    assert isinstance(folded[1], nn.Identity)
    torch.testing.assert_close(folded[:4](image), model[:4](image))


class Caching(nn.Module):
    """Keeps a tensor from its first pass in eval mode, as timm's EfficientViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = self.bias + 0
        return x + self.kept.expand_as(x)


def test_a_tensor_kept_in_float64_is_noticed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), Amplified(), Caching()).eval()
    with pytest.raises(UlsamError, match="outputs something else in channels_last"):
        ulsam.fold(model, (3, 32, 32))
