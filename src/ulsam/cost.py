"""What a net costs: parameters, multiply-accumulates (MACs) and activations, block by block.

One MAC is one multiplication with its addition: half of what PyTorch calls FLOPs, and exactly what the ULSAM paper
calls FLOPs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ulsam.errors import UlsamError
from ulsam.trace import default_input_size, trace

Rule = Literal["exact", "paper"]
_RULE_TEXT = {
    "exact": "every parameter; MACs of convolutions and matrix products; activations = elements those put out",
    "paper": "all parameters but BatchNorm's; MACs of convolutions and matrix products (which the paper calls FLOPs); "
    "activations = elements those put out",
}


@dataclass(frozen=True)
class Row:
    """The cost of one block for one picture."""

    name: str
    type: str
    output_shape: tuple[int, ...] | None  # [1, C, H, W]
    params: int
    macs: int
    activations: int


@dataclass(frozen=True)
class Cost:
    """The cost of a net for one picture, in total and a row a block; ``print(cost)`` shows the table."""

    rows: tuple[Row, ...]
    params: int
    macs: int
    activations: int
    input_size: tuple[int, int, int]  # C, H, W
    rule: Rule

    def __str__(self) -> str:
        names = max(len(row.name) for row in [*self.rows, Row("block", "", None, 0, 0, 0)])
        types = max(len(row.type) for row in [*self.rows, Row("", "type", None, 0, 0, 0)])
        head = f"{'block':{names}}  {'type':{types}}  {'output':>12}  {'params':>11}  {'MACs':>14}  {'activations':>11}"
        lines = [head, "-" * len(head)]
        total = Row("total", "", None, self.params, self.macs, self.activations)
        for row in [*self.rows, total]:
            shape = "x".join(map(str, row.output_shape[1:])) if row.output_shape else ""
            lines.append(
                f"{row.name:{names}}  {row.type:{types}}  {shape:>12}  "
                f"{row.params:>11,}  {row.macs:>14,}  {row.activations:>11,}"
            )
        lines.insert(-1, lines[1])
        size = "x".join(map(str, self.input_size))
        return "\n".join([*lines, f"One {size} picture. Counting rule {self.rule!r}: {_RULE_TEXT[self.rule]}."])


def cost(model: nn.Module, input_size: Sequence[int] | None = None, rule: Rule = "exact") -> Cost:
    """Count parameters, MACs and activations of any module for one picture.

    Args:
        model: any module that takes one tensor [B, C, H, W]; it is neither run nor changed.
        input_size: C, H, W; by default what timm says of the net, else 224 x 224.
        rule: ``"exact"``, or ``"paper"``: without BatchNorm's parameters, as the ULSAM paper's V2 tables count.

    Raises:
        UlsamError: the net does not run at this size, or the rule is unknown.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    >>> c = cost(net, (3, 10, 10))
    >>> c.params, c.macs, c.activations
    (232, 13824, 512)
    >>> cost(net, (3, 10, 10), rule="paper").params
    216
    """
    if rule not in get_args(Rule):
        raise UlsamError(f"unknown counting rule {rule!r}; valid: {', '.join(get_args(Rule))}")
    channels, height, width = input_size or default_input_size(model)
    flows = trace(model, (channels, height, width))
    modules = dict(model.named_modules())
    blocks = list(_blocks(model))
    rows = []
    for name in blocks:
        inner = [other for other in blocks if other.startswith(f"{name}.")]
        flow, apart = flows[name], [flows[other] for other in inner]
        row = Row(
            name,
            type(modules[name]).__name__,
            flow.output_shape,
            _params(modules[name], rule) - sum(_params(modules[other], rule) for other in inner),
            flow.macs - sum(f.macs for f in apart),
            flow.activations - sum(f.activations for f in apart),
        )
        if row.params or row.macs:
            rows.append(row)
    whole = flows[""]
    total = _params(model, rule)
    return Cost(tuple(rows), total, whole.macs, whole.activations, (channels, height, width), rule)


def _params(module: nn.Module, rule: Rule) -> int:
    count = sum(p.numel() for p in module.parameters())
    if rule == "paper":
        norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
        count -= sum(p.numel() for norm in norms for p in norm.parameters(recurse=False))
    return count


def _blocks(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """The names that get a row: what containers hold, the net's own children first, and every inserted layer."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if type(child) in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
            yield from _blocks(child, f"{path}.")
        else:
            yield path
            if "ulsam" in child._modules:
                yield f"{path}.ulsam"
