"""Do something to a training in this process, such as to stop it."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook


@contextlib.contextmanager
def stop_after(updates: int) -> Iterator[None]:
    """Press Ctrl-C at the end of so many updates: the run makes one more, then saves and stops."""
    with after(updates, lambda: signal.raise_signal(signal.SIGINT)):
        yield


@contextlib.contextmanager
def after(updates: int, action: Callable[[], object]) -> Iterator[None]:
    """Within it ``action`` is called at the end of so many updates."""
    count = 0

    def note(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == updates:
            action()

    handle = register_optimizer_step_post_hook(note)
    try:
        yield
    finally:
        handle.remove()
