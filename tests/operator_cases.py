"""Random operands of the operator, and every backend's results on them."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.fx
from torch import Tensor

from ulsam.layer.ops import cpu, subspace_attention

OPERATOR = torch.ops.ulsam.subspace_attention.default
compiled = pytest.mark.skipif(cpu.LIBRARY is None, reason="installed without the C kernels")
ISAS = [1] if cpu.LIBRARY is None else list(range(1, cpu.LIBRARY.ulsam_isa() + 1))


def values(kind: str, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Inputs as they occur: ReLU'd ones are full of exact zeros, quantized and equal ones of ties."""
    x = torch.randn(*shape, generator=generator)
    if kind == "relu":
        return x.relu()
    if kind == "quantized":
        return (2 * x).round() / 2
    return torch.full_like(x, 0.75) if kind == "equal" else x


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "slice":
        wide = torch.zeros(x.shape[0], x.shape[1] + 2, x.shape[2] + 1, x.shape[3] + 3, dtype=x.dtype)
        wide[:, 1:-1, :-1, 2:-1] = x
        return wide[:, 1:-1, :-1, 2:-1]
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "expanded":
        return x[:1].expand(*x.shape)
    return x.contiguous()


class Case:
    """Random operands; `run` gives y, the moments and every gradient."""

    def __init__(
        self, shape: Sequence[int], groups: int, form: str, kind: str, layout: str, dtype: torch.dtype, seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        channels = shape[1]
        self.x = laid_out(values(kind, shape, generator).to(dtype), layout)
        self.dy = torch.randn(*shape, generator=generator).to(dtype)
        normal = [torch.randn(size, generator=generator) for size in (channels, channels, channels, groups)]
        self.scale, self.shift, self.weight, self.bias = normal
        self.weight = self.weight / (channels / groups) ** 0.5
        self.norms = [torch.rand(size, generator=generator) + 0.5 for size in (channels, channels, groups, groups)]
        self.groups, self.form = groups, form

    def run(self, backend: Any, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        def leaf(value: Tensor) -> Tensor:
            return value.detach().to(dtype or value.dtype).requires_grad_()

        operands = {"x": self.x.detach().to(dtype or self.x.dtype).requires_grad_()}
        operands |= {"scale": leaf(self.scale), "weight": leaf(self.weight)}
        if self.form not in ("equations", "no shift"):
            operands |= {"shift": leaf(self.shift), "bias": leaf(self.bias)}
        norms = [leaf(norm) for norm in self.norms] if self.form.startswith("batch statistics") else []
        relu = self.form not in ("equations", "no relu", "batch statistics, no relu")
        y, moments = subspace_attention(**operands, groups=self.groups, norms=norms, relu=relu, backend=backend)
        y.backward(self.dy.to(y.dtype))
        gradients = {f"d{name}": value.grad for name, value in operands.items()}
        gradients |= {f"dnorm{n}": norm.grad for n, norm in enumerate(norms)}
        return {"y": y.detach(), "moments": moments, **gradients}


FORMS = ["equations", "folded", "batch statistics"]
UNUSUAL = ["no shift", "no relu", "batch statistics, no relu"]  # no layer of ours is one of these


def operands(dtype: torch.dtype, norms: bool) -> tuple[Any, ...]:
    case = Case((2, 12, 5, 4), 3, "folded", "normal", "channels_last", dtype, 0)
    vectors = [value.requires_grad_() for value in (case.scale, case.shift, case.weight, case.bias)]
    return (case.x.requires_grad_(), *vectors, [norm.requires_grad_() for norm in case.norms] if norms else [], 3, True)


def check(found: dict[str, Tensor], exact: dict[str, Tensor], case: Case, dtype: torch.dtype) -> None:
    """y to 1e-6 (bfloat16: 1e-2) of the largest value; gradients relative to what their sums are made of."""
    assert found.keys() == exact.keys()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    if case.form.startswith("batch statistics"):
        tolerance = max(tolerance, 2e-5)  # divides by the spread of few, nearly equal values
    for name, value in exact.items():
        if not value.numel():
            continue
        size = value.abs().max().item()
        if name.startswith("d") and name != "dx":
            size = max(size, 0.1 * (case.x.abs().max() * case.dy.abs().max()).item() * case.x[:, 0].numel() ** 0.5, 1.0)
            size *= 10 if case.form.startswith("batch statistics") else 1
        bound = 5 * tolerance if name != "y" else tolerance
        assert (found[name].double() - value).abs().max().item() <= bound * max(size, 1e-3), name
    assert found["y"].dtype == found["dx"].dtype == dtype
    dense = case.x.is_contiguous() or case.x.is_contiguous(memory_format=torch.channels_last)
    assert found["y"].stride() == (case.x if dense else case.x.contiguous()).stride()
