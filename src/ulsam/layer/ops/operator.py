"""The operator `ulsam::subspace_attention` as PyTorch knows it, and the choice of the backend that computes it."""

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_exporting

from ulsam.base.errors import UlsamError
from ulsam.layer.ops import cpu, reference
from ulsam.layer.ops.context import is_captured, is_memory, is_plain, is_transformed, is_watched

Backend = Literal["reference", "cpu", "triton"]
BACKENDS = get_args(Backend)
FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])
_CPU = (None, "cpu")


def _from_environment() -> Backend | None:
    name: Any = os.environ.get("ULSAM_BACKEND") or None
    if name not in (None, *BACKENDS):
        raise UlsamError(f"ULSAM_BACKEND={name}: there is no such backend; valid: {', '.join(BACKENDS)}")
    return name


def _constant(function: FunctionT) -> FunctionT:
    """As `torch.compiler.assume_constant_result`, which imports the compiler, and Triton, at once."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


_forced: Any = "unread"  # what ULSAM_BACKEND names, or None; "unread" keeps `infer` away until it is known


@_constant
def forced() -> Backend | None:
    """The backend that ``ULSAM_BACKEND`` names; it is read once, when it is first needed.

    Raises:
        UlsamError: no such backend.
    """
    global _forced
    if _forced == "unread":
        _forced = _from_environment()
    return _forced


@_constant
def _interpreted() -> bool:
    """Whether Triton takes tensors of the CPU too."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def subspace_attention(
    x: Tensor,
    scale: Tensor,
    weight: Tensor,
    groups: int,
    *,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    norms: Sequence[Tensor] = (),
    relu: bool = False,
    eps: float = 1e-5,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """x plus x times the spatial attention map of its subspace (Saini et al., WACV 2020, section 3).

    With C channels in ``groups`` subspaces, for each subspace::

        h = relu?(norm1?(scale * x + shift))
        l = relu?(norm2?(sum over its channels of weight * maxpool3x3(h) + bias))
        y = x + x * softmax(l over H*W)

    Any memory layout; y has that of x (contiguous where x is neither contiguous nor channels_last). The gradient of
    the maximum goes to the first one in row-major order, and NaN spreads, as in PyTorch. Under autocast x keeps its
    dtype. The maps are computed in float32 (float64 for float64), whatever the dtype of x.

    Args:
        x: [B, C, H, W].
        scale, shift: [C]; a convolution's [C, 1, 1, 1] will do for scale.
        weight, bias: [C], also as [groups, C / groups, 1, 1], and [groups].
        norms: weight [C] and bias [C] of norm1, weight [groups] and bias [groups] of norm2: BatchNorm over this
            batch's statistics, in which ``shift`` and ``bias`` cancel out; empty for none.
        eps: of both norms.
        backend: None chooses the fastest one that serves ``x``, as does ``ULSAM_BACKEND`` for all calls. A backend
            that cannot serve ``x`` leaves it to the reference: `which_backend` says so.

    Returns:
        y [B, C, H, W], and with norms the moments, float32 [2 * C + 2 * groups]: mean and biased variance of x's
        channels, then of the logits' (without bias).

    Raises:
        UlsamError: no such backend, x is no map [B, C, H, W], ``groups`` does not divide C, or an operand is of another
            size or on another device.

    >>> x = torch.randn(2, 8, 5, 5)
    >>> y, _ = subspace_attention(x, torch.ones(8), torch.ones(8), groups=4)
    >>> (y / x - 1).sum((2, 3))[0]  # each channel's map sums to 1
    tensor([1.0000, 1.0000, 1.0000, 1.0000, 1.0000, 1.0000, 1.0000, 1.0000])
    """
    _check(x, scale, shift, weight, bias, norms, groups)
    chosen, _ = which_backend(x, backend)
    missed = cpu.LIBRARY is None and x.is_cpu and x.dtype in cpu.DTYPES and (backend or forced()) != "reference"
    if missed and not is_exporting():
        _warn()
    others = (scale, shift, weight, bias, *norms)
    transformed = chosen == "reference" or is_transformed() or is_captured()
    if not (transformed or chosen != "cpu" or is_watched()) and all(map(is_memory, (x, *others))):
        return _UndispatchedFunction.apply(x, scale, shift, weight, bias, groups, relu, eps, *norms)
    operands = (x, scale.flatten(), shift, weight.flatten(), bias, list(norms), groups, relu, eps)
    if transformed:
        return reference.subspace_attention(*operands)
    y, _, moments = torch.ops.ulsam.subspace_attention.default(*operands, backend or "")
    return y, moments


