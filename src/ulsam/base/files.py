"""Files that are never half-written, and the folders that they go into."""

import contextlib
import errno
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ulsam.base.errors import UlsamError
from ulsam.base.logs import LOGGER
from ulsam.base.reading import open_regular, read_text


def check_readable(path: str | os.PathLike[str], kind: str) -> None:
    """Raise unless there is such a file, and it may be read.

    Raises:
        UlsamError: otherwise; ``kind`` is what the message calls it.
    """
    try:
        open_regular(path).close()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise UlsamError(f"no {kind} {path}") from error
    except OSError as error:
        raise UlsamError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from error


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise unless a file of this name can probably be written: to ask before long work.

    Raises:
        UlsamError: it is a folder, or there is no such folder to write into, or none that may be written to.
    """
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path) or not os.path.isdir(folder):
        raise UlsamError(f"cannot write {path}: " + ("it is a folder" if os.path.isdir(path) else "no such folder"))
    if not os.access(folder, os.W_OK):
        raise UlsamError(f"cannot write {path}: permission denied")


def make_folder(path: Path) -> None:
    """Make a folder and those above it.

    Raises:
        UlsamError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UlsamError(f"cannot make the folder {path}: {error.strerror}") from error


def check_empty(path: Path, advice: str = "", *, hidden: bool = False) -> None:
    """Raise unless the folder is empty, or not there yet.

    Args:
        path: of the folder.
        advice: what to do with it, before the message's own advice.
        hidden: whether hidden files may lie in it, such as a killed process leaves.

    Raises:
        UlsamError: something lies in it, it is a file, or it may not be listed.

    >>> check_empty(Path(__file__).parent)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ulsam.base.errors.UlsamError: ... is not an empty folder: name one that does not exist yet, or empty it first
    """
    try:
        taken = path.exists() and not (
            path.is_dir() and all(hidden and one.name.startswith(".") for one in path.iterdir())
        )
    except OSError as error:
        raise UlsamError(f"cannot list the folder {path}: {error.strerror}") from error
    if taken:
        raise UlsamError(f"{path} is not an empty folder: {advice}name one that does not exist yet, or empty it first")


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside ``path``, to be filled within it, which takes that name in one step at the end.

    Whatever goes wrong, a part of the folder is never there under its name; what a killed process left is cleared. A
    folder that is there, and may be a mount or someone's working directory, stays: the hidden one lies in it, and what
    it holds is moved out of it at the end.

    Args:
        path: of a folder that does not exist yet, or is empty but for what a killed process left.

    >>> import tempfile
    >>> out = Path(tempfile.mkdtemp()) / "out"
    >>> with whole_folder(out) as part:
    ...     _ = (part / "a.txt").write_text("x")
    ...     out.exists()
    False
    >>> os.listdir(out)
    ['a.txt']
    """
    path = Path(os.path.realpath(path))
    name = f".{path.name}.partial"
    part = path / name if path.exists() else path.with_name(name)
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        if part.parent == path:
            for entry in list(part.iterdir()):
                entry.rename(path / entry.name)
        else:
            part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_atomic(path: str | os.PathLike[str], data: bytes | str, *, flush: bool = True) -> None:
    """Write ``data`` to a temporary file beside ``path``, flush it to disk, and move it into place in one step.

    A reader sees the old file or the new one; a crash or a full disk leaves the old one. Without ``flush``, which is
    faster for many files that can be made again, a power cut may leave neither.

    Raises:
        UlsamError: the disk is full or the folder cannot be written to.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_atomic(f"{folder}/a.txt", "x")
    ...     os.listdir(folder)
    ['a.txt']
    """
    path = Path(path)
    content = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                if flush:
                    os.fsync(file.fileno())
            _replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        if not flush:
            return
        with contextlib.suppress(PermissionError):  # Windows opens no folders
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # the move itself survives a power cut
            finally:
                os.close(folder)
        LOGGER.debug("wrote   %s, %d bytes", path, len(content))
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "; what was there before is whole: make room, then try again" if full else ""
        raise UlsamError(f"cannot write {path}: {error.strerror}{advice}") from error


def write_folder(path: str | os.PathLike[str], files: Mapping[str, bytes]) -> None:
    """Write a folder that is one file to its users, such as a package of macOS, in the place of an older one.

    It is filled under another name, and moved into place when it is whole.

    Args:
        path: of the folder.
        files: what its files hold, by their names in the folder, with slashes.

    Raises:
        UlsamError: the disk is full or the folder cannot be written to.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_folder(f"{folder}/a", {"b/c.txt": b"x"})
    ...     os.listdir(f"{folder}/a"), os.listdir(folder)
    (['b'], ['a'])
    """
    path = Path(path)
    new, old = (path.with_name(f".{path.name}.{word}") for word in ("new", "old"))
    try:
        shutil.rmtree(new, ignore_errors=True)
        with whole_folder(new) as part:
            for name, content in files.items():
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                (part / name).write_bytes(content)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        new.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UlsamError(f"cannot write {path}: {error.strerror}") from error


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a JSON value as :func:`write_atomic`, to be read by people too.

    Raises:
        UlsamError: as of :func:`write_atomic`.
    """
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UlsamError: the file cannot be read, or holds something else.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_json(f"{folder}/a.json", {"top1": 0.5})
    ...     read_json(f"{folder}/a.json")
    {'top1': 0.5}
    """
    try:
        value = json.loads(read_text(path))
    except OSError as error:
        raise UlsamError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from error
    except (ValueError, RecursionError) as error:
        raise UlsamError(f"{path} is damaged: it holds no JSON ({error})") from error
    if not isinstance(value, dict):
        raise UlsamError(f"{path} is damaged: it holds no JSON object")
    return value


def clear_parts(folder: str | os.PathLike[str]) -> None:
    """Remove the temporary files that a killed process left in ``folder`` while it was in :func:`write_atomic`."""
    for part in Path(folder).glob(".*.part"):
        part.unlink(missing_ok=True)


def _replace(source: Path, target: Path) -> None:
    """Move a file over another one. On Windows that fails for as long as another program reads the other one."""
    end = time.monotonic() + (5.0 if sys.platform == "win32" else 0.0)
    while True:
        try:
            os.replace(source, target)
            return
        except PermissionError:
            if time.monotonic() >= end:
                raise
            time.sleep(0.05)
