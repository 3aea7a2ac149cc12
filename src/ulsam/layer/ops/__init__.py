"""One operator, `subspace_attention`: its definition in plain PyTorch, and backends as fast as the arithmetic."""

from ulsam.layer.ops.context import is_captured
from ulsam.layer.ops.operator import Backend, infer, subspace_attention, which_backend

__all__ = ["Backend", "infer", "is_captured", "subspace_attention", "which_backend"]
