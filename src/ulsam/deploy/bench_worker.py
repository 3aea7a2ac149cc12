"""One model in one backend, in a process of its own: ``python -m ulsam.deploy.bench_worker``.

`ulsam.deploy.bench_process` drives it. Its first line of input is a `Case`; it answers when the model has run once.
Each further line asks for one timed call. Nothing of PyTorch is imported for ONNX Runtime and OpenVINO, whose memory is
measured.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ulsam import runtime
from ulsam.base.errors import first_line
from ulsam.data.images import Pixels
from ulsam.data.preprocessing import Preprocessing
from ulsam.deploy.openvino_core import openvino_core
from ulsam.training.predict import Logits

BenchBackend = Literal["eager", "compile", "onnxruntime", "openvino"]
RunOnce = Callable[[], Logits]


@dataclass(frozen=True)
class Case:
    """What a process runs.

    Attributes:
        backend: that runs it.
        model: a model file for PyTorch, an ONNX file for the others.
        images: a NumPy file with a batch of RGB bytes [B, H, W, 3] at the model's size.
        logits: the NumPy file to write with the model's output for them.
        threads: of the backend.
        fold: whether PyTorch runs the folded model (`ulsam.fold`).
    """

    backend: BenchBackend
    model: str
    images: str
    logits: str
    threads: int
    fold: bool


def opened(case: Case) -> tuple[RunOnce, int]:
    """What runs the batch once, from bytes to logits, and the bytes of the model."""
    images = np.load(case.images)
    if case.backend == "onnxruntime":
        return _in_onnxruntime(case, images), os.path.getsize(case.model)
    if case.backend == "openvino":
        return _in_openvino(case, images), os.path.getsize(case.model)
    return _in_pytorch(case, images)


def _in_onnxruntime(case: Case, images: Pixels) -> RunOnce:
    model = runtime.load(case.model, threads=case.threads)
    return lambda: model.logits(images)


def _in_openvino(case: Case, images: Pixels) -> RunOnce:
    """In float32: by itself OpenVINO computes in bfloat16 where the processor can."""
    import openvino

    core = openvino_core()
    model = core.read_model(case.model)
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": case.threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(model, "CPU", options)
    if model.input().element_type == openvino.Type.u8:
        return lambda: compiled(images)[0]
    look = Preprocessing.from_json(model.get_rt_info(["framework", runtime.PREPROCESSING]).value)
    return lambda: compiled(look.normalize(images))[0]


def _in_pytorch(case: Case, images: Pixels) -> tuple[RunOnce, int]:
    import torch

    from ulsam.model.build import load
    from ulsam.surgery.fold import fold
    from ulsam.training.evaluate import spec_transform

    torch.set_num_threads(case.threads)
    model, spec = load(case.model)
    timed = fold(model, spec.input_size) if case.fold else model.to(memory_format=torch.channels_last)
    size = sum(tensor.nbytes for tensor in (*timed.parameters(), *timed.buffers()))
    run: Any = torch.compile(timed) if case.backend == "compile" else timed
    normalize, pixels = spec_transform(spec).normalize, torch.from_numpy(images)

    @torch.inference_mode()
    def call() -> Logits:
        logits: Logits = run(normalize(pixels)).numpy()
        return logits

    return call, size


def peak_memory() -> int | None:
    """The largest resident set that this process has had, in bytes; None on Windows.

    The kernel's VmHWM (proc(5)). Where there is none, it is getrusage(2)'s ru_maxrss, which on Linux would not do: a
    new process inherits it from the one that started it.

    >>> peak_memory() > 1e6
    True
    """
    try:
        with open("/proc/self/status", encoding="ascii") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return None
    else:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Answer lines of JSON, until the end of input: that of the process which asks, too."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    try:
        case = Case(**json.loads(sys.stdin.readline()))
        run, size = opened(case)
        np.save(case.logits, run())
    except Exception as error:  # each backend has its own
        answer(error=first_line(error))
        return
    answer(bytes=size)
    for _ in sys.stdin:
        run()  # brings back the caches that the other models took
        before = time.perf_counter()
        run()
        answer(seconds=time.perf_counter() - before, peak=peak_memory())


if __name__ == "__main__":
    main()
