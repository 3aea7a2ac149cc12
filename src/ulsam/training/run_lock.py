"""One process at a time trains into a folder."""

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from filelock import FileLock

from ulsam.base.errors import UlsamError
from ulsam.base.files import clear_parts, write_atomic
from ulsam.base.locks import take_lock
from ulsam.base.logs import WARNING, say

LOCK, HOLDER = ".lock", ".lock.pid"
"""Hidden files in the folder of a run that has not ended; the second one says which process has locked the first."""

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)

ORPHANS = 10.0
"""Seconds for which the reading processes of a process that was killed may still hold its lock."""


def check_idle(run: Path) -> None:
    """Raise if a process trains into this folder.

    Raises:
        UlsamError: one does.
    """
    if (run / LOCK).exists() and (lock := _lock(run)):
        lock.release()


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Within it no other process trains into this folder; what a killed one left half-written there is removed.

    The lock is free again when the process is gone, whatever ended it.

    Raises:
        UlsamError: another process does, or the folder cannot be locked.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with run_lock(folder), run_lock(folder):  # doctest: +ELLIPSIS
    ...     pass
    Traceback (most recent call last):
    ulsam.base.errors.UlsamError: process ... already trains into ...: wait for its end, or name another `out`; ...
    """
    lock = _lock(run)
    if lock is None:
        yield
        return
    try:
        clear_parts(run)
        write_atomic(run / HOLDER, str(os.getpid()), flush=False)
        yield
    finally:
        with contextlib.suppress(OSError):  # the folder may be read-only by now, which has been said
            (run / HOLDER).unlink(missing_ok=True)
        lock.release()
        if (run / "summary.json").exists():  # otherwise another process may have it by now
            with contextlib.suppress(OSError):  # another process looks at it, on Windows
                (run / LOCK).unlink(missing_ok=True)


def _lock(run: Path) -> FileLock | None:
    """None where the file system has no locks."""
    end = time.monotonic() + ORPHANS
    try:
        while (lock := take_lock(run / LOCK)) is None and not _is_alive(_pid(run)) and time.monotonic() < end:
            time.sleep(0.1)
    except (OSError, NotImplementedError) as error:
        if isinstance(error, NotImplementedError) or error.errno in NO_LOCKS:
            say(f"note    {run}: no locks on this file system: let one process at a time train there", level=WARNING)
            return None
        raise UlsamError(f"cannot lock the folder {run}: {error}; name another `out`") from error
    if lock is None:
        pid = _pid(run)
        holder = f"process {pid}" if pid else "another process"  # it has just begun, or ended
        raise UlsamError(
            f"{holder} already trains into {run}: wait for its end, or name another `out`; if it ran on a machine that "
            f"is gone, delete {run / LOCK}"
        )
    return lock


def _pid(run: Path) -> int | None:
    """The process that has locked the folder, where it says so."""
    try:
        return int((run / HOLDER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _is_alive(pid: int | None) -> bool:
    return pid is None or psutil.pid_exists(pid)