_warned = False
_INSIDE = ("ulsam", "torch", "torchvision", "timm")  # packages whose lines do not help a user


def _warn() -> None:
    """Say once that the kernels are missing, at the user's line that led here."""
    global _warned
    if _warned:
        return
    _warned = True
    frame, level = sys._getframe(1), 2
    while frame.f_back and str(frame.f_globals.get("__name__")).partition(".")[0] in _INSIDE:
        frame, level = frame.f_back, level + 1
    message = f"ULSAM runs in plain PyTorch, several times slower than its C kernels: {cpu.WHY_NONE}"
    warnings.warn(message, RuntimeWarning, stacklevel=level)


if cpu.LIBRARY is None:  # `torch.compile` then calls it while it compiles, rather than looking into it
    _warn = _constant(_warn)


def infer(
    x: Tensor, scale: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor | None, groups: int, relu: bool
) -> Tensor | None:
    """:func:`subspace_attention` without gradients or norms past PyTorch's dispatcher, or None where it is needed.

    That function says what the operands may be; the kernels check their sizes. For a small map the dispatcher takes
    longer than all the rest.
    """
    if is_grad_enabled() or _forced not in _CPU or not is_plain(x) or x.ndim != 4:
        return None
    return cpu.infer(x, scale, shift, weight, bias, groups, relu)


def _check(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    norms: Sequence[Tensor],
    groups: int,
) -> None:
    """Refuse what the kernels would read beyond its end."""
    if x.ndim != 4:
        tokens = ", which looks like tokens [B, N, C]" if x.ndim == 3 else ""
        raise UlsamError(f"subspace attention takes a feature map [B, C, H, W], not {list(x.shape)}{tokens}")
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        raise UlsamError(f"groups={groups} does not divide {channels} channels")
    if len(norms) not in (0, 4):
        raise UlsamError(f"norms are the weight and bias of two BatchNorms, not {len(norms)} tensors")
    sizes = (channels, channels, channels, groups, channels, channels, groups, groups)
    for value, size in zip((scale, shift, weight, bias, *norms), sizes, strict=False):
        if value is not None and (value.numel() != size or value.device != x.device):
            raise UlsamError(
                f"an operand has {value.numel()} values on {value.device}, but the map needs {size} on {x.device}"
            )


def which_backend(x: Tensor, backend: str | None = None) -> tuple[Backend, str]:
    """The backend that :func:`subspace_attention` uses for ``x``, and why.

    Raises:
        UlsamError: no such backend.

    >>> which_backend(torch.ones(1, 8, 4, 4, dtype=torch.float64))
    ('reference', 'the cpu backend takes float32 and bfloat16, not float64')
    """
    wanted: Any = backend or forced()
    if wanted not in (None, *BACKENDS):
        raise UlsamError(f"there is no backend {wanted!r}; valid: {', '.join(BACKENDS)}")
    if wanted == "reference":
        return "reference", "asked for"
    chosen: Backend = wanted or ("triton" if x.device.type == "cuda" else "cpu")
    refusal = _why_not_cpu(x) if chosen == "cpu" else _why_not_triton(x)
    if refusal:
        return "reference", refusal
    return chosen, "asked for" if wanted else "the fastest on this device"


