"""Processes and signals where systems differ: Windows has no process groups, and other signals."""

import ctypes
import os
import signal
import subprocess
import sys
from typing import Any


def is_first_process() -> bool:
    """Whether this is the only process, or the first of those that torchrun started: the one that prints.

    >>> is_first_process()
    True
    """
    return os.environ.get("RANK", "0") == "0"


MAX_WORKERS = 512
"""Processes that read images at most: each is one more copy of the program."""

_STOP_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
STOP_SIGNALS = tuple(int(getattr(signal, name)) for name in _STOP_NAMES if hasattr(signal, name))
"""What asks a program to end: Ctrl-C, kill(1), a container's stop, the end of the terminal; on Windows Ctrl-Break."""


def active_stop_signals() -> tuple[int, ...]:
    """`STOP_SIGNALS`, but for the end of the terminal where that is ignored, as under nohup.

    >>> set(active_stop_signals()) <= set(STOP_SIGNALS)
    True
    """
    hangup = getattr(signal, "SIGHUP", None)
    return tuple(one for one in STOP_SIGNALS if one != hangup or signal.getsignal(one) != signal.SIG_IGN)


GROUP: dict[str, Any] = {"start_new_session": True}
"""Options of `subprocess.Popen` for a process that a Ctrl-C in the terminal does not reach."""
if sys.platform == "win32":
    GROUP = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}


def kill_group(process: "subprocess.Popen[Any]") -> None:
    """End a process that was started with `GROUP` at once, where the system can with all that it has started."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


def return_freed_memory() -> None:
    """Return what was freed to the system where the C library keeps it: glibc does, for each thread.

    Source: malloc_trim(3).
    """
    if _malloc_trim is not None:
        _malloc_trim(0)


def _glibc_trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # Windows, macOS, musl
        return None


_malloc_trim = _glibc_trim()
