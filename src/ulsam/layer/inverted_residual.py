"""The inverted residual of MobileNet-V2 with few hidden channels, to stand in a whole block's place."""

from functools import partial
from typing import SupportsIndex, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ulsam.base.errors import UlsamError

DEFAULT_WIDTH = 32


class InvertedResidual(nn.Module):
    """y = x + a 1x1, a depthwise 3x3 and a 1x1 convolution with ``width`` channels between; the identity at its start.

    Each convolution has a BatchNorm behind it, the first two a ReLU6 behind that: the block of MobileNet-V2 (Sandler et
    al., CVPR 2018), which has 6 * C hidden channels there. `ulsam.reconstruct` trains it to output what the block in
    whose place it stands did. It has 2 * C * width + 13 * width + 2 * C parameters and takes (2 * C + 9) * width * H *
    W multiply-adds.

    Args:
        channels: C of the input [B, C, H, W]; H and W are free.
        width: number of hidden channels, 1 or more.

    Raises:
        UlsamError: ``channels`` or ``width`` is no whole number, or ``width`` is below 1.

    >>> x = torch.randn(2, 16, 5, 4)
    >>> block = InvertedResidual(16, width=4)
    >>> torch.equal(block(x), x), sum(p.numel() for p in block.parameters())
    (True, 212)
    """

    def __init__(
        self,
        channels: int,
        width: int = DEFAULT_WIDTH,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not all(isinstance(n, SupportsIndex) and not isinstance(n, bool) for n in (channels, width)):
            raise UlsamError(f"channels and width are whole numbers, not {channels!r} and {width!r}")
        if width < 1:
            raise UlsamError(f"width must be 1 or more, not {width}")
        self.channels, self.width = channels, width
        conv, norm = partial(nn.Conv2d, bias=False, device=device, dtype=dtype), partial(nn.BatchNorm2d, device=device)
        self.conv1, self.bn1 = conv(channels, width, 1), norm(width, dtype=dtype)
        self.conv2, self.bn2 = conv(width, width, 3, padding=1, groups=width), norm(width, dtype=dtype)
        self.conv3, self.bn3 = conv(width, channels, 1), norm(channels, dtype=dtype)
        nn.init.zeros_(self.bn3.weight)

    @property
    def is_new(self) -> bool:
        """Whether it is still the identity: neither reconstructed nor trained."""
        return not self.bn3.weight.any()

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        hidden = F.relu6(self.bn1(self.conv1(x)), inplace=True)
        hidden = F.relu6(self.bn2(self.conv2(hidden)), inplace=True)
        return x + cast(Tensor, self.bn3(self.conv3(hidden)))

    def extra_repr(self) -> str:
        return f"{self.channels}, width={self.width}"
