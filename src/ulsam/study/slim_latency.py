"""The time that models take on this machine, each folded and run in turn with the others."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from ulsam.base.timing import Call, NameT, times_in_turn
from ulsam.deploy.engines import onnx_run
from ulsam.deploy.onnx_graph import check_installed, onnx_graph
from ulsam.surgery.fold import fold

Engine = Literal["eager", "onnxruntime"]

MOST_TURNS = 2000


@dataclass(frozen=True)
class Timing:
    """One model's time: median seconds a call, and the ratio of that to the first model's."""

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


def call_of(model: nn.Module, input_size: tuple[int, int, int], engine: Engine, batch: int, threads: int) -> Call:
    """A function that runs the folded model (`ulsam.fold`) once on random images on the CPU, in float32.

    Args:
        model: is moved to the CPU.
        input_size: C, H, W.
        engine: PyTorch's eager mode, or ONNX Runtime after an export by `torch.onnx.export`.
        batch: images a call.
        threads: of ONNX Runtime; eager runs with as many as PyTorch is set to.

    Raises:
        UlsamError: the model cannot be exported.

    >>> call_of(nn.Conv2d(3, 8, 3), (3, 12, 12), "eager", batch=2, threads=1)().shape
    torch.Size([2, 8, 10, 10])
    """
    folded = fold(model.to("cpu"), input_size, channels_last=engine == "eager")
    images = torch.randn(batch, *input_size, generator=torch.Generator().manual_seed(0))
    if engine == "eager":
        images = images.contiguous(memory_format=torch.channels_last)
        return lambda: folded(images)
    run = onnx_run(onnx_graph(folded, images).SerializeToString(), threads)
    feed = images.numpy()
    return lambda: run(feed)


def check_engine(engine: Engine) -> None:
    """Raise unless what the engine needs is installed.

    Raises:
        UlsamError: something is missing.

    >>> check_engine("eager")
    """
    if engine == "onnxruntime":
        check_installed("`engine=onnxruntime`")
