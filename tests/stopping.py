"""Stop a training in this process."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook


@contextlib.contextmanager
def stop_after(updates: int) -> Iterator[None]:
    """Press Ctrl-C at the end of so many updates: the run makes one more, then saves and stops."""
    count = 0

    def note(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == updates:
            signal.raise_signal(signal.SIGINT)

    handle = register_optimizer_step_post_hook(note)
    try:
        yield
    finally:
        handle.remove()
