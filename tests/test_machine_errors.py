"""What the machine lacks ends the work by name; it is never counted as an image's fault."""

import contextlib
import errno
import gc
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from tiny import draw_shards, draw_splits
from ulsam.base.errors import MachineError
from ulsam.base.reading import machine_fault
from ulsam.cli import main
from ulsam.data.augment import EvalTransform, TrainTransform
from ulsam.data.images import UnreadableImage, read_image, read_pixels
from ulsam.data.loading import EvalSet, StreamEvalSet, TrainSet, eval_loader
from ulsam.data.opening import open_split
from ulsam.data.sources import FolderImages, StreamImages
from ulsam.training.evaluate import read_batch

resource = pytest.importorskip("resource", reason="this system limits no process")

LOOK = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear"}
EVAL = EvalTransform((3, 32, 32), crop_pct=1.0, **LOOK)
PLAIN = {"crop_scale": (1.0, 1.0), "hflip": 0.0, "color_jitter": 0.0, "rand_augment": None, "random_erasing": 0.0}
TRAIN = TrainTransform((3, 32, 32), **PLAIN, **LOOK)
FILES = "too many open files: raise the limit (ulimit -n), or use fewer `workers`"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_splits(tmp_path_factory.mktemp("machine"), train=3, val=3)


@contextlib.contextmanager
def limit(kind: int, soft: int) -> Iterator[None]:
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


@contextlib.contextmanager
def open_files_left(count: int) -> Iterator[None]:
    """Within it this process can open so many files more."""
    gc.collect()  # what is freed within it would leave more
    taken = [os.open(os.devnull, os.O_RDONLY) for _ in range(count + 1)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(limit(resource.RLIMIT_NOFILE, max(map(int, os.listdir("/proc/self/fd"))) + 1))
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(count):
            os.close(taken.pop())
        try:
            yield
        finally:
            for file in taken:
                os.close(file)


@pytest.mark.parametrize(
    ("code", "of_the_machine"),
    [(code, True) for code in ("EMFILE", "ENFILE", "EIO", "ESTALE", "ENOMEM", "ETIMEDOUT", "ENOTCONN", "ENOSPC")]
    + [(code, False) for code in ("ENOENT", "ENOTDIR", "EISDIR", "ELOOP", "EACCES", "EPERM", "ENAMETOOLONG", "EINVAL")],
)
def test_errors_are_the_machines_or_the_files(code: str, of_the_machine: bool) -> None:
    number = getattr(errno, code)
    fault = machine_fault(OSError(number, os.strerror(number)))
    assert (fault is not None) is of_the_machine
    assert fault is None or fault.startswith(os.strerror(number).lower() + ": ")


READERS: dict[str, Callable[[str], object]] = {
    "read_image": read_image,
    "read_pixels": read_pixels,
    "an open file": lambda path: read_pixels(open(path, "rb")),  # noqa: SIM115
    "train": lambda path: TrainSet(FolderImages(((path, 0),), ("a",)), TRAIN, 0)[(0, 0, 0)],
    "eval": lambda path: EvalSet(FolderImages(((path, 0),), ("a",)), EVAL)[0],
    "explain": lambda path: read_batch([path], EVAL),
}


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="no file here whose reading fails")
@pytest.mark.parametrize("reader", READERS)
def test_a_disk_that_fails_ends_the_work(reader: str, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").symlink_to("/proc/self/mem")  # a file that opens; nothing can be read at its start
    with pytest.raises(MachineError, match=r"^cannot read .*broken\.jpg: input/output error: check the disk"):
        READERS[reader](str(tmp_path / "broken.jpg"))


@pytest.mark.parametrize("reader", [name for name in READERS if name != "an open file"])
def test_too_many_open_files_end_the_work(reader: str, folder: Path) -> None:
    path = str(folder / "train" / "class0" / "000.png")
    with open_files_left(0), pytest.raises(MachineError, match=r"^cannot read .*000\.png: too many open files"):
        READERS[reader](path)
    READERS[reader](path)


@pytest.mark.slow
@pytest.mark.parametrize("left", [2, 9])
def test_too_many_open_files_of_a_reading_process(left: int, folder: Path) -> None:
    images = open_split(str(folder), "val")
    with open_files_left(left), pytest.raises(MachineError) as caught:
        list(eval_loader(images, EVAL, batch_size=2, workers=1))
    message = str(caught.value)
    assert message in (f"cannot read images: {FILES}", f"cannot start processes that read images: {FILES}")


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="no file here whose reading fails")
def test_an_error_in_a_reading_process_stays_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").symlink_to("/proc/self/mem")
    images = FolderImages(((str(tmp_path / "broken.jpg"), 0),), ("a",))
    with pytest.raises(MachineError, match=r"^cannot read [^\n]*broken\.jpg: input/output error: [^\n]*$"):
        list(eval_loader(images, EVAL, batch_size=1, workers=1))


