"""Signals that ask a run to stop: the first one lets it save, the second one acts as ever."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ulsam.base.errors import LostProcess
from ulsam.base.processes import active_stop_signals

#: What SIGTERM does for good once another process was lost; None: what it did before. The command line, whose process
#: is all its own, ignores it, so that it can say how to resume. It is a variable of the module and not an argument of
#: `ulsam.train`, since it is about the process and not about the run. And it must be known here: when the error reaches
#: the caller, the handlers are back, and torchrun's SIGTERM, which comes at once, would end the process without a word.
AFTER_LOSS: Any = None


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within it, the first Ctrl-C, SIGTERM or SIGHUP only makes the yielded function true; a second one acts as ever.

    Outside the main thread, where Python sets no handlers, signals act as ever. Where another process is gone, torchrun
    sends SIGTERM to the rest at once: see `AFTER_LOSS`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    seen: list[int] = []
    before = {number: signal.getsignal(number) for number in active_stop_signals()}
    terminals = [number for number in (1, 2) if os.isatty(number)]

    def note(number: int, _: Any) -> None:
        seen.append(number)
        signal.signal(number, before[number])
        if number == getattr(signal, "SIGHUP", None):  # what is written to a terminal that is gone is an error
            for output in terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), output)
        # not print or a log line: a handler may run in the middle of one, and neither may be entered twice
        os.write(2, b"\nulsam: saving and stopping; once more stops at once\n")

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: bool(seen)
    except LostProcess:
        if AFTER_LOSS is not None:
            before[signal.SIGTERM] = AFTER_LOSS
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
