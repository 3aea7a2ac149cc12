"""Put ULSAM into any `nn.Module`: find where it fits, insert, replace, drop, and undo.

An edit happens or raises: on an error the model is as it was. Inserted layers hang on the module they follow (a child
named ``ulsam`` and a forward hook), so that every other parameter keeps its name and a checkpoint of the unedited net
loads strictly, the new keys aside.
"""

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ulsam.errors import UlsamError
from ulsam.module import ULSAM, Form, divisors
from ulsam.trace import Flow, trace

At = str | int | Sequence[str | int]
WhyNot = Callable[[nn.Module, Flow, set[int]], str | None]
ModelT = TypeVar("ModelT", bound=nn.Module)


@dataclass(frozen=True)
class Candidate:
    """A module that ULSAM can replace.

    ``params`` and ``macs`` are what the replacement saves (negative: it costs), ULSAM's own 2 * C and 2 * C * H * W
    already taken off; MACs are for one picture.
    """

    name: str
    type: str
    shape: tuple[int, int, int]  # C, H, W
    params: int
    macs: int

    @property
    def groups(self) -> list[int]:
        """The valid numbers of groups."""
        return divisors(self.shape[0])


def candidates(model: nn.Module, input_size: Sequence[int] | None = None, leaves: bool = False) -> list[Candidate]:
    """Every module with parameters, one feature map in and the same shape out: what :func:`replace` accepts.

    Args:
        model: any `nn.Module` on one picture.
        input_size: C, H, W of that picture; by default :func:`default_input_size`.
        leaves: also list modules that hold no other module with parameters (a convolution, a BatchNorm).

    Returns:
        Outermost first, in the order of ``model.named_modules()``; what is inside a listed module follows it.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)))
    >>> [(c.name, c.shape, c.params, c.macs) for c in candidates(net, (3, 6, 6))]
    [('1', (8, 4, 4), 584, 8960)]
    """
    flows = trace(model, input_size)
    twice = _shared(model)
    found = []
    for name, module in model.named_modules():
        if not name or _why_not_replace(module, flows[name], twice):
            continue
        if not leaves and next((p for child in module.children() for p in child.parameters()), None) is None:
            continue
        _, channels, height, width = cast(tuple[int, int, int, int], flows[name].output_shape)
        params = sum(p.numel() for p in module.parameters()) - 2 * channels
        macs = flows[name].macs - 2 * channels * height * width
        found.append(Candidate(name, type(module).__name__, (channels, height, width), params, macs))
    return found


def replace(
    model: ModelT,
    at: At,
    groups: int = 4,
    *,
    form: Form = "equations",
    momentum: float = 0.1,
    input_size: Sequence[int] | None = None,
) -> ModelT:
    """Put a ULSAM layer in the place of each named module; in place, and returns ``model``.

    Args:
        model: any `nn.Module`.
        at: module names, globs (``*`` stays within one level, ``**`` crosses levels), or, for MobileNet-V1 and V2, the
            paper's layer numbers (1 = stem, then one a block): ``"14,17"``, ``[14, 17]``, ``"blocks.4.2"``.
        groups: subspaces of each new layer.
        form, momentum: as in :class:`ulsam.ULSAM`.
        input_size: C, H, W for the tracing that finds the channels; any size the net accepts will do.

    Raises:
        UlsamError: a name matches nothing, a block changes shape, is used twice, gives tokens, has no parameters,
            or ``groups`` does not divide its channels. The model is then untouched.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1))
    >>> replace(net, "1", groups=2, input_size=(3, 16, 16))[1]
    ULSAM(
      8, groups=2, form='equations'
      (depthwise): Conv2d(8, 8, kernel_size=(1, 1), stride=(1, 1), groups=8, bias=False)
      (pointwise): Conv2d(8, 2, kernel_size=(1, 1), stride=(1, 1), groups=2, bias=False)
    )
    """
    flows = _targets(model, _separate(match(model, at)), input_size, _why_not_replace)
    layers = {name: _layer(model, name, flow, groups, form, momentum) for name, flow in flows.items()}
    for name, layer in layers.items():
        _swap(model, name, layer)
    return model


def drop(model: ModelT, at: At, *, input_size: Sequence[int] | None = None) -> ModelT:
    """Take each named module out: `nn.Identity` in its place. What is left when a replacement does nothing.

    Arguments, result and errors are those of :func:`replace`.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1))
    >>> drop(net, "1", input_size=(3, 16, 16))[1]
    Identity()
    """
    for name in _targets(model, _separate(match(model, at)), input_size, _why_not_replace):
        _swap(model, name, nn.Identity())
    return model


