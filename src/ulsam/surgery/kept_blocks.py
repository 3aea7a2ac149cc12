"""Which kept block stands behind which edited places: the one that reconstruction trains."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ulsam.surgery.edited import edited_blocks
from ulsam.surgery.places import lies_in
from ulsam.surgery.trace import in_place_changes


@dataclass
class Call:
    """One call of a module: when it began and ended, and the tensors that went in and came out (None: not one map)."""

    name: str
    module: nn.Module
    began: int
    ended: int = -1
    given: Tensor | None = None
    output: Tensor | None = None
    content: Tensor | None = None  # of what went in, copied: operations in place may change that later
    given_changes: int = 0  # of the tensor, in place, by then
    output_changes: int = 0

    def feeds(self, other: "Call") -> bool:
        """Whether the output is what goes into the other call, and nothing has changed it in between."""
        return self.output is not None and self.output is other.given and self.output_changes == other.given_changes

    def keeps_shape(self) -> bool:
        return self.given is not None and self.output is not None and self.given.shape == self.output.shape


def calls_of(model: nn.Module, batch: Tensor) -> list[Call]:
    """Every call of a module on one image, in the order in which they begin."""
    calls: list[Call] = []
    running: list[Call] = []
    clock = itertools.count()

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            given = _four_dimensional(args[0] if len(args) == 1 and not keywords else None)
            running.append(Call(name, module, next(clock), given=given, given_changes=in_place_changes(given)))
            running[-1].content = None if given is None else given.clone()
            calls.append(running[-1])

        return hook

    def leave(_: nn.Module, args: Any, output: Any) -> None:
        call = running.pop()
        call.ended, call.output = next(clock), _four_dimensional(output)
        call.output_changes = in_place_changes(call.output)

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name), prepend=True, with_kwargs=True))
        handles.append(module.register_forward_hook(leave))
    try:
        model(batch[:1].clone())
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _four_dimensional(value: Any) -> Tensor | None:
    return value if isinstance(value, Tensor) and value.ndim == 4 else None


def segments(model: nn.Module, batch: Tensor, frozen: Sequence[str] = ()) -> list[tuple[list[str], str | None]]:
    """(edited places, the next kept block that they all feed and that may change), in the order of these blocks' calls.

    Args:
        model: an edited model in eval mode.
        batch: an image or more [B, C, H, W], of which the first is run once for the model and for each place.
        frozen: names of modules that may not change.

    >>> import ulsam
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    >>> segments(ulsam.remove(model, "1", input_size=(3, 9, 9)), torch.randn(1, 3, 9, 9))
    [(['1'], '3')]
    """
    calls = calls_of(model, batch)
    edited = set(edited_blocks(model))
    once = {call.name: call for call in calls if sum(call.name == other.name for other in calls) == 1}
    places = [call for call in calls if call.name in edited and call.name in once]
    kept = [call for call in once.values() if not _overlaps(call.name, edited)]
    blocks = [call for call in kept if _is_block(call, calls, frozen)]
    found: dict[str | None, list[str]] = {}
    for place in places:
        behind = [call for call in blocks if call.began > place.ended]
        fed = _fed(model, batch, place, calls) if behind else set()
        found.setdefault(next((call.name for call in behind if call.name in fed), None), []).append(place.name)
    return sorted(
        ((names, block) for block, names in found.items()),
        key=lambda segment: once[segment[1]].began if segment[1] else math.inf,
    )


def _fed(model: nn.Module, batch: Tensor, place: Call, calls: Sequence[Call]) -> set[str]:
    """The modules whose input depends on what a module outputs, as the input changes with it."""
    if place.output is None:
        return {call.name for call in calls}
    noise = torch.randn(place.output.shape, generator=torch.Generator().manual_seed(0)).to(place.output)
    noise *= place.output.std(correction=0) + 1

    def change(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + noise

    with place.module.register_forward_hook(change):
        changed = {call.name: call.content for call in calls_of(model, batch)}
    pairs = [(call.name, call.content, changed.get(call.name)) for call in calls]
    return {name for name, one, other in pairs if one is not None and other is not None and not torch.equal(one, other)}


def _is_block(call: Call, calls: Sequence[Call], frozen: Sequence[str]) -> bool:
    """Whether it is a module from one map to one map, and no stage, with weight matrices that are not frozen."""
    module = call.module
    changing = (parameter for part in not_frozen(module, call.name, frozen) for parameter in part.parameters(False))
    if call.given is None or call.output is None or not any(parameter.ndim > 1 for parameter in changing):
        return False
    if type(module).forward is nn.Sequential.forward:
        return not any(len(list(child.children())) for child in module.children())
    return not _repeats_blocks(call, calls)


def _repeats_blocks(stage: Call, calls: Sequence[Call]) -> bool:
    """Whether a module calls blocks of one class one after the other, of which one keeps its map's shape."""
    repeated: dict[Any, list[Call]] = {}
    for call in calls:
        if call.name.startswith(f"{stage.name}.") and _matrices(call.module) > 1:
            repeated.setdefault((call.name.rpartition(".")[0], type(call.module)), []).append(call)
    return any(len(blocks) > 1 and any(block.keeps_shape() for block in blocks) for blocks in repeated.values())


def _matrices(module: nn.Module) -> int:
    return sum(parameter.ndim > 1 for parameter in module.parameters())


def not_frozen(module: nn.Module, name: str, frozen: Sequence[str]) -> list[nn.Module]:
    """The modules in the one of this name, itself among them, that are not frozen."""
    return [part for path, part in module.named_modules(prefix=name) if not lies_in(path, frozen)]


def _overlaps(name: str, others: Iterable[str]) -> bool:
    """Whether a module is one of the others, or one lies in the other."""
    return any(lies_in(name, [other]) or lies_in(other, [name]) for other in others)
