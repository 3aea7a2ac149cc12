"""What runs exported models: each engine makes its files from a model, and runs what they hold."""

import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ulsam.base.errors import UlsamError, first_line
from ulsam.base.extras import extra
from ulsam.deploy.onnx_graph import check_installed, onnx_graph
from ulsam.deploy.openvino_core import openvino_core
from ulsam.runtime import open_session
from ulsam.training.predict import Logits

RunBatch = Callable[[NDArray[Any]], Logits]


@dataclass(frozen=True)
class ExportedEngine:
    """An exported model.

    Attributes:
        files: what its files hold, by their suffixes, that which is opened last. Those of a folder have its suffix and
            a slash before theirs.
        run: input -> logits [B, classes], by what the files hold; None where nothing on this machine runs them.
        one_by_one: whether it takes no more than one image at a time.
        why_not: nothing runs them, for the user.
    """

    files: Mapping[str, bytes]
    run: RunBatch | None
    one_by_one: bool = False
    why_not: str = ""


def onnx_engine(
    model: nn.Module, example: Tensor, free: Mapping[int, str], metadata: Mapping[str, str], half: bool
) -> ExportedEngine:
    """ONNX, run by ONNX Runtime.

    Args:
        model: folded, contiguous, on the CPU, in eval mode.
        example: an input, 2 images.
        free: dimensions of the input that may differ, and their names.
        metadata: to put into the file.
        half: whether the model computes in float16, as it is given.

    Raises:
        UlsamError: a package is missing, or the model cannot be exported.
    """
    content = _onnx(model, example, free, metadata).SerializeToString()
    return ExportedEngine({".onnx": content}, onnx_run(content))


def onnx_run(content: bytes, threads: int | None = None) -> RunBatch:
    """What runs an ONNX file's content in ONNX Runtime on the CPU, by default with a thread for each core."""
    session = open_session(content, threads)
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


def openvino_engine(
    model: nn.Module, example: Tensor, free: Mapping[int, str], metadata: Mapping[str, str], half: bool
) -> ExportedEngine:
    """OpenVINO's intermediate representation in float32, read from the ONNX graph; as :func:`onnx_engine`.

    It is compared in float32: by itself OpenVINO computes in bfloat16 where the processor can. The metadata is its
    runtime information, under ``ulsam``. With ``half`` the weights are float16.
    """
    check_openvino("`to=openvino`")
    import openvino

    core = openvino_core()
    converted = core.read_model(_onnx(model, example, free, {}).SerializeToString())
    for key, text in metadata.items():
        converted.set_rt_info(text, ["ulsam", key])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.xml")
        openvino.save_model(converted, path, compress_to_fp16=half)
        files = {suffix: path.with_suffix(suffix).read_bytes() for suffix in (".bin", ".xml")}
    written = core.read_model(files[".xml"], files[".bin"])  # not from the folder: files in use stay on Windows
    compiled = core.compile_model(written, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return ExportedEngine(files, lambda images: compiled(images)[0])


def check_openvino(what: str) -> None:
    """Raise unless OpenVINO is installed; ``what`` needs it.

    Raises:
        UlsamError: it is not.
    """
    with extra("openvino", f"{what} needs"):
        import openvino  # noqa: F401


def executorch_engine(
    model: nn.Module, example: Tensor, free: Mapping[int, str], metadata: Mapping[str, str], half: bool
) -> ExportedEngine:
    """ExecuTorch's program for one image at a time, lowered to XNNPACK; as :func:`onnx_engine`.

    Each entry of the metadata is a method without arguments that returns it.

    Raises:
        UlsamError: also for a free size, whose memory could not be planned, and for ``half``.
    """
    if half:
        raise UlsamError("`half=True`: a file for ExecuTorch is in float32 here; leave it out")
    if len(free) > 1:
        raise UlsamError("`dynamic_size=True`: ExecuTorch plans its memory ahead, for one size; leave it out")
    with extra("executorch", "`to=executorch` needs"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
        from executorch.runtime import Runtime
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, (example[:1],)).run_decompositions()
            edge = to_edge_transform_and_lower(
                program, partitioner=[XnnpackPartitioner()], constant_methods=dict(metadata)
            )
            content = bytes(edge.to_executorch().buffer)
    except Exception as error:  # whatever it raises at an operation that it does not know
        raise UlsamError(
            f"this {type(model).__name__} cannot be exported to ExecuTorch: {first_line(error)}"
        ) from error
    method = Runtime.get().load_program(content).load_method("forward")
    return ExportedEngine({".pte": content}, lambda images: _executed(method, images), one_by_one=True)


def _onnx(model: nn.Module, example: Tensor, free: Mapping[int, str], metadata: Mapping[str, str]) -> Any:
    """The model as an ONNX model that passes ONNX's own checks."""
    check_installed("ulsam export")
    import onnx

    graph = onnx_graph(model, example, free)
    onnx.helper.set_model_props(graph, dict(metadata))
    onnx.checker.check_model(graph, full_check=True)
    return graph


def _executed(method: Any, images: NDArray[Any]) -> Logits:
    return np.asarray(method.execute([torch.from_numpy(np.ascontiguousarray(images))])[0])
