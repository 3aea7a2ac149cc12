"""A low-rank linear layer over channels: what of a convolutional block can be had for the price of attention."""

import torch
from torch import Tensor, nn

from ulsam.errors import UlsamError

DEFAULT_RANK = 8


class LowRank(nn.Module):
    """y = x + U V x + b at every position, with V [rank, C] and U [C, rank]; the identity at its start.

    Put in the place of a block, `ulsam.fit` gives it the U, V and b that come nearest to what the block did.
    It has (2 * rank + 1) * C parameters and takes 2 * rank * C * H * W multiply-adds.

    Args:
        channels: C of the input [B, C, H, W]; H and W are free.
        rank: of the linear map, 1 to ``channels``.

    Raises:
        UlsamError: ``rank`` is out of range.

    >>> x = torch.randn(2, 16, 5, 4)
    >>> layer = LowRank(16, rank=4)
    >>> torch.equal(layer(x), x), sum(p.numel() for p in layer.parameters())
    (True, 144)
    """

    def __init__(
        self,
        channels: int,
        rank: int = DEFAULT_RANK,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= rank <= channels:
            raise UlsamError(f"rank must lie between 1 and the {channels} channels, not {rank}")
        self.channels, self.rank = channels, rank
        self.down = nn.Conv2d(channels, rank, 1, bias=False, device=device, dtype=dtype)
        self.up = nn.Conv2d(rank, channels, 1, device=device, dtype=dtype)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        return x + self.up(self.down(x))

    def extra_repr(self) -> str:
        return f"{self.channels}, rank={self.rank}"
