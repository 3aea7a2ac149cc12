"""Models to fold, and the check of what is left."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ulsam.surgery.fold import fold

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


class Peeking(Shared):
    """Uses the convolution's output beside its BatchNorm's."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        return self.behind(self.three(self.both(h) + h))


def check(model: nn.Module, left: set[str], size: tuple[int, int, int] = SIZE, **options: bool) -> nn.Module:
    """Fold, compare the outputs on another image, and check which BatchNorms are left."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    folded = fold(model, size, **options)
    x = torch.randn(3, *size)
    with torch.no_grad():
        expected = model(x)
        # some models amplify the rounding of float32 to 2e-5; a fault in folding is of the outputs' own size
        torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert {name for name, module in folded.named_modules() if isinstance(module, nn.BatchNorm2d)} == left
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    return folded


def two(width: int = 8) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 6, 3), nn.BatchNorm2d(6)
    )


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
