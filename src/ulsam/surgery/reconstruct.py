"""Reconstruct what an edit broke: train the layers behind it to output what they output in the whole model.

Source: PRACTISE, "Practical Network Acceleration with Tiny Sets" (Wang and Wu, CVPR 2023, arXiv 2202.07861).
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ulsam.base.errors import NotFinite, UlsamError
from ulsam.base.eval_mode import eval_mode
from ulsam.base.logs import progress
from ulsam.surgery.edited import State, edited_blocks, note_reconstructed, put_back
from ulsam.surgery.kept_blocks import calls_of, not_frozen, segments
from ulsam.surgery.places import At, lies_in, match
from ulsam.surgery.reconstruct_layers import enough_memory, list_of_batches, passing, reconstruct_layer

Scope = Literal["block", "joint"]
STEPS, RATE = 500, 1e-3  # of Adam; its rate falls to 0 as a cosine


@dataclass(frozen=True)
class Reconstructed:
    """One reconstruction: which module was trained for which edits, and how far its output is from the whole model's.

    ``before`` and ``after`` are relative errors, the sum of squared differences over the sum of squares, on the
    images that it was trained on: 0 is perfect.
    """

    name: str
    edits: tuple[str, ...]
    before: float
    after: float


@dataclass(frozen=True)
class _Segment:
    """What was trained up to a kept block: its entry, and the states of its layers by name."""

    entry: Reconstructed | None
    states: dict[str, State]


#: A :class:`_Segment` by the places and kept blocks up to it: what two edited models have in common at the front.
Known = dict[Any, Any]


def reconstruct(
    model: nn.Module,
    batches: Sequence[Tensor],
    *,
    scope: Scope = "block",
    steps: int = STEPS,
    rate: float = RATE,
    freeze: At = (),
    known: Known | None = None,
) -> list[Reconstructed]:
    """Train the layers behind each removed or replaced block towards the whole model's features, without labels.

    The *whole model* is ``model`` with every removed or replaced block back. Places are taken in the order in which
    the model calls the kept blocks behind them, each the next block that the place feeds. New layers (attention, a
    narrow inverted residual) are trained together with that block; where that would not lower the error, they stay as
    they were. Each place starts from the features of the places before it, already reconstructed, and aims at the
    whole model's. BatchNorm statistics follow the new features. Nothing is random: the same model and images give the
    same weights. An error or Ctrl-C leaves the layers of the current place as they were. `ulsam.undo` gives the kept
    blocks their weights of before.

    Args:
        model: an edited model whose blocks were trained before they were replaced; changed in place.
        batches: images [B, C, H, W] as the model takes them, on its device; some sixteen batches of 32 do. With scope
            ``"block"`` the features around one place, of all images, are in memory together.
        scope: ``"block"`` trains up to the next kept block behind each place; ``"joint"`` trains everything behind the
            first place, towards the model's last feature map, and runs the model in every step.
        steps: of Adam for each place, with a batch each.
        rate: peak learning rate.
        freeze: modules (names, globs or layer numbers) that stay as they are; the next block that may change is taken.
        known: empty at first, and filled here: with the same dictionary for several edits of one model, on the same
            images in the same steps, what they share up to the first difference is trained once. Scope ``"block"``.

    Returns:
        One entry a place; consecutive edits share one. Edits whose block has no weights (the model came from a file
        without them) and removed blocks without a kept block behind them give none.

    Raises:
        UlsamError: no images, an unknown scope, a module to freeze that is not there, NaN or infinity in the features,
            or not enough memory.

    >>> import ulsam
    >>> blocks = [nn.Sequential(nn.Conv2d(n, 8, 3, padding=1), nn.BatchNorm2d(8)) for n in (3, 8, 8)]
    >>> model = ulsam.remove(nn.Sequential(*blocks), "1", input_size=(3, 9, 9))
    >>> (found,) = reconstruct(model, [torch.randn(32, 3, 9, 9)], steps=100, rate=0.03)
    >>> found.name, found.edits, found.after < found.before
    ('2', ('1',), True)
    """
    if scope not in get_args(Scope):
        raise UlsamError(f"unknown scope {scope!r}; valid: {', '.join(get_args(Scope))}")
    if type(steps) is not int or steps < 1 or not rate > 0:
        raise UlsamError(f"`steps` is a whole number above 0 and `rate` one above 0, not {steps!r} and {rate!r}")
    batches = list_of_batches(batches)
    if not edited_blocks(model):
        return []
    frozen = match(model, freeze) if freeze else []
    with torch.no_grad(), eval_mode(model), enough_memory():
        original = put_back(copy.deepcopy(model))
        found = [
            (places, [name for name in places if not lies_in(name, frozen)], following)
            for places, following in segments(model, batches[0], frozen)
        ]
        if scope == "joint":
            for _, changing, _ in found:
                for name in changing:
                    reconstruct_layer(model, original, name, batches, steps=steps)
            whole = _states(model, [""])[""]
            entry = _jointly(model, original, batches, steps, rate, frozen)
            note_reconstructed(model, edited_blocks(model)[0], "", whole)
            return [entry]
        known = {} if known is None else known
        entries: list[Reconstructed] = []
        front: tuple[tuple[tuple[str, ...], str | None], ...] = ()
        for places, changing, following in found:
            kept = [following] if following else []
            front += ((tuple(places), following),)
            before = _states(model, kept)
            if front in known:
                for name, state in known[front].states.items():
                    model.get_submodule(name).load_state_dict(state)
            else:
                for name in changing:
                    reconstruct_layer(model, original, name, batches, steps=steps)
                trained = _one(model, original, places, [*changing, *kept], frozen, batches, steps, rate)
                known[front] = _Segment(trained, _states(model, [*places, *kept]))
            if one := known[front].entry:
                entries.append(one)
                for name, state in before.items():
                    note_reconstructed(model, places[-1], name, state)
    return entries


def _states(model: nn.Module, names: Sequence[str]) -> dict[str, State]:
    parts = {name: model.get_submodule(name).state_dict() for name in names}
    return {name: {key: value.clone() for key, value in state.items()} for name, state in parts.items()}


def _one(
    model: nn.Module,
    original: nn.Module,
    places: Sequence[str],
    chain: Sequence[str],
    frozen: Sequence[str],
    batches: Sequence[Tensor],
    steps: int,
    rate: float,
) -> Reconstructed | None:
    """Reconstruct one segment, of these places: the new layers and the kept block that ``chain`` names."""
    calls = {call.name: call for call in calls_of(model, batches[0])}
    chain = [name for name in chain if next(model.get_submodule(name).parameters(), None) is not None]
    if not chain:
        return None
    begin = len(chain) - 1
    while begin and calls[chain[begin - 1]].feeds(calls[chain[begin]]):  # else the model computes something between
        begin -= 1
    chain = chain[begin:]
    given = passing(model, chain[0], batches)[0]
    wanted = passing(original, chain[-1], batches)[1]
    modules = [model.get_submodule(name) for name in chain]
    trained = nn.Sequential(*map(_without_original, modules))
    parts = [part for name, copied in zip(chain, trained, strict=True) for part in not_frozen(copied, name, frozen)]
    before, after = _train(trained, parts, given, wanted, chain[-1], steps, rate)
    if after < before:
        for module, part in zip(modules, trained, strict=True):
            module.load_state_dict(part.state_dict())
    return Reconstructed(chain[-1], tuple(places), before, min(before, after))


def _without_original(module: nn.Module) -> nn.Module:
    """A copy to train, without the block that the edit put aside."""
    original = vars(module).get("replaced_module")
    return copy.deepcopy(module, {id(original): None})


def _train(
    trained: nn.Module,
    parts: Sequence[nn.Module],
    given: Sequence[Tensor],
    wanted: Sequence[Tensor],
    name: str,
    steps: int,
    rate: float,
) -> tuple[float, float]:
    """Train these parts of a module to make ``wanted`` of ``given``; its relative error before and after."""
    layout = torch.channels_last
    pairs = [
        (x.float().contiguous(memory_format=layout), y.float().contiguous(memory_format=layout))
        for x, y in zip(given, wanted, strict=True)
    ]
    trained.eval().float().to(memory_format=layout).requires_grad_(True)
    power = sum(float(y.square().sum()) for _, y in pairs)

    def error() -> float:
        return sum(float((y - trained(x.clone())).square().sum()) for x, y in pairs) / power

    if not math.isfinite(power):
        raise NotFinite(f"the model outputs NaN or infinity at {name}: its weights are broken, or not for such images")
    if not power:
        return 0.0, 0.0
    scale = sum(y.numel() for _, y in pairs) / power
    before = error()
    if not before:
        return before, before
    spread = [pair for pair in pairs if len(pair[0]) > 1] or pairs

    def loss(step: int) -> Tensor:
        x, y = spread[step % len(spread)]
        return scale * F.mse_loss(trained(x.clone()), y)  # a copy, as its first layer may work in place

    _adam(parts, loss, name, steps, rate)
    after = error()
    if not math.isfinite(after):
        raise NotFinite(f"reconstructing {name} diverged: lower the rate, or give other images")
    return before, after


def _adam(parts: Iterable[nn.Module], loss_of: Callable[[int], Tensor], name: str, steps: int, rate: float) -> None:
    """Train the parameters that these modules hold themselves; in eval mode but for their BatchNorm statistics."""
    parts = list(parts)
    for module in parts:
        module.training = isinstance(module, _BatchNorm)  # nothing random, such as dropout
    optimizer = torch.optim.Adam([p for module in parts for p in module.parameters(recurse=False)], rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for step in progress(range(steps), desc=f"reconstruct {name}", unit="step"):
            loss = loss_of(step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    for module in parts:
        module.training = False


def _jointly(
    model: nn.Module,
    original: nn.Module,
    batches: Sequence[Tensor],
    steps: int,
    rate: float,
    frozen: Sequence[str],
) -> Reconstructed:
    """Train everything behind the first edited place that is not frozen, towards the last feature map."""
    calls = calls_of(model, batches[0])
    edited = edited_blocks(model)
    began = min(call.began for call in calls if call.name in edited)
    maps = [call for call in calls if call.output is not None and next(call.module.parameters(), None) is not None]
    last = max(maps, key=lambda call: call.ended).name
    behind = {call.name for call in calls if call.began >= began and call.output is not None}
    student = copy.deepcopy(model).float().requires_grad_(False)
    parts = [part for name, part in student.named_modules() if name in behind and not lies_in(name, frozen)]
    for module in parts:
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(True)
    wanted = [y.float() for y in passing(original, last, batches)[1]]
    power = sum(float(y.square().sum()) for y in wanted)
    if not math.isfinite(power) or not power:
        raise NotFinite(f"the model outputs nothing to learn from at {last}: its weights are broken")
    scale = sum(y.numel() for y in wanted) / power

    def output(step: int) -> Tensor:
        return passing(student, last, [batches[step].float()])[1][0]

    def error() -> float:
        return sum(float((output(n) - y).square().sum()) for n, y in enumerate(wanted)) / power

    before = error()
    number = len(batches)
    _adam(parts, lambda step: scale * F.mse_loss(output(step % number), wanted[step % number]), last, steps, rate)
    after = error()
    if not math.isfinite(after):
        raise NotFinite(f"reconstructing up to {last} diverged: lower the rate, or give other images")
    if after < before:
        model.load_state_dict(student.state_dict())
    return Reconstructed(last, tuple(edited), before, min(before, after))


def describe(entry: Reconstructed, images: int, source: str = "training images") -> str:
    """One line for the user.

    >>> describe(Reconstructed("blocks.5.0", ("blocks.4.1", "blocks.4.2"), 0.471, 0.132), 512)
    'blocks.5.0 behind blocks.4.1, blocks.4.2: relative error 0.47 -> 0.13, on 512 training images'
    """
    where = f"{entry.name} behind {', '.join(entry.edits)}" if entry.name not in entry.edits else entry.name
    return f"{where}: relative error {entry.before:.2f} -> {entry.after:.2f}, on {images} {source}"
