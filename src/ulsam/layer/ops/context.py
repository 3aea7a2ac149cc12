"""Who looks on while the operator runs: a compiler, an exporter, a profiler, a transformation of its gradients."""

from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._autograd import _profiler_enabled
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_exporting

from ulsam.layer.ops import cpu


def is_captured() -> bool:
    """Whether a program is being made that runs without this package: `torch.export`, `torch.jit.trace`, ONNX.

    It then holds PyTorch's own operators in the place of ours. `torch.compile` keeps ours, as its program lives here.
    """
    return is_exporting() or _get_tracing_state() is not None


def is_plain(x: Tensor) -> bool:
    """Whether nothing looks on: no compiler, tracer, profiler, mode or subclass that has to see an operator."""
    return not is_watched() and is_memory(x)  # a compiler cannot look into the latter


def is_watched() -> bool:
    """Whether a compiler, tracer, mode, transformation or profiler has to see an operator."""
    return bool(
        (is_compiling() or _get_tracing_state())
        or (_len_torch_dispatch_stack() or _len_torch_function_stack())
        or (peek_interpreter_stack() or _profiler_enabled() or forward_ad._current_level >= 0)
    )


def is_memory(x: Tensor | None) -> bool:
    """Whether the values of ``x``, if there is one, are in this memory as they are, not still to be negated."""
    return x is None or (type(x) in cpu.PLAIN and x.is_cpu and not x.is_neg())


def is_transformed() -> bool:
    """Inside `torch.func` or forward-mode differentiation: these follow the definition, and cannot look into others."""
    return not is_compiling() and (peek_interpreter_stack() is not None or forward_ad._current_level >= 0)
