"""What is asked of slimming: the budget, the blocks to choose from, and how to choose."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from ulsam.base.errors import UlsamError
from ulsam.model.spec import Edit
from ulsam.study.slim_latency import LatencyEngine

BudgetMeasure = Literal["macs", "params", "latency"]
WORDS = {"macs": "MACs", "params": "parameters", "latency": "time"}


@dataclass(frozen=True)
class Budget:
    """The settings of the choice.

    Args:
        measure: what the budget limits.
        share: of the model's own cost, that may be left; between 0 and 1.
        layer: of the new layers, keyword arguments of :class:`ulsam.Edit`: ``layer``, ``width``, ``groups``, ``form``;
            ULSAM by default; the layer "none" removes the blocks.
        at: names, globs or layer numbers of the blocks to choose from; None: all that can be replaced.
        images: how many training images to measure the damage on.
        max_sets: how many sets to measure after the greedy search.
        reconstruct_sets: how many of the sets of least damage to reconstruct; of these the one of least loss is chosen.
        engine, latency_batch, latency_threads: how time is taken; threads None: PyTorch's own number.
        latency_seconds: that measuring it lasts, of all blocks in turn, and of each set that is timed.

    Raises:
        UlsamError: a value out of range, or layer options that no edit takes.

    >>> Budget("macs", 0.75).edit(["14", "17"]), Budget("macs", 0.75, layer={"layer": "none"}).edit(["14", "17"])
    ('replace 14,17 g=4', 'remove 14,17')
    """

    measure: BudgetMeasure
    share: float
    layer: Mapping[str, Any] = field(default_factory=dict)
    at: str | None = None
    images: int = 400
    max_sets: int = 200
    reconstruct_sets: int = 4
    engine: LatencyEngine = "eager"
    latency_batch: int = 1
    latency_threads: int | None = None
    latency_seconds: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UlsamError(
                f"`{self.measure}` is the share of the model's own {WORDS[self.measure]} to keep, "
                f"between 0 and 1, both excluded, e.g. 0.75: not {self.share}"
            )
        if self.engine not in get_args(LatencyEngine):
            raise UlsamError(f"unknown engine {self.engine!r}; valid: {', '.join(get_args(LatencyEngine))}")
        for name in ("images", "max_sets", "latency_batch", "latency_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UlsamError(f"`{name}` must be 1 or more, not {value}")
        if not 0 <= self.latency_seconds < math.inf:
            raise UlsamError(f"`latency_seconds` must be 0 or more, not {self.latency_seconds}")
        timing = ("engine", "latency_batch", "latency_threads")
        given = [name for name in timing if getattr(self, name) != getattr(type(self), name)]
        if given and self.measure != "latency":
            raise UlsamError(f"`{given[0]}` is how time is taken, for a budget of `latency`, not of `{self.measure}`")
        if self.reconstruct_sets < 0:
            raise UlsamError(f"`reconstruct_sets` must be 0 or more, not {self.reconstruct_sets}")
        self.edit(["any"])

    def edit(self, places: list[str]) -> str:
        """The text of the edit that replaces these blocks."""
        return str(edit_of(places, self.layer))

    def entry(self) -> dict[str, Any]:
        """As JSON; without what is about time where the budget is not."""
        timing = ("engine", "latency_batch", "latency_threads", "latency_seconds") if self.measure != "latency" else ()
        return {name: value for name, value in asdict(self).items() if name not in timing}


def edit_of(places: Sequence[str], layer: Mapping[str, Any]) -> Edit:
    """The edit that puts such layers in the place of these blocks; with the layer "none" it removes them.

    Raises:
        UlsamError: what no edit takes.

    >>> str(edit_of(["14", "17"], {"layer": "se"}))
    'replace 14,17 layer=se'
    """
    at = ",".join(places)
    if layer.get("layer") != "none":
        return Edit("replace", at, **layer)
    if len(layer) > 1:
        raise UlsamError("the layer none takes no groups, width or form: the blocks are removed")
    return Edit("remove", at)


def budget(
    macs: float | None = None, params: float | None = None, latency: float | None = None, **options: Any
) -> Budget:
    """A budget with exactly one of the three budgets; ``options`` are the other fields of :class:`Budget`.

    Raises:
        UlsamError: none of them, or more than one, or what :class:`Budget` refuses.

    >>> budget(params=0.8).measure
    'params'
    """
    budgets: dict[BudgetMeasure, float | None] = {"macs": macs, "params": params, "latency": latency}
    given = [(measure, share) for measure, share in budgets.items() if share is not None]
    if len(given) != 1:
        raise UlsamError("give exactly one budget: `macs`, `params` or `latency`, a share such as 0.75")
    measure, share = given[0]
    return Budget(measure, share, **options)