def insert(
    model: ModelT,
    after: At,
    groups: int = 4,
    *,
    form: Form = "equations",
    momentum: float = 0.1,
    input_size: Sequence[int] | None = None,
) -> ModelT:
    """Put a ULSAM layer behind each named module; in place, and returns ``model``.

    The new layer becomes the child ``ulsam`` of the module it follows (of the last one in an `nn.Sequential`), run by a
    forward hook: no other name changes. Arguments and errors are those of :func:`replace`; ``"17:1"`` and ``17`` both
    mean behind the paper's layer 17; the output may have another shape than the input, but must be a map [B, C, H, W].

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    >>> list(insert(net, "0", groups=2, input_size=(3, 16, 16)).state_dict())
    ['0.weight', '0.bias', '0.ulsam.depthwise.weight', '0.ulsam.pointwise.weight']
    """
    names = list(dict.fromkeys(_host(model, name) for name in match(model, after)))
    flows = _targets(model, names, input_size, _why_not_insert)
    layers = {name: _layer(model, name, flow, groups, form, momentum) for name, flow in flows.items()}
    for name, layer in layers.items():
        host = model.get_submodule(name)
        host.add_module("ulsam", layer)
        host.register_forward_hook(_run_inserted, prepend=True)
    return model


def remove(model: ModelT) -> ModelT:
    """Undo every :func:`insert`, :func:`replace` and :func:`drop`: the replaced modules return with their weights.

    Layers that the net's own code holds are not touched.

    Raises:
        UlsamError: the net holds no edit.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1))
    >>> remove(replace(net, "1", input_size=(3, 16, 16)))[1]
    Conv2d(8, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """
    edits = 0
    for name, module in list(model.named_modules()):
        if "replaced_module" in vars(module):
            (original,) = module.replaced_module
            like = next(module.parameters(), next(model.parameters(), None))
            _set(model, name, original.to(like.device) if like is not None else original)
            original.train(module.training)
            edits += 1
        for key, hook in list(module._forward_hooks.items()):
            if hook is _run_inserted:
                del module._forward_hooks[key], module.ulsam
                edits += 1
    if not edits:
        raise UlsamError(f"this {type(model).__name__} holds no edit to remove")
    return model


def layer_names(model: nn.Module) -> dict[int, str]:
    """The paper's layer numbers of a MobileNet-V1 or V2: 1 is the stem, then one a block; empty for any other net.

    Knows timm's and torchvision's nets, at any width, edited or not.

    >>> import timm
    >>> layer_names(timm.create_model("mobilenetv2_100"))[17]
    'blocks.5.2'
    """
    if type(model).__name__ == "MobileNetV2" and len(getattr(model, "features", ())) == 19:
        return {n + 1: f"features.{n}" for n in range(18)}
    stages = getattr(model, "blocks", None)
    if not hasattr(model, "conv_stem") or not isinstance(stages, nn.Sequential):
        return {}
    kinds = {type(_original(block)).__name__ for stage in stages for block in stage}
    layouts = {
        (1, 2, 2, 6, 2): {"DepthwiseSeparableConv"},
        (1, 2, 3, 4, 3, 3, 1): {"DepthwiseSeparableConv", "InvertedResidual"},
    }
    if layouts.get(tuple(len(stage) for stage in stages)) != kinds:
        return {}
    names = [f"blocks.{i}.{j}" for i, stage in enumerate(stages) for j in range(len(stage))]
    return {1: "conv_stem", **{n: name for n, name in enumerate(names, start=2)}}


def match(model: nn.Module, at: At) -> list[str]:
    """The module names that ``at`` means, in the order of the model; see :func:`replace` for what it may be.

    Raises:
        UlsamError: something in ``at`` matches no module; the message names the nearest valid ones.

    >>> match(nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU(), nn.ReLU())), "1.*")
    ['1.0', '1.1']
    """
    items: Iterable[str | int] = [at] if isinstance(at, str | int) else at
    wanted = [part.strip() for item in items for part in str(item).split(",")]
    if not any(wanted):
        raise UlsamError("no place named; name a module such as blocks.4.2, or a layer number such as 14")
    names = [name for name, _ in model.named_modules() if name]
    chosen: set[str] = set()
    for part in wanted:
        exact = part in names
        number = re.fullmatch(r"(\d+)(:1)?", part)
        if number and not exact:
            chosen.add(_numbered(model, int(number[1])))
            continue
        found = [part] if exact else [name for name in names if _glob(part).fullmatch(name)]
        if not found:
            near = difflib.get_close_matches(part, names, n=3, cutoff=0.4)
            hint = f"nearest names: {', '.join(near)}" if near else f"names here begin with {', '.join(names[:3])}"
            raise UlsamError(f"no module is named {part!r}; {hint}")
        chosen.update(found)
    return [name for name in names if name in chosen]


def _numbered(model: nn.Module, number: int) -> str:
    numbers = layer_names(model)
    if not numbers:
        raise UlsamError(
            f"layer number {number}: the paper's numbers exist for MobileNet-V1 and V2 alone; "
            f"name modules of this {type(model).__name__} (see `ulsam candidates`)"
        )
    if number not in numbers:
        raise UlsamError(f"there is no layer {number}; this net has layers 1 to {max(numbers)}")
    return numbers[number]


