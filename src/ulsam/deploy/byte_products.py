"""How a processor multiplies bytes: exactly, or with sums of two products in 16 bits, which saturate."""

from typing import Literal, get_args

import numpy as np

from ulsam import runtime
from ulsam.base.errors import UlsamError

#: The processor that a quantized model is made for: this one, x86 without VNNI, x86 with it, or ARM.
Target = Literal["this", "avx2", "vnni", "arm"]


def saturates() -> bool:
    """Whether ONNX Runtime's products of uint8 and int8 saturate here, as those of x86 without VNNI do.

    Without the instructions for it ONNX Runtime adds two products in 16 bits, which hold less than the largest two
    (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html). It is found by multiplying.

    Raises:
        UlsamError: onnx or onnxruntime is missing.

    >>> saturates() in (False, True)
    True
    """
    from ulsam.deploy.onnx_graph import check_installed

    check_installed("ulsam quantize")
    from onnx import TensorProto, helper

    size = 64
    weights = helper.make_tensor("w", TensorProto.INT8, [size, size], [127] * size * size)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "products",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [size, size])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [size, size])],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (found,) = runtime.open_session(model.SerializeToString()).run(None, {"x": np.full((size, size), 255, np.uint8)})
    return bool((found != size * 255 * 127).any())


def weight_bits(target: Target) -> int:
    """Bits of a weight that are used: 7 where products saturate, so that two of them fit.

    Raises:
        UlsamError: an unknown target, or as of :func:`saturates`.

    >>> weight_bits("avx2"), weight_bits("vnni"), weight_bits("arm")
    (7, 8, 8)
    """
    if target not in get_args(Target):
        raise UlsamError(f"unknown target {target!r}; valid: {', '.join(get_args(Target))}")
    return 7 if target == "avx2" or (target == "this" and saturates()) else 8
