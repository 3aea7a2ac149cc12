"""Memory that a process shares with those that it starts."""

import os
import weakref
from multiprocessing.heap import Arena


def shared_memory(size: int) -> Arena:
    """So many zero bytes, which other processes can have as well: forked, or by pickle as an argument of theirs.

    On Linux it is an anonymous file: unlike /dev/shm, it has no limit of its own, which containers set at 64 MB, and it
    is only taken as it is filled.

    Raises:
        OSError: the system refuses so much memory.

    >>> len(shared_memory(5).buffer)
    5
    """
    if not hasattr(os, "memfd_create"):
        return Arena(size)
    file = os.memfd_create("ulsam")
    try:
        os.ftruncate(file, size)
        arena = Arena(size, file)
    except BaseException:
        os.close(file)
        raise
    weakref.finalize(arena, os.close, file)
    return arena
