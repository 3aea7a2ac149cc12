"""Models side by side in the engines that run them: time, memory and size, measured in turn on this machine."""

import contextlib
import itertools
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import get_args

import numpy as np

from ulsam.base.errors import UlsamError
from ulsam.base.extras import check_plots
from ulsam.base.files import check_writable, make_folder, write_atomic, write_json
from ulsam.base.logs import say
from ulsam.base.provenance import command_line, processor, versions
from ulsam.base.timing import figures, in_turn
from ulsam.deploy import bench_report as report
from ulsam.deploy.bench_models import BenchModel, check_backends, open_bench_model
from ulsam.deploy.bench_process import Process
from ulsam.deploy.bench_report import BenchRow
from ulsam.deploy.bench_worker import BenchBackend, Case
from ulsam.deploy.parity import parity_of

MAX_TURNS = 2000
Key = tuple[int, BenchBackend]  # a model's number, and what runs it


def bench(
    models: Sequence[str],
    out: str | os.PathLike[str],
    *,
    backends: Sequence[BenchBackend] = ("eager", "onnxruntime"),
    batches: Sequence[int] = (1, 32),
    threads: Sequence[int] = (1,),
    seconds: float = 30.0,
    size: int | None = None,
    fold: bool = True,
) -> list[BenchRow]:
    """Measure models in several backends on this machine's CPU, and write ``bench.csv``, ``.png`` and ``.json``.

    Each model in each backend is a process of its own, with its own threads and memory. Before it is timed, its answers
    on generated images are compared with the model's own. For each batch size and number of threads all processes then
    run in turn, one at a time, in shuffled order: in its turn each makes a call that is not timed, and one that is.

    Args:
        models: timm names (with random weights), model files, trained models of the package, and ONNX files of
            `ulsam export` or `ulsam quantize`. The first one is what the others are compared with.
        out: folder to write into. What was measured is there too if something stops the rest, Ctrl-C among it.
        backends: eager and compile (`torch.compile`) of PyTorch, onnxruntime, openvino; all but an ONNX file are
            exported for the last two.
        batches: images a call.
        threads: CPU threads of the backend.
        seconds: for each batch size and number of threads, for all models together; 15 turns at least, 2000 at most.
        size: height and width of the images in place of each model's own.
        fold: False for models as they were trained in PyTorch's backends; what is exported is always folded.

    Returns:
        A row for each model, backend, batch size and number of threads.

    Raises:
        UlsamError: an unknown model or backend, a backend that is not installed, or one that gives other answers than
            the model; there is nothing to run; the folder holds a benchmark, or cannot be written.

    >>> bench(["mobilenetv2_050"], "runs/bench", backends=["tensorrt"])
    Traceback (most recent call last):
    ulsam.base.errors.UlsamError: unknown backend 'tensorrt'; valid: eager, compile, onnxruntime, openvino
    """
    _check(models, backends, batches, threads, seconds)
    if not fold and not {"eager", "compile"} & set(backends):
        raise UlsamError("`fold=False` is for eager and compile: what is exported is always folded, so leave it out")
    rows: list[BenchRow] = []
    with _folder(out) as result, tempfile.TemporaryDirectory() as scratch:
        opened = []
        for number, name in enumerate(models):
            say(f"open    {name}")
            folder = Path(scratch, str(number))
            folder.mkdir()
            opened.append(open_bench_model(name, backends, folder, size))
            if left := [backend for backend in backends if backend not in opened[-1].files]:
                say(f"note    {name} is an ONNX file: left out of {', '.join(left)}")
        if not any(model.files for model in opened):
            raise UlsamError(f"nothing to run: {' and '.join(backends)} of PyTorch run no ONNX files")
        try:
            for batch, number in itertools.product(batches, threads):
                say(f"start   batch {batch}, threads {number}")
                with contextlib.ExitStack() as running:
                    processes = {
                        (place, backend): running.enter_context(start(model, backend, batch, number, fold=fold))
                        for place, model in enumerate(opened)
                        for backend in model.files
                    }
                    say(f"time    {len(processes)} in turn")
                    turns: list[dict[Key, float]] = []
                    try:
                        for turn in in_turn({key: one.time for key, one in processes.items()}, seconds, MAX_TURNS):
                            turns.append(turn)
                    finally:
                        if turns:
                            rows += _rows(opened, processes, batch, number, turns)
                            _write(rows, result)
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(f"interrupted; what was measured is in {out}" if rows else "") from stop
    return rows


