"""What is no regular file is refused in one line, wherever a file is read: nothing is waited for."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ulsam import runtime
from ulsam.base.errors import UlsamError
from ulsam.base.files import read_json
from ulsam.base.packed import read_packed
from ulsam.base.reading import read_text
from ulsam.cli import main
from ulsam.data.images import MAX_BYTES, UnreadableImage, read_image, read_pixels
from ulsam.data.opening import open_split
from ulsam.data.prepare import prepare
from ulsam.model.build import load, read_spec, read_weights
from ulsam.study.identity import file_digests
from ulsam.training.checkpoint import CHECKPOINT, read_checkpoint
from ulsam.training.config import TrainConfig, read_config

fcntl = pytest.importorskip("fcntl")

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes"),
    pytest.mark.timeout(120),  # a reader that waits
]


@pytest.fixture(params=["pipe", "endless", "socket"])
def odd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file that is none, named as a reader likes it."""
    path = tmp_path / "odd"
    with socket.socket(socket.AF_UNIX) as one:
        if request.param == "pipe":
            os.mkfifo(path)
        elif request.param == "endless":
            path.symlink_to("/dev/zero")
        else:
            one.bind(str(path))
        yield path


@pytest.mark.skipif(not hasattr(fcntl, "F_SETLEASE"), reason="this system has no leases")
def test_a_file_that_another_program_has_a_lease_on_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "model.txt"
    path.write_text("whole")
    code = (
        "import fcntl, os, signal, sys\n"
        "file = os.open(sys.argv[1], os.O_RDWR)\n"
        "def give_up(*_): fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK); os._exit(0)\n"
        "signal.signal(signal.SIGIO, give_up)\n"
        "fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)\n"
        "print('taken', flush=True)\n"
        "while True: signal.pause()\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        if not holder.stdout or holder.stdout.readline() != "taken\n":
            pytest.skip("this file system has no leases")
        assert read_text(path) == "whole"
        assert holder.wait(timeout=20) == 0
    finally:
        holder.kill()


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "read_image": ("odd.jpg", read_image),
    "read_pixels": ("odd.png", read_pixels),
    "load": ("odd.safetensors", load),
    "read_spec": ("odd.safetensors", read_spec),
    "read_weights": ("odd.pt", read_weights),
    "runtime": ("odd.onnx", runtime.load),
    "config": ("odd.yaml", read_config),
    "checkpoint": (CHECKPOINT, lambda path: read_checkpoint(path.parent)),
    "json": ("summary.json", read_json),
    "packed": ("odd.gz", read_packed),
    "archive": ("odd.tar", lambda path: prepare("food101", path, path.parent / "out")),
    "teacher": ("odd.safetensors", lambda path: file_digests([TrainConfig("birds", teacher=str(path))])),
    "class names": (
        "names.txt",
        lambda path: open_split("torch/image_folder", "x", data_dir=str(path.parent), class_names=str(path)),
    ),
}


@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_regular_file_is_refused(reader: str, odd: Path) -> None:
    name, read = READERS[reader]
    path = odd.rename(odd.with_name(name))
    if reader == "class names":
        (path.parent / "x" / "a").mkdir(parents=True)
        (path.parent / "x" / "a" / "1.png").touch()
    with pytest.raises(UlsamError, match="not a regular file, but a pipe, a device or a socket") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_predict_goes_past_a_pipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    assert main(["predict", "mobilenetv2_100.grocery81_slim75", str(tmp_path / "pipe.jpg")]) == 2
    assert "pipe.jpg: not a regular file" in "".join(capsys.readouterr())


def test_a_file_beyond_any_image_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "sparse.jpg").write_bytes(b"\xff\xd8\xff")
    os.truncate(tmp_path / "sparse.jpg", MAX_BYTES + 1)
    with pytest.raises(UnreadableImage, match=r"sparse\.jpg: larger than 1000000000 bytes, the most that is read"):
        read_pixels(tmp_path / "sparse.jpg")