@pytest.mark.slow
def test_too_many_open_files_lose_no_shard(folder: Path, tmp_path: Path) -> None:
    draw_shards(tmp_path, folder / "train")
    names = str(tmp_path / "names.txt")
    images = open_split("wds/here", "validation", data_dir=str(tmp_path), class_names=names)
    assert isinstance(images, StreamImages)
    with (
        open_files_left(0),
        pytest.raises(MachineError, match=r"^cannot read \S*validation-0\.tar: too many open files"),
    ):
        list(StreamEvalSet(images, EVAL, 0, 1))


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="no size of this process to go by")
def test_full_memory_ends_the_work_and_a_file_that_asks_for_too_much_does_not() -> None:
    stream = io.BytesIO()
    Image.new("L", (9000, 9000)).save(stream, "png")
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    with limit(resource.RLIMIT_AS, size + 100_000_000), pytest.raises(MachineError, match="the memory is full: close"):
        read_pixels(stream)
    tags = b"II*\0\x08\0\0\0\x01\0" + b"\x00\x01\x02\0" + b"\xff\xff\xff\x7f\x08\0\0\0" + bytes(4)
    with pytest.raises(UnreadableImage):
        read_pixels(io.BytesIO(tags))


def test_absence_permission_and_damage_stay_with_the_image(folder: Path, tmp_path: Path) -> None:
    loop, missing, damaged = (tmp_path / f"{name}.jpg" for name in ("loop", "missing", "damaged"))
    loop.symlink_to(loop)
    damaged.write_bytes(b"\xff\xd8\xff\xe0")
    found, errors = read_batch(list(map(str, (loop, missing, damaged))), EVAL)
    assert (found, len(errors)) == ([], 3)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="no file here whose reading fails")
def test_a_command_ends_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.jpg"
    broken.symlink_to("/proc/self/mem")
    assert main(["predict", "mobilenetv2_100.grocery81_slim75", str(broken)]) == 2
    error = f"ulsam: error: cannot read {broken}: input/output error: check the disk that it lies on\n"
    assert capsys.readouterr().err == error


FULL_SHM = """
import sys
from test_machine_errors import EVAL
from ulsam.base.errors import MachineError
from ulsam.data.loading import eval_loader
from ulsam.data.opening import open_split
try:
    print(len(list(eval_loader(open_split(sys.argv[1], "val"), EVAL, batch_size=9, workers=1))))
except MachineError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", ["4k", "16k"])
def test_a_full_dev_shm_is_named_with_its_remedies(size: str, folder: Path) -> None:
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    words = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", sys.executable, "-c", FULL_SHM, str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parent)
    assert re.fullmatch(
        r"cannot (read images|start processes that read images): /dev/shm, where they hand them over, is full: "
        r"enlarge it \(docker run --shm-size=2g\), or use `workers=0`\n",
        done.stdout,
    ), done