def start(model: BenchModel, backend: BenchBackend, batch: int, threads: int, *, fold: bool = True) -> Process:
    """The process of a model in a backend, after comparing its answers with the model's; the caller ends it.

    Raises:
        UlsamError: it does not run, or gives other answers.
    """
    name = f"{model.name} by {backend}"
    images = model.images(batch)
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = os.path.join(folder, "images.npy"), os.path.join(folder, "logits.npy")
        np.save(asked, images)
        process = Process(name, Case(backend, model.files[backend], asked, answered, threads, fold))
        with contextlib.ExitStack() as ending:
            ending.enter_context(process)
            parity = parity_of(np.load(answered), model.logits(images)).of(drawn=True)
            if not parity.within(model.tolerance):
                raise UlsamError(f"{name} gives other answers than the model, and was not timed: {parity}")
            ending.pop_all()
    return process


def _rows(
    models: Sequence[BenchModel],
    processes: Mapping[Key, Process],
    batch: int,
    threads: int,
    turns: Sequence[Mapping[Key, float]],
) -> list[BenchRow]:
    times = {key: [turn[key] for turn in turns] for key in processes}
    return [
        BenchRow(
            model=models[place].name,
            backend=backend,
            batch=batch,
            threads=threads,
            image_size=models[place].pixels.shape[2],
            peak_memory=process.peak,
            model_size=process.size,
            cost=models[place].cost,
            **figures(times[place, backend], times.get((0, backend))),
        )
        for (place, backend), process in processes.items()
    ]


def _write(rows: Sequence[BenchRow], out: Path) -> None:
    result = {
        "what": "seconds of a batch from RGB bytes to logits on the CPU in float32 (int8 files aside), bytes of memory",
        "command": command_line(),
        "rows": [report.to_json(row) for row in rows],
        "where": {**versions(), **_engines(), "processor": processor(), "cores": os.cpu_count()},
    }
    write_atomic(out / "bench.csv", report.csv_text(rows))
    write_json(out / "bench.json", result)
    write_atomic(out / "bench.png", report.draw(rows))


def _engines() -> dict[str, str]:
    """The versions of the engines that are installed."""
    found = {}
    for name in ("onnxruntime", "openvino"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@contextlib.contextmanager
def _folder(out: str | os.PathLike[str]) -> Iterator[Path]:
    """The folder of the result, which is not left behind if nothing was written."""
    out = Path(out)
    if (out / "bench.csv").exists():
        raise UlsamError(f"{out} holds a benchmark already: name another folder")
    new = not out.exists()
    make_folder(out)
    check_writable(out / "bench.csv")
    try:
        yield out
    finally:
        if new and not any(out.iterdir()):
            out.rmdir()


def _check(
    models: Sequence[str], backends: Sequence[str], batches: Sequence[int], threads: Sequence[int], seconds: float
) -> None:
    check_plots("ulsam bench")
    valid = get_args(BenchBackend)
    for backend in backends:
        if backend not in valid:
            raise UlsamError(f"unknown backend {backend!r}; valid: {', '.join(valid)}")
    for what, values in (("model", models), ("backend", backends), ("batch", batches), ("threads", threads)):
        if not values:
            raise UlsamError(f"nothing to measure: no {what} given")
        if len(set(values)) < len(values):
            raise UlsamError(f"{what} given twice: {', '.join(map(str, values))}")
    for what, numbers in (("batches", batches), ("threads", threads)):
        if min(numbers) < 1:
            raise UlsamError(f"`{what}` must be 1 or more, not {min(numbers)}")
    if not 0 <= seconds < float("inf"):
        raise UlsamError(f"`seconds` must be 0 or more, not {seconds:g}")
    check_backends(backends)
