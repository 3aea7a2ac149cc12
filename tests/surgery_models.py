"""Models to edit, and whether a model is as it was."""

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

SIZE = (3, 32, 32)


class Unit(nn.Module):
    """A shape-keeping block with parameters and BatchNorm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.conv(x)))


class Gated(nn.Module):
    """A block that takes a keyword, and one that gives a tuple."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)
        self.split = Two(channels)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        left, right = self.split(x)
        return self.conv(x) * scale + left * right


class Two(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(x), x


class Tokens(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x)


class Cbam(nn.Module):
    """Channel and spatial attention, as CBAM orders them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, channels // 4, 1), nn.ReLU(), nn.Conv2d(channels // 4, channels, 1)
        )
        self.spatial = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.sigmoid(self.mlp(x.mean((2, 3), keepdim=True)) + self.mlp(x.amax((2, 3), keepdim=True)))
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.spatial(pooled))


class Branchy(nn.Module):
    """Branches outside any Sequential, a module used twice, one under two names, tokens, NHWC, plain tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, stride=2, padding=1), nn.ReLU())
        self.left = Unit(12)
        self.right = nn.Sequential(Unit(12), Unit(12))
        self.twice = Unit(12)
        self.alias = Unit(12)
        self.same = self.alias
        self.gated = Gated(12)
        self.attention = Cbam(12)
        self.tokens = Tokens(12)
        self.last = Tokens(12)
        self.idle = Unit(12)
        self.head = nn.Linear(12, 5)
        self.shift = torch.full((1, 12, 1, 1), 0.25)  # neither parameter nor buffer
        self.table = {"scales": [torch.ones(12, 1, 1)]}

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + self.shift
        x = self.left(x) + self.right(x) * self.table["scales"][0]
        x = self.twice(self.twice(x))
        x = self.gated(self.alias(x), scale=0.5)
        x = self.attention(x)
        x = self.last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = x + self.tokens(x.flatten(2).mT).mT.unflatten(2, x.shape[2:])
        return self.head(x.mean((2, 3)))


def snapshot(model: nn.Module) -> tuple[dict[str, int], dict[str, Tensor], dict[str, bool], int]:
    """Module identities, weights, modes and the number of hooks."""
    modules = {name: id(module) for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    return modules, state, modes, sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def assert_as_before(model: nn.Module, before: tuple[dict[str, int], dict[str, Tensor], dict[str, bool], int]) -> None:
    after = snapshot(model)
    assert list(after[0].items()) == list(before[0].items())
    assert list(after[1]) == list(before[1])
    assert all(torch.equal(value, before[1][name]) for name, value in after[1].items())
    assert after[2:] == before[2:]


def make_model(name: str) -> nn.Module:
    if name == "branchy":
        return Branchy()
    source, _, leaf = name.rpartition("/")
    return getattr(torchvision.models, leaf)() if source else timm.create_model(leaf)
