"""A file is the old one or the new one, never half of one: after a kill, a full disk, a missing folder."""

import importlib.util
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ulsam.base.errors import UlsamError
from ulsam.base.files import clear_parts, write_atomic

OLD, NEW = b"old" * 1000, b"new" * 1_000_000

# a process that says that it is ready, then writes new content again and again
WRITER = """
import sys
from ulsam.base.files import write_atomic
old, new = b"old" * 1000, b"new" * 1_000_000
print("ready", flush=True)
while True:
    write_atomic(sys.argv[1], new)
    write_atomic(sys.argv[1], old)
"""
# a process that may write no file above 100 kB
LIMITED = """
import resource, sys
from ulsam.base.errors import UlsamError
from ulsam.base.files import write_atomic
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_atomic(sys.argv[1], b"new" * 1_000_000)
except UlsamError as error:
    print(error)
write_atomic(sys.argv[1] + "2", b"small")
"""


def test_writes_bytes_and_text(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, OLD)
    assert path.read_bytes() == OLD
    write_atomic(str(path), "Rotkehlchen – Zaunkönig\n")
    assert path.read_text(encoding="utf-8") == "Rotkehlchen – Zaunkönig\n"
    write_atomic(path, b"")
    assert path.read_bytes() == b""
    assert os.listdir(tmp_path) == ["file"]


def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)
    draws = random.Random(0)
    hits = 0
    for _ in range(16):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        assert writer.stdout.readline().strip() == b"ready"
        end = time.monotonic() + 20
        while not any(name.endswith(".part") for name in os.listdir(tmp_path)):
            assert time.monotonic() < end
        time.sleep(draws.choice((0, draws.uniform(0, 0.01))))
        writer.kill()
        writer.wait()
        writer.stdout.close()
        assert path.read_bytes() in (OLD, NEW)
        hits += any(name.endswith(".part") for name in os.listdir(tmp_path))
        (tmp_path / ".hidden").touch()
        clear_parts(tmp_path)
        assert sorted(os.listdir(tmp_path)) == [".hidden", "file"]
    assert hits >= 3  # so many came in the middle of a write


@pytest.mark.skipif(importlib.util.find_spec("resource") is None, reason="this system limits no file's size")
def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)
    done = subprocess.run([sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True, check=True)
    assert (
        done.stdout
        == f"cannot write {path}: File too large; what was there before is whole: make room, then try again\n"
    )
    assert path.read_bytes() == OLD
    assert sorted(os.listdir(tmp_path)) == ["file", "file2"]


@pytest.mark.parametrize("place", ["nowhere/file", "plain/file", "folder"])
def test_a_place_that_cannot_be_written(place: str, tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    (tmp_path / "folder").mkdir()
    before = sorted(os.listdir(tmp_path))
    # Windows has two errors for the three
    reasons = "No such file or directory|Not a directory|Is a directory|Permission denied|Access is denied"
    with pytest.raises(UlsamError, match=rf"cannot write {re.escape(str(tmp_path / place))}: ({reasons})$"):
        write_atomic(tmp_path / place, OLD)
    assert sorted(os.listdir(tmp_path)) == before
    assert os.listdir(tmp_path / "folder") == []
