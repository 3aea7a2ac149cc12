"""What several tests share: a tiny model, tiny image folders, and the command line in processes of its own.

Run as a script it is a warm interpreter: it imports ulsam once, then forks a child for each command line that it reads.
A child is an ordinary process of its own session, which can be killed, but it starts at once.
"""

import atexit
import contextlib
import gc
import importlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import tarfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TINY_MODEL = "test_efficientnet"  # of timm: 0.1 M parameters, 4 ms a step of 8 images of 32 px
COLORS = [(200, 60, 60), (60, 200, 60), (60, 60, 200), (190, 190, 60), (60, 190, 190), (190, 60, 190)]
SETTINGS: dict[str, Any] = {
    "model": TINY_MODEL,
    "size": 32,
    "batch_size": 8,
    "epochs": 2,
    "workers": 0,
    "threads": 1,
    "device": "cpu",
}

#: Everything that draws random numbers or keeps a state.
FULL: dict[str, Any] = {
    **SETTINGS,
    "workers": 2,
    "accumulate": 2,
    "mixup": 0.3,
    "rand_augment": "rand-m7-n2-mstd0.5",
    "random_erasing": 0.3,
    "drop_rate": 0.2,
    "ema": 0.9,
    "save_seconds": 0,
    "insert": "blocks.2",
}


def draw(folder: Path, number: int, *, classes: int = 3, size: int = 40, noise: float = 60, seed: int = 0) -> None:
    """``number`` PNG images in each of ``classes`` class folders: a color a class, under noise."""
    random = np.random.default_rng(seed)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for index in range(number):
            pixels = random.normal(COLORS[label], noise, (size, size, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{index:03}.png")


def draw_splits(root: Path, train: int = 12, val: int = 5, **options: Any) -> Path:
    """``train/`` and ``val/`` with so many images a class."""
    draw(root / "train", train, **options)
    draw(root / "val", val, **{**options, "seed": 1})
    return root


def draw_shards(root: Path, folder: Path, val: Sequence[int] = (7, 7)) -> Path:
    """WebDataset shards of a folder with 3 classes: 4 of 11 training images, and so many validation images each."""
    splits = {}
    images = [sorted((folder / f"class{label}").iterdir()) for label in range(3)]
    for split, lengths in (("train", (11,) * 4), ("validation", val)):
        names = [f"{split}-{shard}.tar" for shard in range(len(lengths))]
        numbers = iter(range(sum(lengths)))
        for name, length in zip(names, lengths, strict=True):
            with tarfile.open(root / name, "w") as archive:
                for number in itertools.islice(numbers, length):
                    image = images[number % 3][number // 3 % len(images[0])]
                    for suffix, content in (("png", image.read_bytes()), ("cls", str(number % 3).encode())):
                        entry = tarfile.TarInfo(f"{number:04}.{suffix}")
                        entry.size = len(content)
                        archive.addfile(entry, io.BytesIO(content))
        splits[split] = {"name": split, "num_samples": sum(lengths), "filenames": names, "shard_lengths": lengths}
    (root / "_info.json").write_text(json.dumps({"splits": splits}))
    (root / "names.txt").write_text("robin\nwren\nfinch\n")
    return root


def options(settings: Mapping[str, Any]) -> list[str]:
    """Settings as options of ``ulsam train``."""
    words = []
    for name, value in settings.items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(option if value else "--no-" + option[2:])
        else:
            words += [option, *map(str, value if isinstance(value, list) else [value])]
    return words


def command(
    argv: Sequence[str], *, launcher: Sequence[str] = (), env: Mapping[str, str] | None = None, **keywords: Any
) -> "subprocess.Popen[str]":
    """Start ``python -m ulsam`` in a session of its own; ``launcher`` is e.g. torchrun's module and options."""
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, *(["-m"] if launcher else []), "ulsam", *argv],
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **keywords,
    )


class Warm:
    """A warm interpreter; :meth:`start` forks a process that runs ``ulsam`` with these arguments."""

    def __init__(self) -> None:
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **request: Any) -> Any:
        assert self.server.stdin and self.server.stdout
        print(json.dumps(request), file=self.server.stdin, flush=True)
        return json.loads(self.server.stdout.readline())

    def start(self, argv: Sequence[str], log: Path, **request: Any) -> int:
        """The new process's id. ``env`` adds to its environment, ``file_size`` limits the size of files it writes."""
        return int(self.ask(argv=list(map(str, argv)), log=str(log), **request))

    def poll(self, pid: int) -> int | None:
        """The exit code, minus the signal that killed it; None while it runs."""
        code: int | None = self.ask(poll=pid)
        return code

    def run(self, argv: Sequence[str], log: Path, **request: Any) -> int:
        """Start, wait, and return the exit code."""
        return int(self.ask(wait=self.start(argv, log, **request)))

    def kill(self, pid: int, number: int = getattr(signal, "SIGKILL", 9), *, group: bool = False) -> int:
        """Send a signal, to the whole process group on wish, and return the exit code."""
        (os.killpg if group else os.kill)(pid, number)
        return int(self.ask(wait=pid))

    def close(self) -> None:
        assert self.server.stdin
        self.server.stdin.close()
        self.server.wait()


@contextlib.contextmanager
def warm() -> Iterator[Warm]:
    """A warm interpreter, ended at the end."""
    interpreter = Warm()
    try:
        yield interpreter
    finally:
        interpreter.close()


def session(pid: int) -> list[int]:
    """The processes of a session that are alive, zombies aside (Linux)."""
    alive = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                state, _, _, its_session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(its_session) == pid and state != "Z":
                    alive.append(int(entry.name))
    return alive


def _serve() -> None:
    for module in ("ulsam.cli", "ulsam.study.slim", "matplotlib.backends.backend_agg", "torch._dynamo"):
        importlib.import_module(module)
    gc.freeze()  # for children that collect garbage
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request or "poll" in request:
            pid, status = os.waitpid(request.get("wait") or request["poll"], os.WNOHANG if "poll" in request else 0)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        elif pid := os.fork():
            print(pid, flush=True)
        else:
            _become_ulsam(**request)


def _become_ulsam(argv: list[str], log: str, env: Mapping[str, str] | None = None, file_size: int = 0) -> None:
    """Run the command line, then leave as the interpreter does, but without the second that freeing torch takes."""
    from ulsam.cli import main

    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for target, stream in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (output, 2)):
        os.dup2(target, stream)
    os.environ.update(env or {})
    if file_size:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    sys.argv = ["ulsam", *argv]
    code = 1
    try:
        code = main(argv)
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
