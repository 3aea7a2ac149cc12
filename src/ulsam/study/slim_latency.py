"""The time that models take on this machine, each folded and run in turn with the others."""

from typing import Literal

import torch
from torch import nn

from ulsam.base.timing import Call
from ulsam.deploy.engines import onnx_run
from ulsam.deploy.onnx_graph import check_installed, onnx_graph
from ulsam.surgery.fold import fold

LatencyEngine = Literal["eager", "onnxruntime"]


def call_of(
    model: nn.Module, input_size: tuple[int, int, int], engine: LatencyEngine, batch: int, threads: int
) -> Call:
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


def check_engine(engine: LatencyEngine) -> None:
    """Raise unless what the engine needs is installed.

    Raises:
        UlsamError: something is missing.

    >>> check_engine("eager")
    """
    if engine == "onnxruntime":
        check_installed("`engine=onnxruntime`")
