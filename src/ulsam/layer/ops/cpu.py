"""The CPU backend: calls the C kernels of `cpu.h` by pointer."""

import contextlib
import ctypes
import os
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, empty_like, get_num_threads
from torch.nn import Parameter

from ulsam.base.errors import UlsamError
from ulsam.layer.ops import stages
from ulsam.layer.ops.reference import dense

DTYPES = (torch.float32, torch.bfloat16)
ISA_NAMES = ("", "base", "AVX2", "AVX-512")

OPENMP = (  # struct openmp of cpu.h
    *("omp_get_thread_num", "omp_get_num_threads", "GOMP_parallel"),
    *("__kmpc_global_thread_num", "__kmpc_push_num_threads", "__kmpc_fork_call"),
)

PLAIN = (Tensor, Parameter)  # other types of tensors may have no memory of their own

_JOB = struct.Struct("24q")  # struct job of cpu.h
_TRAINING = struct.Struct("38qd")  # struct training

# Inference at batch 1: in a model, what runs here has been evicted from the caches by the convolutions since its last
# call, and then each lookup of a name in a module costs as much as a line of Python does in a loop.
_pack = _JOB.pack
_FLOAT32, _BFLOAT16, _CHANNELS_LAST = torch.float32, torch.bfloat16, torch.channels_last
_LOGITS_MULTIPLY = stages.LOGITS | stages.MULTIPLY

_sharing_prefixes = False


def _after_fork() -> None:
    """A child has none of its parent's OpenMP threads, and libgomp would wait for them: it works with one."""
    global _sharing_prefixes
    _sharing_prefixes = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def load(path: Path) -> tuple[ctypes.CDLL | None, str]:
    """The compiled kernels in a file, or None and the reason why there are none, in one line."""
    if not path.exists():
        note = path.with_name("kernels.txt")  # by setup.py
        reason = note.read_text(encoding="utf-8").strip() if note.exists() else f"there is no file {path}"
        again = "pip install with --force-reinstall --no-deps --no-cache-dir then compiles them"
        return None, f"ulsam was installed without them: {reason}; {again}"
    try:
        library = ctypes.CDLL(str(path))
        size = library.ulsam_training_size()
    except (OSError, AttributeError) as error:
        return None, f"{path} cannot be loaded: {error}"
    if size != _TRAINING.size:
        return None, f"{path} is of another version: install ulsam again"
    for function in (library.ulsam_run, library.ulsam_forward, library.ulsam_backward):
        function.argtypes = [ctypes.c_char_p]
    return library, ""


def openmp() -> list[int]:
    """Where the functions named in `OPENMP` are in the OpenMP library that PyTorch runs on; all 0 without one.

    With it the kernels share PyTorch's threads: those of a second library would fight with them for the cores. It is
    looked up as PyTorch's own calls are: in what the whole process sees, such as a preloaded library, then in what
    PyTorch has loaded.
    """
    if sys.platform == "win32":
        places = [str(path) for path in Path(torch.__file__).with_name("lib").glob("libiomp5md.dll")]
    else:
        places = [None, torch._C.__file__]
    for place in places:
        library = ctypes.CDLL(place)
        functions: Any = [getattr(library, name, None) for name in OPENMP]
        found = [ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions]
        if all(found[:3]) or all(found[:2] + found[3:]):
            return found
    return [0] * len(OPENMP)


LIBRARY, WHY_NONE = load(Path(__file__).with_name("kernels.dll" if sys.platform == "win32" else "kernels.so"))
#: Whether the kernels run on several threads: PyTorch's.
THREADED = False
if LIBRARY is not None:
    _addresses = openmp()
    THREADED = any(_addresses)
    LIBRARY.ulsam_use_openmp(struct.pack("6q", *_addresses))


def _isa_asked() -> int:
    name = os.environ.get("ULSAM_ISA", "")
    if name not in ISA_NAMES:
        raise UlsamError(f"ULSAM_ISA={name}: there is no such instruction set; valid: {', '.join(ISA_NAMES[1:])}")
    asked = ISA_NAMES.index(name)
    best = LIBRARY.ulsam_isa() if LIBRARY is not None else asked
    if asked > best:
        raise UlsamError(f"ULSAM_ISA={name}: this processor has none; valid: {', '.join(ISA_NAMES[1 : best + 1])}")
    return asked


#: The instruction set to use, as an index in `ISA_NAMES`; 0 is the processor's best, -1 not known yet.
isa = -1


def chosen_isa() -> int:
    """`isa`; the first call reads it from ``ULSAM_ISA``, which sets it by name."""
    global isa
    if isa < 0:
        isa = _isa_asked()
    return isa


@contextlib.contextmanager
def instruction_set(index: int) -> Iterator[None]:
    """Within it the kernels use this instruction set, an index in `ISA_NAMES`; 0 is the processor's best.

    >>> with instruction_set(1):
    ...     ISA_NAMES[chosen_isa()]
    'base'
    """
    global isa
    before, isa = isa, index
    try:
        yield
    finally:
        isa = before


def _run(
    stage_bits: int,
    x: Tensor,
    groups: int,
    relu: bool,
    *,
    dy: Tensor | None = None,
    y: Tensor | None = None,
    dx: Tensor | None = None,
    l: Tensor | None = None,  # noqa: E741
    dl: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    q: Tensor | None = None,
    r: Tensor | None = None,
    dbias: Tensor | None = None,
) -> None:
    """Fill a `struct job` of cpu.h and run it."""
    tensors = (x, dy, y, dx, l, dl, scale, shift, weight, bias, q, r, dbias)
    assert LIBRARY is not None
    if failed := LIBRARY.ulsam_run(_pack(*_job(tensors, x, groups, stage_bits, relu))):
        _raise(failed)


