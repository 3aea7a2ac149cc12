"""One compressed file for a folder of small JSON files: JSON Lines, gzipped, a line for each file.

    {"file": "arms/base/seed-0/summary.json", "content": {...}}
    {"file": "arms/base/seed-1/summary.json", "in": "other.jsonl.gz"}

The second form names a packed file in the same folder that has the same file: no content needs to be kept twice. The
same content gives the same bytes. `zcat FILE | jq` reads it too.
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ulsam.base.errors import UlsamError
from ulsam.base.files import check_readable, make_folder, write_atomic

SUFFIX = ".jsonl.gz"


def check_packed_name(path: str | Path) -> None:
    """Raise unless the name of a packed file ends as it should.

    Raises:
        UlsamError: it does not.

    >>> check_packed_name("results/birds")
    Traceback (most recent call last):
    ulsam.base.errors.UlsamError: results/birds must end in .jsonl.gz: results/birds.jsonl.gz
    """
    if not str(path).endswith(SUFFIX):
        raise UlsamError(f"{path} must end in {SUFFIX}: {path}{SUFFIX}")


def write_packed(path: str | Path, files: Mapping[str, Any], elsewhere: Mapping[str, str] | None = None) -> None:
    """Write a packed file.

    Args:
        path: of the file, which ends in ``.jsonl.gz``.
        files: content by name, such as ``arms/base/seed-0/summary.json``: a JSON value, or a text where the name does
            not end in ``.json``.
        elsewhere: the names in ``files`` whose content is in a packed file in the same folder, and that file's name.

    Raises:
        UlsamError: another ending, or the file cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_packed(f"{folder}/x.jsonl.gz", {"a/b.json": {"top1": 0.5}, "a/c.failed": "no data"})
    ...     read_packed(f"{folder}/x.jsonl.gz")
    {'a/b.json': {'top1': 0.5}, 'a/c.failed': 'no data'}
    """
    check_packed_name(path)
    found = elsewhere or {}
    lines = [
        {"file": name} | ({"in": found[name]} if name in found else {"content": files[name]}) for name in sorted(files)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines)
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=buffer, mtime=0) as stream:
        stream.write(text.encode())
    make_folder(Path(path).parent)
    write_atomic(path, buffer.getvalue())


def read_packed(path: str | Path) -> dict[str, Any]:
    """The content of a packed file by name, that of packed files beside it included.

    Raises:
        UlsamError: no such file, a damaged one, or one beside it is missing or lacks what this one takes from it.
    """
    files: dict[str, Any] = {}
    beside: dict[str, dict[str, Any]] = {}
    for line in read_lines(path):
        name = line["file"]
        if "content" in line:
            files[name] = line["content"]
            continue
        other = Path(path).with_name(line["in"])
        if other.name not in beside:
            beside[other.name] = {one["file"]: one["content"] for one in read_lines(other) if "content" in one}
        if name not in beside[other.name]:
            raise UlsamError(f"{path} takes {name} from {other}, which lacks it: restore that file")
        files[name] = beside[other.name][name]
    return files


def read_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """The lines of a packed file: each has ``file``, and either ``content`` or ``in``.

    Raises:
        UlsamError: no such file, or a damaged one.
    """
    check_readable(path, "packed file")
    try:
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            for text in stream:
                line = json.loads(text)
                if not isinstance(line, dict) or len({"content", "in"} & line.keys()) != 1 or not _is_inside(line):
                    raise ValueError("a line names no file inside a folder, or has no content")
                yield line
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UlsamError(f"{path} is damaged, or is no packed file: {error}") from error


def unpack(files: Mapping[str, Any], folder: str | Path) -> None:
    """Write what :func:`read_packed` gives into a folder; files that are there already stay as they are.

    Raises:
        UlsamError: the folder cannot be written.
    """
    for name, content in files.items():
        target = Path(folder) / name
        if not target.exists():
            make_folder(target.parent)
            text = json.dumps(content, indent=1, ensure_ascii=False) + "\n" if name.endswith(".json") else content
            write_atomic(target, text, flush=False)


def _is_inside(line: Mapping[str, Any]) -> bool:
    """Whether a line's names stay below the folder that they are unpacked into, and beside the packed file."""
    name, other = line.get("file"), line.get("in", "x")
    if not isinstance(name, str) or not isinstance(other, str) or not name or not other:
        return False
    parts = PurePosixPath(name).parts
    return ".." not in parts and parts[0] != "/" and not set(name) & set("\\:") and not set(other) & set("/\\:")
