"""Files that are read, and the errors in reading them that are the machine's rather than the file's."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from ulsam.base.errors import MachineError

_OF_THE_FILE = frozenset(
    getattr(errno, name)
    for name in (
        *("ENOENT", "ENOTDIR", "EISDIR", "ELOOP", "ENAMETOOLONG", "ENXIO", "ENODEV"),  # it is not there, or no file
        *("EACCES", "EPERM"),
        *("EINVAL", "EOVERFLOW", "EFBIG", "ESPIPE", "EILSEQ"),  # what it holds names no place in it
    )
)
"""Errors of the system that are a file's own: every other one would meet other files too."""

_REMEDIES = {
    errno.EMFILE: "raise the limit (ulimit -n), or use fewer `workers`",
    errno.ENFILE: "close other programs, or use fewer `workers`",
    errno.ENOMEM: "close other programs, or use fewer `workers`",
    errno.EIO: "check the disk that it lies on",
    getattr(errno, "ESTALE", None): "mount the network folder again",
}


def machine_fault(error: BaseException) -> str | None:
    """What the machine lacks, and what helps, if that is the reason of an error; None for an error of the file.

    >>> machine_fault(OSError(errno.EMFILE, "Too many open files"))
    'too many open files: raise the limit (ulimit -n), or use fewer `workers`'
    >>> machine_fault(FileNotFoundError(errno.ENOENT, "No such file")), machine_fault(OSError("image is truncated"))
    (None, None)
    """
    if isinstance(error, MemoryError):
        return f"the memory is full: {_REMEDIES[errno.ENOMEM]}"
    if not isinstance(error, OSError) or error.errno is None or error.errno in _OF_THE_FILE:
        return None
    return f"{(error.strerror or str(error)).lower()}: {_REMEDIES.get(error.errno, 'check the machine and try again')}"


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file to read its bytes; one that is none is never waited for.

    Opening a named pipe waits for who writes to it, and a device may never end.

    Raises:
        OSError: it cannot be opened, or is a folder, a named pipe, a device or a socket.

    >>> open_regular(os.devnull)
    Traceback (most recent call last):
    OSError: [Errno 22] not a regular file, but a pipe, a device or a socket: '/dev/null'
    """
    _check_regular(os.stat(path), path)
    try:
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))  # noqa: SIM115
    except BlockingIOError:  # another program has a lease on the file, as Samba takes: it is waited for
        file = open(path, "rb")  # noqa: SIM115
    try:
        _check_regular(os.fstat(file.fileno()), path)  # another file may have come under this name
    except BaseException:
        file.close()
        raise
    return file


def _check_regular(status: os.stat_result, path: str | os.PathLike[str]) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file, but a pipe, a device or a socket", os.fspath(path))


def read_text(path: str | os.PathLike[str]) -> str:
    """The text in a regular file, in UTF-8.

    Raises:
        OSError: as of :func:`open_regular`.
        UnicodeDecodeError: it is no text.
    """
    with open_regular(path) as file:
        return file.read().decode("utf-8")


@contextmanager
def machine_errors(name: str) -> Iterator[None]:
    """Within it an error that is the machine's says so; every other one passes.

    Raises:
        MachineError: the machine's; ``name`` is what was being read.
    """
    try:
        yield
    except (OSError, MemoryError) as error:
        if fault := machine_fault(error):
            raise MachineError(f"cannot read {name}: {fault}") from error
        raise
