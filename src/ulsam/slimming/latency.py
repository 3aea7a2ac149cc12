"""The time that nets take on this machine, each folded and run in turn with the others."""

import statistics
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ulsam.errors import UlsamError, first_line
from ulsam.folding import fold
from ulsam.ops import reference
from ulsam.timing import Call, NameT, times_in_turn

Engine = Literal["eager", "onnxruntime"]

MOST_TURNS = 2000


@dataclass(frozen=True)
class Timing:
    """One net's time: median seconds a call, and the ratio of that to the first net's."""

    seconds: float
    ratio: float
    turns: int


def time_in_turn(calls: Mapping[NameT, Call], seconds: float) -> dict[NameT, Timing]:
    """Time calls in turns, each of them once a turn in shuffled order, so that what slows the machine slows them all.

    Args:
        calls: by name; ratios are to the median of the first one.
        seconds: after which, and at least 15 turns, it ends.

    >>> found = time_in_turn({"short": lambda: sum(range(100)), "long": lambda: sum(range(100_000))}, seconds=0.1)
    >>> found["short"].ratio, found["long"].ratio > 2
    (1.0, True)
    """
    times = times_in_turn(calls, seconds, MOST_TURNS)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    first = medians[next(iter(calls))]
    return {name: Timing(median, median / first, len(times[name])) for name, median in medians.items()}


def call_of(net: nn.Module, input_size: tuple[int, int, int], engine: Engine, batch: int, threads: int) -> Call:
    """A function that runs the folded net (`ulsam.fold`) once on random pictures on the CPU, in float32.

    Args:
        net: is moved to the CPU.
        input_size: C, H, W.
        engine: PyTorch's eager mode, or ONNX Runtime after an export by `torch.onnx.export`.
        batch: pictures a call.
        threads: of ONNX Runtime; eager runs with as many as PyTorch is set to.

    Raises:
        UlsamError: the net cannot be exported.

    >>> call_of(nn.Conv2d(3, 8, 3), (3, 12, 12), "eager", batch=2, threads=1)().shape
    torch.Size([2, 8, 10, 10])
    """
    folded = fold(net.to("cpu"), input_size, channels_last=engine == "eager")
    pictures = torch.randn(batch, *input_size, generator=torch.Generator().manual_seed(0))
    if engine == "eager":
        pictures = pictures.contiguous(memory_format=torch.channels_last)
        return lambda: folded(pictures)
    return _onnx_call(folded, pictures, threads)


def check_engine(engine: Engine) -> None:
    """Raise unless what the engine needs is installed.

    Raises:
        UlsamError: something is missing.

    >>> check_engine("eager")
    """
    if engine == "onnxruntime":
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise UlsamError(f"--engine onnxruntime: {error}; pip install 'ulsam[onnx]'") from error


def _onnx_call(net: nn.Module, pictures: Tensor, threads: int) -> Call:
    import onnxruntime

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own deprecations
            program = torch.export.export(net, (pictures,)).run_decompositions(
                {torch.ops.ulsam.subspace_attention.default: _plain}
            )
            exported = torch.onnx.export(program, (pictures,), dynamo=True, verbose=False)
            assert exported is not None  # a program, where no file is named
    except Exception as error:  # whatever the exporter raises at an operation that it does not know
        raise UlsamError(f"this {type(net).__name__} cannot be exported to ONNX: {first_line(error)}") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        exported.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {session.get_inputs()[0].name: pictures.numpy()}
    return lambda: session.run(None, feed)


def _plain(x: Tensor, *operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Our operator in operations that ONNX knows; inference needs neither the logits nor a choice of the backend."""
    y, moments = reference.subspace_attention(x, *operands[:8])
    return y, moments.new_zeros(x.shape[0], operands[5], *x.shape[2:]), moments
