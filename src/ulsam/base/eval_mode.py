"""Evaluation mode for a while, in several threads at once."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_held: dict[nn.Module, tuple[int, bool]] = {}  # how many eval_mode hold a module, and whether it was in training mode
_held_lock = threading.Lock()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within it the model is in eval mode; afterwards every module is in the mode that it was in.

    Several threads may be in it at a time, and it may be nested, also for a part of the model: each module goes back to
    its mode when the last one that holds it leaves.

    >>> model = nn.Dropout()
    >>> with eval_mode(model):
    ...     model.training
    False
    >>> model.training
    True
    """
    modules = list(model.modules())
    with _held_lock:
        for module in modules:
            holders, training = _held.get(module, (0, module.training))
            _held[module] = (holders + 1, training)
    try:
        model.eval()
        yield
    finally:
        with _held_lock:
            for module in modules:
                holders, training = _held.pop(module)
                if holders > 1:
                    _held[module] = (holders - 1, training)
                else:
                    module.training = training
