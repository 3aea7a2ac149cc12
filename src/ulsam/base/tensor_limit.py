"""A limit on how many tensors a stranger's specification makes, and how much is done to them."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ulsam.base.errors import UlsamError

CALLS = 20
"""For each tensor; timm's models make up to 3 for each that is allowed."""


class TensorLimit(TorchFunctionMode):
    """Within it, in this thread alone, no more than so many empty tensors are made, as which parameters begin.

    Of other calls of PyTorch there may be `CALLS` times as many: some models fill large tables value by value.

    Raises:
        UlsamError: one more is asked for; ``message`` is what it says.

    >>> with TensorLimit(3, "too large"):
    ...     torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(2)])
    Traceback (most recent call last):
    ulsam.base.errors.UlsamError: too large
    """

    def __init__(self, limit: int, message: str) -> None:
        super().__init__()
        self.left, self.calls, self.message = limit, CALLS * limit, message

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= function is torch.empty
        self.calls -= 1
        if self.left < 0 or self.calls < 0:
            raise UlsamError(self.message)
        return function(*args, **(kwargs or {}))