def _job(tensors: Sequence[Tensor | None], x: Tensor, groups: int, stage_bits: int, relu: bool) -> tuple[int, ...]:
    """The values of a `struct job`; the tensors are those at its head, in its order."""
    return (
        *_addresses_of(tensors),
        *x.shape,
        *(groups, stage_bits, relu, not x.is_contiguous(), x.dtype is _BFLOAT16),
        *(1 if _sharing_prefixes else get_num_threads(), chosen_isa()),
    )


def _addresses_of(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def infer(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    relu: bool,
    logits: Tensor | None = None,
) -> Tensor | None:
    """y of `subspace_attention`, written with as little Python as it takes; None for a less usual x or operands.

    The logits, float32 [B, groups, H, W], are written where they are wanted.
    """
    batch, channels, height, width = x.shape
    bf16 = x.dtype is _BFLOAT16
    contiguous = x.is_contiguous()
    if (
        LIBRARY is None
        or channels % groups
        or not (bf16 or x.dtype is _FLOAT32)
        or not (contiguous or x.is_contiguous(memory_format=_CHANNELS_LAST))
        or not (_is_vector(scale, channels) and _is_vector(weight, channels))
        or not (bias is None or _is_vector(bias, groups))
        or not (_is_vector(shift, channels) if shift is not None else not relu)
    ):
        return None
    y = empty_like(x)
    failed = LIBRARY.ulsam_run(
        _pack(
            *(x.data_ptr(), 0, y.data_ptr(), 0, 0 if logits is None else logits.data_ptr(), 0),
            *(scale.data_ptr(), 0 if shift is None else shift.data_ptr()),
            *(weight.data_ptr(), 0 if bias is None else bias.data_ptr(), 0, 0, 0),
            *(batch, channels, height, width, groups, _LOGITS_MULTIPLY, relu, not contiguous, bf16),
            *(1 if _sharing_prefixes else get_num_threads(), isa if isa >= 0 else chosen_isa()),
        )
    )
    if failed:
        _raise(failed)
    return y


def _is_vector(values: Tensor, size: int) -> bool:
    """Whether these are ``size`` floats in a row in this memory."""
    return (
        type(values) in PLAIN
        and values.numel() == size
        and values.dtype is _FLOAT32
        and values.is_cpu
        and values.is_contiguous()
        and not values.is_neg()
    )


def _raise(failed: int) -> NoReturn:
    if failed == -1:
        raise MemoryError("no memory for subspace attention's maps")
    raise UlsamError(f"this processor has no {ISA_NAMES[isa]}, which is asked for")


def forward(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    norms: Sequence[Tensor],
    groups: int,
    relu: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `stages.forward`."""
    batch, channels, height, width = x.shape
    logits = x.new_empty((batch, groups, height, width), dtype=torch.float32)
    if not norms:
        y = infer(x, scale, shift, weight, bias, groups, relu, logits)
        if y is not None:
            return y, logits, logits.new_empty(0)
        return stages.forward(_run, x, scale, shift, weight, bias, norms, groups, relu, eps)
    x = dense(x)
    y = empty_like(x)
    moments = logits.new_empty(2 * (channels + groups))
    memory = logits.new_empty(2 * channels + groups + batch * max(2 * channels, groups * max(2, height * width)))
    scale, weight, *vectors = [stages.vector(value) for value in (scale, weight, *norms)]
    job = (x, None, y, None, logits, None, scale, None, weight, None, None, None, None)
    _train("ulsam_forward", _job(job, x, groups, 0, relu), (*vectors, moments, *[None] * 8, memory), eps)
    return y, logits, moments


def backward(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    norms: Sequence[Tensor],
    logits: Tensor,
    moments: Tensor,
    relu: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """See `stages.backward`."""
    x = dense(x)
    dy = dy.contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last)
    batch, channels, groups = x.shape[0], x.shape[1], logits.shape[1]
    dx = empty_like(x)
    scale, weight, *vectors = [stages.vector(value) for value in (scale, weight, *norms)]
    shift = None if norms else stages.shift_of(shift, scale, relu)
    dscale, dshift, dweight = [logits.new_empty(channels) for _ in range(3)]
    dbias = logits.new_empty(groups)
    dnorms = [empty_like(vector) for vector in vectors]
    memory = logits.new_empty(batch * (2 * channels + groups) + 2 * channels + (2 * logits.numel() if norms else 0))
    absent = [] if norms else [None] * 4
    job = (x, dy, None, dx, logits, None, scale, shift, weight, None, None, None, None)
    others = (*vectors, *absent, moments, dscale, dshift, dweight, dbias, *dnorms, *absent, memory)
    _train("ulsam_backward", _job(job, x, groups, 0, relu), others, eps)
    return dx, dscale, dshift, dweight, dbias, dnorms


def _train(function: str, job: Sequence[int], others: Sequence[Tensor | None], eps: float) -> None:
    """Fill a `struct training` of cpu.h and run it."""
    if failed := getattr(LIBRARY, function)(_TRAINING.pack(*job, *_addresses_of(others), eps)):
        _raise(failed)
