"""A model as an ONNX graph, in which a ULSAM layer is at most 12 operations, whatever sizes are left open."""

import ast
import copy
import warnings
from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ulsam.base.errors import UlsamError, first_line
from ulsam.base.extras import extra
from ulsam.layer.ops.reference import softmax_over_maps
from ulsam.layer.ulsam import ULSAM
from ulsam.runtime import import_onnxruntime
from ulsam.surgery.layer_host import LayerHost, attach_layer, host_class

OPSET = 18
"""Version of ONNX's operators (ONNX 1.13, ONNX Runtime 1.14)."""

ATTENTION = "subspace_attention"
"""In the name of every node of a ULSAM layer, behind the layer's own: ``blocks.5.2/subspace_attention/Conv``."""

MAX_WHOLE = 16
"""Up to so many subspaces share a convolution: ONNX Runtime computes 16 channels at a time, even if there are fewer."""


def check_installed(what: str) -> None:
    """Raise unless the packages that write and run ONNX files are installed; ``what`` needs them.

    Raises:
        UlsamError: one is missing.

    >>> check_installed("ulsam export")
    """
    with extra("onnx", f"{what} needs"):
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401

        import_onnxruntime()


@torch.no_grad()
def onnx_graph(model: nn.Module, example: Tensor, free: Mapping[int, str] | None = None) -> Any:
    """``model`` in eval mode as an `onnx.ModelProto` with one input and the output ``logits``, by PyTorch's exporter.

    It holds no trace of the files that the code lies in. Nodes are named by the module that they come from.

    Args:
        model: folded (`ulsam.fold`), contiguous and on the CPU.
        example: an input; at least 2 along each free dimension.
        free: dimensions of the input that may differ from call to call, and what the file calls them.

    Raises:
        UlsamError: PyTorch cannot export the model, or not with these dimensions free.

    >>> graph = onnx_graph(nn.Conv2d(3, 8, 3).eval(), torch.zeros(2, 3, 9, 9), {0: "batch"}).graph
    >>> [(node.name, node.op_type) for node in graph.node], graph.output[0].type.tensor_type.shape.dim[0].dim_param
    ([('Conv', 'Conv')], 'batch')
    """
    names = dict(free or {})
    model, layers = with_attention(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own deprecations
            program = torch.export.export(
                model,
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
            )
            assert made is not None  # a program, where no file is named
    except Exception as error:  # whatever the exporter raises at an operation that it does not know
        sizes = f" with a free {', '.join(names.values())}" if names else ""
        hint = "; is it for one size? then leave that fixed" if len(names) > 1 else ""
        raise UlsamError(
            f"the model cannot be exported to ONNX{sizes}: {first_line(error).rstrip(':')}{hint}"
        ) from error
    return _tidied(made.model_proto, layers)


class _Attention(nn.Module):
    """A ULSAM layer for ONNX Runtime: 8 to 12 operations, and weights that need no computing.

    The two vectors are 1x1 convolutions. A third one, of ones, gives each channel the map of its subspace, plus 1: so
    no map is taken apart or put together. A grouped convolution makes ONNX Runtime leave its blocked layout, which
    takes longer than the arithmetic: the second and third convolution are whole ones, with zeros where a channel is not
    of the subspace.
    """

    def __init__(self, layer: ULSAM) -> None:
        super().__init__()
        channels, groups = layer.channels, layer.groups
        parts = 1 if groups <= MAX_WHOLE else groups
        whole = groups // parts  # subspaces a convolution
        mask = torch.eye(whole).repeat_interleave(channels // groups, 1)  # [subspaces, channels] of a part
        self.relu = layer.form != "equations"
        self.depthwise = layer.depthwise
        self.pointwise = nn.Conv2d(channels, groups, 1, groups=parts)
        weight = layer.pointwise.weight.view(parts, 1, -1) * mask
        self.pointwise.weight = nn.Parameter(weight.reshape(groups, -1, 1, 1))
        self.pointwise.bias = layer.pointwise.bias
        self.spread = nn.Conv2d(groups, channels, 1, groups=parts)
        self.spread.weight = nn.Parameter(mask.T.repeat(parts, 1)[:, :, None, None].contiguous())
        self.spread.bias = nn.Parameter(torch.ones(channels))
        self.to(layer.pointwise.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = self.depthwise(x)
        if self.relu:
            h = F.relu(h)
        logits = self.pointwise(F.max_pool2d(h, 3, stride=1, padding=1))
        if self.relu:
            logits = F.relu(logits)
        height, width = logits.shape[2:]
        if isinstance(height, int) and isinstance(width, int):
            maps = logits.flatten(2).softmax(-1).reshape(-1, logits.shape[1], height, width)
        else:  # with a free size, a reshape would be a dozen operations on sizes
            maps = softmax_over_maps(logits)
        return x * cast(Tensor, self.spread(maps))


def with_attention(model: nn.Module) -> tuple[nn.Module, set[str]]:
    """A copy of a folded model with plain convolutions in the place of its ULSAM layers, and the names of these.

    >>> model, names = with_attention(nn.Sequential(nn.ReLU(), ULSAM(8)))
    >>> names, [type(part).__name__ for part in model[1].children()]
    ({'1'}, ['Conv2d', 'Conv2d', 'Conv2d'])
    """
    model = copy.deepcopy(model)
    layers = {name: part for name, part in model.named_modules() if host_class(part) is ULSAM}
    names = set()
    for name, layer in layers.items():
        if cast(ULSAM, layer).form != "released" and name and cast(ULSAM, layer).is_standard():
            made = _Attention(cast(ULSAM, layer)).train(layer.training)
            if isinstance(layer, LayerHost):
                attach_layer(made, layer.ulsam)
            model.set_submodule(name, made)
            names.add(name)
    return model, names


def _tidied(model: Any, layers: Collection[str]) -> Any:
    """The model with nodes named by module and operation, and nothing else of the exporter's notes.

    ``layers`` are the names of the ULSAM layers.
    """
    taken: dict[str, int] = {}
    for node in model.graph.node:
        notes = {entry.key: entry.value for entry in node.metadata_props}
        scopes: list[str] = ast.literal_eval(notes.get("pkg.torch.onnx.name_scopes", "[]"))
        module = ["", "", *scopes][-2]
        layer = next((name for name in layers if module == name or module.startswith(f"{name}.")), None)
        words = [module, node.op_type] if layer is None else [layer, ATTENTION, node.op_type]
        name = "/".join(word for word in words if word)
        taken[name] = taken.get(name, 0) + 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name]}"
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
    return model


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
