"""A Core ML package computed in PyTorch, from the program and the weights in its files: its own engine is a Mac's."""

from pathlib import Path
from typing import Any

import coremltools
import torch
import torch.nn.functional as F
from coremltools.converters.mil.frontend.milproto.load import load
from torch import Tensor


def program(package: Path) -> Any:
    """The main function of the package, as Core ML's tools read it back."""
    opened = coremltools.models.MLModel(str(package), skip_model_load=True)
    spec = opened.get_spec()
    return load(spec, spec.specificationVersion, opened.weights_dir).functions["main"]


def described(package: Path) -> Any:
    """The inputs, outputs and metadata of the package."""
    return coremltools.models.MLModel(str(package), skip_model_load=True).get_spec().description


def run(package: Path, x: Tensor) -> Tensor:
    """What the package's operations make of ``x`` [1, 3, H, W], each of them by its definition in Core ML's manual."""
    main = program(package)
    (given,) = main.inputs
    known: dict[str, Tensor] = {given: x}

    def value(var: Any) -> Any:
        if var.name in known:
            return known[var.name]
        return torch.tensor(var.val) if hasattr(var.val, "dtype") and var.val.shape else var.val

    for op in main.operations:
        if op.op_type != "const":
            known[op.outputs[0].name] = _computed(op.op_type, {key: value(one) for key, one in op.inputs.items()})
    return known[main.outputs[0].name]


def _computed(kind: str, given: dict[str, Any]) -> Tensor:
    x = given["x"]
    match kind:
        case "cast":
            return x.to({"fp16": torch.float16, "fp32": torch.float32}[given["dtype"]])
        case "batch_norm":
            return F.batch_norm(
                x, given["mean"], given["variance"], given["gamma"], given["beta"], eps=float(given["epsilon"])
            )
        case "conv":
            left = _padded(x, given, 0.0)
            dilations, groups = given["dilations"].tolist(), int(given["groups"])
            strides = given["strides"].tolist()
            return F.conv2d(left, given["weight"], given.get("bias"), strides, 0, dilations, groups)
        case "max_pool":
            assert not given["ceil_mode"]
            return F.max_pool2d(
                _padded(x, given, -torch.inf), given["kernel_sizes"].tolist(), given["strides"].tolist()
            )
        case "linear":
            return F.linear(x, given["weight"], given["bias"])
        case "reduce_mean":
            return x.mean(given["axes"].tolist(), keepdim=bool(given["keep_dims"]))
        case "reshape":
            return x.reshape(given["shape"].tolist())
        case "softmax":
            return x.softmax(int(given["axis"]))
        case "clip":
            return x.clip(float(given["alpha"]), float(given["beta"]))
        case "add":
            return x + given["y"]
        case "mul":
            return x * given["y"]
    return {"relu": F.relu, "sigmoid": torch.sigmoid, "silu": F.silu}[kind](x)


def _padded(x: Tensor, given: dict[str, Any], value: float) -> Tensor:
    if given["pad_type"] == "valid":
        return x
    assert given["pad_type"] == "custom"
    top, bottom, left, right = given["pad"].tolist()
    return F.pad(x, (left, right, top, bottom), value=value)
