"""Locks between processes, as files."""

import os

from filelock import FileLock, Timeout


def take_lock(path: str | os.PathLike[str], wait: bool = False) -> FileLock | None:
    """Lock a file; None if another process has it, unless we ``wait`` for it.

    The lock is free again when it is released, or its process is gone, whatever ended it.

    >>> import tempfile
    >>> file = os.path.join(tempfile.mkdtemp(), "lock")
    >>> mine = take_lock(file)
    >>> take_lock(file) is None
    True
    >>> mine.release()
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=-1 if wait else 0, poll_interval=0.2)
    except Timeout:
        return None
    return lock
