"""What a model costs: parameters, multiply-accumulates (MACs) and activations, block by block.

One MAC is one multiplication with its addition: half of what PyTorch calls FLOPs, and exactly what the ULSAM paper
calls FLOPs.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ulsam.base.errors import UlsamError
from ulsam.base.text_table import text_table
from ulsam.layer.ulsam import ULSAM
from ulsam.surgery.edited import added_layers
from ulsam.surgery.layer_host import host_class
from ulsam.surgery.trace import default_input_size, trace

Rule = Literal["exact", "paper"]
_RULE_TEXT = {
    "exact": "every parameter; MACs of convolutions and matrix products; activations = elements those output",
    "paper": "all parameters but BatchNorm's; MACs of convolutions and matrix products (which the paper calls FLOPs); "
    "activations = elements those output",
}


@dataclass(frozen=True)
class BlockCost:
    """The cost of one block for one image, the layers that edits put in aside: they have rows of their own.

    The row named "" holds what the model does outside its blocks. What blocks share is counted in one of them.
    """

    name: str
    type: str
    output_shape: tuple[int, ...] | None  # [1, C, H, W]
    params: int
    macs: int
    activations: int


@dataclass(frozen=True)
class Cost:
    """The cost of a model for one image, in total and a row a block; ``print(cost)`` shows the table."""

    rows: tuple[BlockCost, ...]
    params: int
    macs: int
    activations: int
    input_size: tuple[int, int, int]  # C, H, W
    rule: Rule

    def __str__(self) -> str:
        cells = [["block", "type", "output", "params", "MACs", "activations"]]
        for row in [*self.rows, BlockCost("total", "", None, self.params, self.macs, self.activations)]:
            shape = "x".join(map(str, row.output_shape[1:])) if row.output_shape else ""
            cells.append([row.name, row.type, shape, f"{row.params:,}", f"{row.macs:,}", f"{row.activations:,}"])
        lines = text_table(cells, right=(2, 3, 4, 5))
        lines.insert(-1, lines[1])
        size = "x".join(map(str, self.input_size))
        return "\n".join([*lines, f"One {size} image. Counting rule {self.rule!r}: {_RULE_TEXT[self.rule]}."])


def cost(model: nn.Module, input_size: Sequence[int] | None = None, rule: Rule = "exact") -> Cost:
    """Count parameters, MACs and activations of any module for one image.

    Args:
        model: any module that takes one tensor [B, C, H, W]; it is neither run nor changed.
        input_size: C, H, W; by default what timm says of the model, else 224 x 224.
        rule: ``"exact"``, or ``"paper"``: without BatchNorm's parameters, as the ULSAM paper's V2 tables count.

    Raises:
        UlsamError: the model does not run at this size, or the rule is unknown.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    >>> c = cost(model, (3, 10, 10))
    >>> c.params, c.macs, c.activations
    (232, 13824, 512)
    >>> cost(model, (3, 10, 10), rule="paper").params
    216
    """
    if rule not in get_args(Rule):
        raise UlsamError(f"unknown counting rule {rule!r}; valid: {', '.join(get_args(Rule))}")
    size = default_input_size(model) if input_size is None else input_size
    flows = trace(model, size)
    seen: set[int] = set()  # ids of modules and parameters that have their row: shared ones are counted once
    rows = []
    layers = {id(layer) for layer in added_layers(model).values()}
    for name, block in reversed(
        [("", model), *_blocks(model, layers)]
    ):  # inner blocks first, the rest of the model last
        row = BlockCost(name, host_class(block).__name__, flows[name].output_shape, 0, 0, 0)
        for path, part in block.named_modules(prefix=name):
            if id(part) not in seen:
                seen.add(id(part))
                row = replace(
                    row,
                    params=row.params + _own_params(part, rule, seen),
                    macs=row.macs + flows[path].own_macs,
                    activations=row.activations + flows[path].own_activations,
                )
        if row.params or row.macs:
            rows.append(row)
    params, macs, activations = (sum(getattr(row, key) for row in rows) for key in ("params", "macs", "activations"))
    channels, height, width = size
    return Cost(tuple(reversed(rows)), params, macs, activations, (channels, height, width), rule)


def _own_params(module: nn.Module, rule: Rule, seen: set[int]) -> int:
    if rule == "paper" and isinstance(module, _BatchNorm):
        return 0
    fresh = [p for p in module.parameters(recurse=False) if id(p) not in seen]
    seen.update(map(id, fresh))
    return sum(p.numel() for p in fresh)


def _blocks(module: nn.Module, layers: Collection[int], prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """What gets a row: what containers hold, the model's own children first, and every layer inside.

    Layers are ULSAM's, and those with an id in ``layers``.
    """
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if host_class(child) in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
            yield from _blocks(child, layers, f"{path}.")
        else:
            yield path, child
            for inner, part in child.named_modules(prefix=path):
                if part is not child and (isinstance(part, ULSAM) or id(part) in layers):
                    yield inner, part
