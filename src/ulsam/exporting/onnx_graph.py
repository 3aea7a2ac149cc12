"""A net as an ONNX graph, in which a ULSAM layer is at most 12 operations, whatever sizes are left open."""

import ast
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ulsam.errors import UlsamError, first_line

OPSET = 18
"""Version of ONNX's operators (ONNX 1.13, ONNX Runtime 1.14)."""

ATTENTION = "subspace_attention"
"""In the name of every node of a ULSAM layer, behind the layer's own: ``blocks.5.2/subspace_attention/Conv``."""


MOST_WHOLE = 16
"""Up to so many subspaces share a convolution: ONNX Runtime computes 16 channels at a time, even if there are fewer."""


def check_installed(what: str) -> None:
    """Raise unless the packages that write and run ONNX files are installed; ``what`` needs them.

    Raises:
        UlsamError: one is missing.

    >>> check_installed("ulsam export")
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UlsamError(f"{what}: {error}; pip install 'ulsam[onnx]'") from error


@torch.no_grad()
def onnx_graph(net: nn.Module, example: Tensor, free: Mapping[int, str] | None = None) -> Any:
    """``net`` in eval mode as an `onnx.ModelProto` with one input and the output ``logits``, by PyTorch's exporter.

    It holds no trace of the files that the code lies in. Nodes are named by the module that they come from.

    Args:
        net: folded (`ulsam.fold`), contiguous and on the CPU.
        example: an input; at least 2 along each free dimension.
        free: dimensions of the input that may differ from call to call, and what the file calls them.

    Raises:
        UlsamError: PyTorch cannot export the net, or not with these dimensions free.

    >>> graph = onnx_graph(nn.Conv2d(3, 8, 3).eval(), torch.zeros(2, 3, 9, 9), {0: "batch"}).graph
    >>> [(node.name, node.op_type) for node in graph.node], graph.output[0].type.tensor_type.shape.dim[0].dim_param
    ([('Conv', 'Conv')], 'batch')
    """
    names = dict(free or {})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own deprecations
            program = torch.export.export(
                net,
                (example,),
                dynamic_shapes=(dict.fromkeys(names, torch.export.Dim.DYNAMIC),),  # what is too small may be refused
                prefer_deferred_runtime_asserts_over_guards=True,  # or a map of one pixel would be refused
            )
            made = torch.onnx.export(
                program,
                (example,),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                dynamic_shapes=(names,),
                output_names=["logits"],
                custom_translation_table={torch.ops.ulsam.subspace_attention.default: _attention},
            )
            assert made is not None  # a program, where no file is named
    except Exception as error:  # whatever the exporter raises at an operation that it does not know
        sizes = f" with a free {', '.join(names.values())}" if names else ""
        hint = "; is it for one size? then leave that fixed" if len(names) > 1 else ""
        raise UlsamError(f"the net cannot be exported to ONNX{sizes}: {first_line(error).rstrip(':')}{hint}") from error
    model = _tidied(made.model_proto)
    _fold_weights(model.graph)
    return model


def _attention(
    x: Any,
    scale: Any,
    shift: Any,
    weight: Any,
    bias: Any,
    norms: Any,
    groups: int,
    relu: bool,
    eps: float,
    backend: str,
) -> tuple[Any, Any, Any]:
    """Our operator, with the maps of its definition in `ulsam.ops.reference`, as 8 to 11 nodes of ONNX.

    The two vectors are 1x1 convolutions. A third one, of ones, gives each channel the map of its subspace, plus 1: so
    no map is taken apart or put together. Softmax shifts by the maximum itself, and a 0 in Reshape copies a dimension.

    A grouped convolution makes ONNX Runtime leave its blocked layout, which takes longer than the arithmetic: the
    second and third convolution are whole ones, with zeros where a channel is not of the subspace.
    """
    from onnxscript import opset18 as op

    channels = x.shape[1]
    parts = 1 if groups <= MOST_WHOLE else groups
    whole = groups // parts  # subspaces a convolution
    mask = np.kron(np.eye(whole), np.ones(channels // groups))  # [subspaces, channels] of a part: who belongs to whom

    def reshaped(value: Any, *shape: int) -> Any:
        return op.Reshape(value, op.Constant(value_ints=list(shape)))

    def constant(values: Any) -> Any:
        from onnx.numpy_helper import from_array

        return op.Constant(value=from_array(np.asarray(values, np.float32)))

    def convolved(value: Any, kernel: Any, offset: Any, parts: int) -> Any:
        return op.Conv(value, kernel, group=parts) if offset is None else op.Conv(value, kernel, offset, group=parts)

    h = convolved(x, reshaped(scale, channels, 1, 1, 1), shift, channels)
    if relu:
        h = op.Relu(h)
    h, _ = op.MaxPool(h, kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[1, 1])
    weights = op.Mul(reshaped(weight, parts, 1, channels // parts), constant(mask))
    logits = convolved(h, reshaped(weights, groups, channels // parts, 1, 1), bias, parts)
    if relu:
        logits = op.Relu(logits)
    maps = op.Softmax(reshaped(logits, 0, 0, -1), axis=-1)
    height, width = x.shape[2:]
    fixed = isinstance(height, int) and isinstance(width, int)
    maps = reshaped(maps, 0, groups, height, width) if fixed else op.Reshape(maps, op.Shape(logits))
    spread = constant(np.tile(mask.T, (parts, 1))[:, :, None, None])
    y = op.Mul(x, op.Conv(maps, spread, constant(np.ones(channels)), group=parts))
    return y, logits, constant([])  # inference has no moments


def _tidied(model: Any) -> Any:
    """The model with nodes named by module and operation, and nothing else of the exporter's notes."""
    taken: dict[str, int] = {}
    for node in model.graph.node:
        notes = {entry.key: entry.value for entry in node.metadata_props}
        scopes: list[str] = ast.literal_eval(notes.get("pkg.torch.onnx.name_scopes", "[]"))
        module, call = ["", "", *scopes][-2:]
        words = [module, ATTENTION if call.startswith(ATTENTION) else "", node.op_type]
        name = "/".join(word for word in words if word)
        taken[name] = taken.get(name, 0) + 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name]}"
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
    return model


def _fold_weights(graph: Any) -> None:
    """Compute what the layers make of their weights alone; the exporter does so for small ones only."""
    from onnx.numpy_helper import from_array, to_array

    values = {tensor.name: to_array(tensor) for tensor in graph.initializer}
    for node in list(graph.node):
        if ATTENTION in node.name and node.op_type in ("Mul", "Reshape") and {*node.input} <= values.keys():
            one, other = (values[name] for name in node.input)
            made = one * other if node.op_type == "Mul" else one.reshape(other)
            values[node.output[0]] = made
            graph.initializer.append(from_array(made, node.output[0]))
            graph.node.remove(node)
    drop_unused(graph)


def drop_unused(graph: Any) -> None:
    """Take weights that no node of an ONNX graph reads out of it.

    >>> graph = onnx_graph(nn.Conv2d(3, 8, 1).eval(), torch.zeros(2, 3, 4, 4)).graph
    >>> weights = len(graph.initializer)
    >>> del graph.node[:]
    >>> drop_unused(graph)
    >>> weights, len(graph.initializer)
    (2, 0)
    """
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