def _why_not_cpu(x: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"the cpu backend does not run on {x.device.type}"
    if refusal := _why_not_dtype("cpu", cpu.DTYPES, x):
        return refusal
    return f"the C kernels are not there: {cpu.WHY_NONE}" if cpu.LIBRARY is None else None


def _why_not_triton(x: Tensor) -> str | None:
    if x.device.type != "cuda" and not (x.device.type == "cpu" and _interpreted()):
        return f"the triton backend does not run on {x.device.type}"
    kernels = _triton()
    return kernels if isinstance(kernels, str) else _why_not_dtype("triton", kernels.DTYPES, x)


def _triton() -> ModuleType | str:
    """The backend, or why there is none. It takes long to import: not before a tensor is where it runs."""
    try:
        from ulsam.layer.ops import triton_kernels
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    return triton_kernels


def _why_not_dtype(backend: str, dtypes: Sequence[torch.dtype], x: Tensor) -> str | None:
    if x.dtype in dtypes:
        return None
    *names, last, given = [str(dtype).removeprefix("torch.") for dtype in (*dtypes, x.dtype)]
    return f"the {backend} backend takes {', '.join(names)} and {last}, not {given}"


def _module(x: Tensor, wanted: str) -> Any:
    """That with the `forward` and `backward` of the backend."""
    backend, _ = which_backend(x, wanted)
    if backend == "triton":
        return _triton()
    return cpu if backend == "cpu" else reference


def _forward(x: Tensor, *operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, *operands[:6])
    return _module(x, operands[-1]).forward(x, *operands[:-1])


def _backward(dy: Tensor, x: Tensor, *operands: Any) -> tuple[Any, ...]:
    scale, shift, weight, bias, norms, logits, moments = operands[:7]
    batch, groups, *size = logits.shape
    _check(x, scale, shift, weight, bias, norms, groups)
    whole = dy.shape == x.shape and (batch, *size) == (x.shape[0], *x.shape[2:])
    if not whole or moments.numel() != (2 * (x.shape[1] + groups) if norms else 0):
        raise UlsamError(f"dy {list(dy.shape)} or what forward kept are not those of the map {list(x.shape)}")
    return _module(x, operands[-1]).backward(dy, x, *operands[:-1])


def _fake_forward(x: Tensor, *operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    norms, groups = operands[4:6]
    logits = x.new_empty((x.shape[0], groups, *x.shape[2:]), dtype=reference.accumulation(x.dtype))
    moments = logits.new_empty(2 * (x.shape[1] + groups) if norms else 0)
    return torch.empty_like(reference.dense(x)), logits, moments


def _fake_backward(dy: Tensor, x: Tensor, *operands: Any) -> tuple[Any, ...]:
    norms, logits = operands[4:6]
    channels, groups = x.shape[1], logits.shape[1]
    *vectors, bias = [logits.new_empty(size) for size in (channels, channels, channels, groups)]
    dnorms = [logits.new_empty(size) for size in (channels, channels, groups, groups)] if norms else []
    return torch.empty_like(reference.dense(x)), *vectors, bias, dnorms


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, scale, shift, weight, bias, norms, _, *ctx.rest = inputs
    _, logits, moments = output
    ctx.mark_non_differentiable(logits, moments)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, scale, shift, weight, bias, logits, moments, *norms)


def _gradients(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Any, ...]:
    """One gradient for each argument of the operator."""
    x, scale, shift, weight, bias, logits, moments, *norms = ctx.saved_tensors
    if dy is None:
        return *[None] * 5, [None] * len(norms), *[None] * 4
    dx, *vectors, dnorms = torch.ops.ulsam.subspace_attention_backward.default(
        dy, x, scale, shift, weight, bias, norms, logits, moments, *ctx.rest
    )
    return dx, *_like((scale, shift, weight, bias), vectors), _like(norms, dnorms), None, None, None, None


def _like(values: Sequence[Tensor | None], gradients: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients of those values that there are, in their dtypes and shapes."""
    pairs = zip(gradients, values, strict=True)
    return [None if value is None else _fitted(gradient, value) for gradient, value in pairs]


def _fitted(gradient: Tensor, value: Tensor) -> Tensor:
    if gradient.dtype is not value.dtype:
        gradient = gradient.to(value.dtype)
    return gradient if value.ndim == 1 else gradient.view(value.shape)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    dy, x, scale, shift, weight, bias, norms, logits, _, *ctx.rest = inputs
    ctx.groups = logits.shape[1]
    ctx.save_for_backward(dy, x, scale, shift, weight, bias, *norms)


def _second(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
    """Second derivatives: those of the definition's first ones."""
    relu, eps, _ = ctx.rest
    leaves: list[Any]
    with torch.enable_grad():
        dy, *leaves = [value if value is None else value.detach().requires_grad_() for value in ctx.saved_tensors]
        x, scale, shift, weight, bias, *norms = leaves
        y, _ = reference.subspace_attention(x, scale, shift, weight, bias, norms, ctx.groups, relu, eps)
        present = [value for value in leaves if value is not None]
        first = torch.autograd.grad(y, present, dy, create_graph=True)
        *given, dnorms = gradients
        wanted = [gradient for value, gradient in zip(leaves, (*given, *dnorms), strict=True) if value is not None]
        pairs = [(a, b) for a, b in zip(first, wanted, strict=True) if b is not None and a.requires_grad]
        outputs, weights = [a for a, _ in pairs], [b.to(a.dtype).view_as(a) for a, b in pairs]
        found = torch.autograd.grad(outputs, [dy, *present], weights, allow_unused=True)
    ddy, *rest = found
    second = iter(rest)
    dleaves = [None if value is None else next(second) for value in leaves]
    return ddy, *dleaves[:5], dleaves[5:], *[None] * 5


class _UndispatchedFunction(torch.autograd.Function):
    """The operator on a CPU past PyTorch's dispatcher, which takes longer than a small map does."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        x, scale, shift, weight, bias, groups, relu, eps, *norms = arguments
        y, logits, moments = cpu.forward(x, scale, shift, weight, bias, norms, groups, relu, eps)
        ctx.rest = relu, eps
        ctx.mark_non_differentiable(moments)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, scale, shift, weight, bias, logits, moments, *norms)
        return y, moments

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Any, ...]:
        x, scale, shift, weight, bias, logits, moments, *norms = ctx.saved_tensors
        if dy is None:
            return (None,) * (8 + len(norms))
        backward: Any = cpu.backward
        rest = ctx.rest
        if is_grad_enabled() or not is_plain(dy):  # second derivatives, and what else may look on
            backward, rest = torch.ops.ulsam.subspace_attention_backward.default, (*rest, "cpu")
        dx, *vectors, dnorms = backward(dy, x, scale, shift, weight, bias, norms, logits, moments, *rest)
        dvectors, dnorms = _like((scale, shift, weight, bias), vectors), _like(norms, dnorms)
        return dx, *dvectors, None, None, None, *dnorms


_OPERANDS = "Tensor x, Tensor scale, Tensor? shift, Tensor weight, Tensor? bias, Tensor[] norms"
torch.library.define(
    "ulsam::subspace_attention",
    f"({_OPERANDS}, int groups, bool relu, float eps, str backend) -> (Tensor y, Tensor logits, Tensor moments)",
)
torch.library.define(
    "ulsam::subspace_attention_backward",
    f"(Tensor dy, {_OPERANDS}, Tensor logits, Tensor moments, bool relu, float eps, str backend) -> "
    "(Tensor dx, Tensor dscale, Tensor dshift, Tensor dweight, Tensor dbias, Tensor[] dnorms)",
)
torch.library.impl("ulsam::subspace_attention", "CompositeExplicitAutograd", _forward)
torch.library.impl("ulsam::subspace_attention_backward", "CompositeExplicitAutograd", _backward)
torch.library.register_fake("ulsam::subspace_attention", _fake_forward)
torch.library.register_fake("ulsam::subspace_attention_backward", _fake_backward)
torch.library.register_autograd("ulsam::subspace_attention", _gradients, setup_context=_save)
torch.library.register_autograd("ulsam::subspace_attention_backward", _second, setup_context=_save_backward)
