"""The CPU backend: calls the C kernels of `cpu.h` by pointer, and does what is left on vectors of C or g values."""

import ctypes
import importlib.util
import os
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from ulsam.ops.reference import dense

DTYPES = (torch.float32, torch.bfloat16)
ISA_NAMES = ("", "base", "AVX2", "AVX-512")

# of cpu.h
LOGITS, MULTIPLY, MAPS_BACK, INPUT_BACK, MOMENTS, ADD = 1, 2, 4, 8, 16, 32
_JOB = struct.Struct("24q")

_forked = False


def _after_fork() -> None:
    """A child has none of its parent's OpenMP threads, and libgomp would wait for them: it works with one."""
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_after_fork)


def _load() -> ctypes.CDLL | None:
    """The compiled kernels, or None where the package was installed without a C compiler.

    They are loaded after PyTorch, so its OpenMP library is also theirs, and both share one pool of threads.
    """
    spec = importlib.util.find_spec("ulsam.ops._cpu")
    if spec is None or spec.origin is None:
        return None
    library = ctypes.CDLL(spec.origin)
    library.ulsam_run.argtypes = [ctypes.c_char_p]
    return library


LIBRARY = _load()
#: The instruction set to use, as an index in `ISA_NAMES`; 0 is the processor's best.
isa = 0


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
    """y like x, the logits [B, groups, H, W] (of batch statistics: before the second BatchNorm), and the moments."""
    x = dense(x)
    batch, channels, height, width = x.shape
    y = torch.empty_like(x)
    logits = torch.empty(batch, groups, height, width)
    scale, weight = _vector(scale), _vector(weight)
    if not norms:
        _run(LOGITS | MULTIPLY, x, groups, relu, y=y, l=logits, scale=scale, shift=shift, weight=weight, bias=bias)
        return y, logits, torch.empty(0)
    means, squares = torch.empty(batch, channels), torch.empty(batch, channels)
    _run(MOMENTS, x, groups, relu, q=means, r=squares)
    mean = means.mean(0)
    variance = (squares / (height * width) + (means - mean).square()).mean(0)
    scale, shift = _folded(scale, norms[0], norms[1], mean, variance, eps)
    _run(LOGITS, x, groups, relu, l=logits, scale=scale, shift=shift, weight=weight)
    variance2, mean2 = torch.var_mean(logits, (0, 2, 3), correction=0)
    _run(MULTIPLY, x, groups, relu, y=y, l=_normed(logits, norms[2], norms[3], mean2, variance2, eps))
    return y, logits, torch.cat([mean, variance, mean2, variance2])


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
    """The gradients of x, scale, shift, weight, bias and norms, all but the first in float32.

    The kernel gives q = sum D * x and r = sum D of each channel, where D is the logits' gradient sent back through the
    maximum; the gradients of a channel's scale, shift and weight are weight * q, weight * r, scale * q + shift * r.
    """
    x = dense(x)
    dy = dy.contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last)
    batch, channels, height, width = x.shape
    groups = logits.shape[1]
    dx = torch.empty_like(x)
    q, r, dbias = torch.empty(batch, channels), torch.empty(batch, channels), torch.empty(batch, groups)
    w, weight = _vector(scale), _vector(weight)
    if not norms:
        stages = MAPS_BACK | INPUT_BACK
        _run(
            stages, x, groups, relu, dy=dy, dx=dx, l=logits, scale=w, shift=shift, weight=weight, q=q, r=r, dbias=dbias
        )
        q, r = q.sum(0), r.sum(0)
        dweight = w * q if shift is None else w * q + _vector(shift) * r
        return dx, weight * q, weight * r, dweight, dbias.sum(0), []

    mean, variance, mean2, variance2 = moments.split([channels, channels, groups, groups])
    scale, shift = _folded(w, norms[0], norms[1], mean, variance, eps)
    normed = _normed(logits, norms[2], norms[3], mean2, variance2, eps)
    dl = torch.empty_like(logits)
    _run(MAPS_BACK, x, groups, relu, dy=dy, l=normed, dl=dl)
    inverse2 = (variance2 + eps).rsqrt()
    standard = (logits - _maps(mean2)) * _maps(inverse2)
    dbeta2, dgamma2 = dl.sum((0, 2, 3)), (dl * standard).sum((0, 2, 3))
    count = batch * height * width
    dl -= _maps(dbeta2 / count) + standard * _maps(dgamma2 / count)
    dl *= _maps(_vector(norms[2]) * inverse2)
    del standard
    _run(INPUT_BACK, x, groups, relu, dy=dy, dx=dx, l=normed, dl=dl, scale=scale, shift=shift, weight=weight, q=q, r=r)
    q, r = q.sum(0), r.sum(0)
    # through scale = gamma * w * inverse and shift = beta - scale * mean, with inverse = (w^2 * variance + eps)^(-1/2)
    gamma, inverse = _vector(norms[0]), (w.square() * variance + eps).rsqrt()
    dshift = weight * r
    dscale = weight * q - mean * dshift
    dmean = -scale * dshift
    dvariance = -0.5 * dscale * gamma * (w * inverse) ** 3
    spread = 2 * dvariance / count
    _run(ADD, x, groups, relu, dx=dx, q=dmean / count - spread * mean, r=spread)
    dw = dscale * gamma * inverse**3 * eps
    none, none2 = torch.zeros_like(mean), torch.zeros_like(mean2)  # a bias before BatchNorm changes nothing
    return dx, dw, none, scale * q + shift * r, none2, [dscale * w * inverse, dshift, dgamma2, dbeta2]


def _run(
    stages: int,
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
    shift, bias = shift if shift is None else _vector(shift), bias if bias is None else _vector(bias)
    tensors = (x, dy, y, dx, l, dl, scale, shift, weight, bias, q, r, dbias)
    job = _JOB.pack(
        *[0 if tensor is None else tensor.data_ptr() for tensor in tensors],
        *x.shape,
        groups,
        stages,
        relu,
        not x.is_contiguous(),
        x.dtype == torch.bfloat16,
        1 if _forked else torch.get_num_threads(),
        isa,
    )
    assert LIBRARY is not None
    failed = LIBRARY.ulsam_run(job)
    if failed == -1:
        raise MemoryError("no memory for subspace attention's maps")
    if failed:
        raise RuntimeError(f"this processor has no {ISA_NAMES[isa]}")


def _vector(values: Tensor) -> Tensor:
    return values.detach().float().contiguous()


def _maps(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


def _folded(
    w: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Scale and shift that are BatchNorm of ``w * x``, where x has this mean and variance."""
    scale = _vector(gamma) * w * (w.square() * variance + eps).rsqrt()
    return scale, _vector(beta) - scale * mean


def _normed(logits: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
    scale = _vector(gamma) * (variance + eps).rsqrt()
    return logits * _maps(scale) + _maps(_vector(beta) - scale * mean)