def _glob(pattern: str) -> re.Pattern[str]:
    """``*`` within one level, ``**`` across levels, ``?`` one character."""
    tokens = {"**": r".+", "*": r"[^.]+", "?": r"[^.]"}
    parts = re.split(r"(\*\*|\*|\?)", pattern)
    return re.compile("".join(tokens.get(part, re.escape(part)) for part in parts))


def _separate(names: list[str]) -> list[str]:
    """``names``, none of which may lie inside another."""
    for outer in names:
        if inner := next((name for name in names if name.startswith(f"{outer}.")), None):
            raise UlsamError(f"{inner} lies inside {outer}: name only one of them")
    return names


def _host(model: nn.Module, name: str) -> str:
    """The module whose output is the output of ``name``: the last one of a plain `nn.Sequential`."""
    module = model.get_submodule(name)
    while type(module).forward is nn.Sequential.forward and len(module._modules):
        leaf, module = list(module.named_children())[-1]
        name = f"{name}.{leaf}"
    return name


def _targets(model: nn.Module, names: list[str], input_size: Sequence[int] | None, why_not: WhyNot) -> dict[str, Flow]:
    """What flows through each named place; raises unless every one of them is valid."""
    flows = trace(model, input_size)
    twice = _shared(model)
    for name in names:
        if reason := why_not(model.get_submodule(name), flows[name], twice):
            valid = [n for n, m in model.named_modules() if n and not why_not(m, flows[n], twice)]
            raise UlsamError(f"{name} {reason}; {_nearest(name, valid)}")
    return {name: flows[name] for name in names}


def _nearest(name: str, valid: list[str]) -> str:
    """The valid places most like ``name``, those at the same depth first."""
    same_depth = [v for v in valid if v.count(".") == name.count(".")] or valid
    near = difflib.get_close_matches(name, same_depth, n=4, cutoff=0.0)
    return f"valid places near it: {', '.join(near)}" if near else "this net has no valid place"


def _why_not_map(flow: Flow) -> str | None:
    shape = flow.output_shape
    if shape is None:
        return "does not put out one tensor"
    if len(shape) == 3:
        return f"puts out tokens [B, N, C] = {list(shape)}; ULSAM needs a feature map [B, C, H, W]"
    if len(shape) != 4:
        return f"puts out {list(shape)}; ULSAM needs a feature map [B, C, H, W]"
    if shape[1] == shape[2] != shape[3]:
        return f"puts out {list(shape)}, channels in the last dimension; ULSAM needs a feature map [B, C, H, W]"
    return None


def _why_not_called_once(module: nn.Module, flow: Flow, twice: set[int]) -> str | None:
    if flow.calls == 0:
        return "is not called in a forward pass"
    if flow.calls > 1:
        return f"is used {flow.calls} times in one forward pass"
    if id(module) in twice:
        return "is one module under two names"
    return None


def _why_not_insert(module: nn.Module, flow: Flow, twice: set[int]) -> str | None:
    if hasattr(module, "ulsam"):
        return "holds something named ulsam already"
    return _why_not_called_once(module, flow, twice) or _why_not_map(flow)


def _why_not_replace(module: nn.Module, flow: Flow, twice: set[int]) -> str | None:
    if isinstance(module, ULSAM):
        return "is a ULSAM layer already"
    if _run_inserted in module._forward_hooks.values():
        return "has a ULSAM layer inserted behind it"
    if reason := _why_not_called_once(module, flow, twice) or _why_not_map(flow):
        return reason
    if flow.input_shape is None:
        return "does not take exactly one tensor"
    if flow.input_shape != flow.output_shape:
        return f"changes the shape from {list(flow.input_shape)} to {list(cast(Any, flow.output_shape))}"
    if next(module.parameters(), None) is None:
        return "has no parameters to save"
    return None


def _shared(model: nn.Module) -> set[int]:
    """The ids of modules that are registered under more than one name."""
    counts = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    return {key for key, count in counts.items() if count > 1}


def _layer(model: nn.Module, name: str, flow: Flow, groups: int, form: Form, momentum: float) -> ULSAM:
    """A new layer for what ``name`` puts out, on that module's device and in its dtype and mode."""
    module = model.get_submodule(name)
    like = next(module.parameters(), next(model.parameters(), torch.empty(0)))
    channels = cast(tuple[int, ...], flow.output_shape)[1]
    try:
        layer = ULSAM(channels, groups, form=form, momentum=momentum, device=like.device, dtype=like.dtype)
    except UlsamError as error:
        raise UlsamError(f"{name}: {error}") from None
    return layer.train(module.training)


def _run_inserted(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """The forward hook of a module with a layer behind it."""
    return cast(Tensor, cast(Any, module).ulsam(output))


def _swap(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` at ``name``; it remembers what stood there, unseen by parameters() and state_dict()."""
    original = model.get_submodule(name)
    vars(new)["replaced_module"] = (original,)
    _set(model, name, new.train(original.training))


def _original(module: nn.Module) -> nn.Module:
    """What stood at this place before the edit, or the module itself."""
    return cast(nn.Module, vars(module).get("replaced_module", (module,))[0])


def _set(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)
