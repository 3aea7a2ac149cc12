"""Put ULSAM, or another attention layer, into any `nn.Module`: find where it fits, insert, replace, remove, and undo.

An edit happens or raises: on an error the model is as it was. An inserted layer is the child ``ulsam`` of the module
it follows (see `ulsam.surgery.followed`): every other parameter keeps its name, and a checkpoint of the unedited model
loads strictly, the new keys aside. What wraps a model (`torch.compile`, DataParallel) is looked through.
"""

import difflib
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar, cast

import torch
import torch.fx
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ulsam.base.errors import UlsamError
from ulsam.layer.choice import Layer, make_layer
from ulsam.layer.ulsam import ULSAM, Form, divisors
from ulsam.surgery.edited import (
    added_layers,
    attach,
    changes,
    detach,
    edited,
    is_edited,
    is_followed,
    lacks_weights,
    mark_yaml,
    reference_tensor,
    swap,
    swap_back,
    undo_edits,
)
from ulsam.surgery.followed import host_class
from ulsam.surgery.places import At, match, unwrapped, words
from ulsam.surgery.trace import Flow, Shape, trace

ModelT = TypeVar("ModelT", bound=nn.Module)


class _Model(NamedTuple):
    """What is known of a model before it is edited."""

    flows: dict[str, Flow]
    shared: set[int]  # ids of modules registered under more than one name
    layers: set[int]  # ids of ULSAM layers and of those that edits put in
    inside: set[int]  # ids of modules that are part of such a layer
    fused: dict[int, str]  # the block that fuses it, by id of a module


WhyNot = Callable[[nn.Module, Flow, _Model], str | None]
Do = Callable[[nn.Module, str, nn.Module], None]
Undo = Callable[[nn.Module, str], None]


@dataclass(frozen=True)
class Candidate:
    """A module that ULSAM can replace.

    ``params`` and ``macs`` are what the replacement saves (negative: it costs), ULSAM's own 2 * C and 2 * C * H * W
    already taken off; MACs are for one image. Parameters that other modules use too are not saved.
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
        model: any `nn.Module` on one image.
        input_size: C, H, W of that image; by default :func:`default_input_size`.
        leaves: also list modules that hold no other module with parameters (a convolution, a BatchNorm).

    Returns:
        Outermost first, in the order of ``model.named_modules()``; what is inside a listed module follows it.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)))
    >>> [(c.name, c.shape, c.params, c.macs) for c in candidates(model, (3, 6, 6))]
    [('1', (8, 4, 4), 584, 8960)]
    """
    model = unwrapped(model)
    seen = _look(model, input_size)
    owners = _owners(model)
    found = []
    for name, module in model.named_modules():
        if not name or _why_not_replace(module, seen.flows[name], seen):
            continue
        if not leaves and next((p for child in module.children() for p in child.parameters()), None) is None:
            continue
        _, channels, height, width = cast(tuple[int, int, int, int], seen.flows[name].output_shape)
        inside = _owners(module)
        saved = sum(p.numel() for p in module.parameters() if inside[id(p)] == owners[id(p)])
        params = saved - 2 * channels
        macs = seen.flows[name].macs - 2 * channels * height * width
        found.append(Candidate(name, host_class(module).__name__, (channels, height, width), params, macs))
    return found


def replace(
    model: ModelT,
    at: At,
    groups: int | None = None,
    *,
    layer: Layer = "ulsam",
    form: Form | None = None,
    momentum: float | None = None,
    width: int | None = None,
    input_size: Sequence[int] | None = None,
) -> ModelT:
    """Put an attention layer in the place of each named module; in place, and returns ``model``.

    Where an `nn.Sequential` stood, an `nn.Sequential` of that one layer stands: code that walks it goes on working.

    Args:
        model: any `nn.Module`.
        at: module names, globs (``*`` stays within one level, ``**`` crosses levels), or, for MobileNet-V1 and V2, the
            paper's layer numbers (1 = stem, then one a block): ``"14,17"``, ``[14, 17]``, ``"blocks.4.2"``.
        groups: subspaces of each new ULSAM layer, by default 4.
        layer: what to put there; see :func:`ulsam.layer.choice.make_layer`.
        form, momentum: as in :class:`ulsam.ULSAM`; like ``groups`` refused for other layers.
        width: of the :class:`ulsam.InvertedResidual` that ``layer="inverted_residual"`` is; behind another layer, put
            one of this width. :func:`ulsam.reconstruct` trains the new layer to do what the block did.
        input_size: C, H, W for the tracing that finds the channels; any size the model accepts will do.

    Raises:
        UlsamError: a name matches nothing, a block changes shape, is used twice, gives tokens, has no parameters or
            holds an edit, ``groups`` does not divide its channels, or the model does not run with the new layers. The
            model is then as it was.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1))
    >>> replace(model, "1", groups=2, input_size=(3, 16, 16))[1]
    ULSAM(
      8, groups=2, form='equations'
      (depthwise): Conv2d(8, 8, kernel_size=(1, 1), stride=(1, 1), groups=8, bias=False)
      (pointwise): Conv2d(8, 2, kernel_size=(1, 1), stride=(1, 1), groups=2, bias=False)
    )
    """
    inner = unwrapped(model)
    flows = _targets(inner, _blocks(inner, at), _look(inner, input_size), _why_not_replace)
    make = partial(make_layer, layer, groups=groups, form=form, momentum=momentum, width=width)
    _edit(inner, _layers(inner, flows, make), swap, swap_back, input_size)
    return model


def remove(model: ModelT, at: At, *, input_size: Sequence[int] | None = None) -> ModelT:
    """Take each named module out: `nn.Identity` in its place. What is left when a replacement does nothing.

    Arguments, result and errors are those of :func:`replace`.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1))
    >>> remove(model, "1", input_size=(3, 16, 16))[1]
    Identity()
    """
    inner = unwrapped(model)
    names = _targets(inner, _blocks(inner, at), _look(inner, input_size), _why_not_replace)
    _edit(inner, {name: nn.Identity() for name in names}, swap, swap_back, input_size)
    return model


def insert(
    model: ModelT,
    after: At,
    groups: int | None = None,
    *,
    layer: Layer = "ulsam",
    form: Form | None = None,
    momentum: float | None = None,
    width: int | None = None,
    input_size: Sequence[int] | None = None,
) -> ModelT:
    """Put an attention layer behind each named module; in place, and returns ``model``.

    The new layer, of whatever kind, becomes the child ``ulsam`` of the module it follows, whose class becomes a
    subclass that runs it (`ulsam.surgery.followed`): no other name changes. It follows the last module of an
    `nn.Sequential`, and the BatchNorm behind a convolution. Arguments and errors are those of :func:`replace`;
    ``"17:1"`` and ``17`` both mean behind the paper's layer 17. The output may have another shape than the input, but
    must be a map [B, C, H, W]. An inserted narrow inverted residual stands for no block, and is not reconstructed. A
    place that is a BatchNorm warns, as tools that put another BatchNorm there lose the layer.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    >>> list(insert(model, "0", groups=2, input_size=(3, 16, 16)).state_dict())
    ['0.weight', '0.bias', '0.ulsam.depthwise.weight', '0.ulsam.pointwise.weight']
    """
    inner = unwrapped(model)
    seen = _look(inner, input_size)
    names = list(dict.fromkeys(_host(inner, name, seen) for name in match(inner, after)))
    flows = _targets(inner, names, seen, _why_not_insert)
    for name in names:
        _warn_of_norm(inner, name)
    make = partial(make_layer, layer, groups=groups, form=form, momentum=momentum, width=width)
    layers = {f"{name}.ulsam": made for name, made in _layers(inner, flows, make).items()}
    _edit(inner, layers, attach, detach, input_size)
    return model


def undo(model: ModelT) -> ModelT:
    """Undo every :func:`insert`, :func:`replace` and :func:`remove`: the replaced modules return with their weights.

    They follow the model to the device, dtype and mode that it has by now. Layers that the model's own code holds are
    not touched.

    Raises:
        UlsamError: the model holds no edit, or came from a file without the weights of a block that would return.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1))
    >>> undo(replace(model, "1", input_size=(3, 16, 16)))[1]
    Conv2d(8, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """
    inner = unwrapped(model)
    places = edited(inner)
    if gone := [name for name, old in changes(inner)[1].items() if lacks_weights(old)]:
        raise UlsamError(f"{gone[0]} cannot return: the model's file holds no weights of the block that stood there")
    undo_edits(inner)
    if not places:
        raise UlsamError(f"this {type(model).__name__} holds no edit to undo")
    return model


def _blocks(model: nn.Module, at: At) -> list[str]:
    """The names that ``at`` means as blocks to replace: none written as an insertion, none inside another."""
    if inserted := next((part for part in words(at) if re.fullmatch(r"\d+:1", part)), None):
        raise UlsamError(
            f"{inserted} means behind layer {inserted[:-2]}, an insertion; its replacement is {inserted[:-2]}"
        )
    names = match(model, at)
    for outer in names:
        if inner := next((name for name in names if name.startswith(f"{outer}.")), None):
            raise UlsamError(f"{inner} lies inside {outer}: name only one of them")
    return names


def _host(model: nn.Module, name: str, seen: _Model) -> str:
    """The module whose output is the output of ``name``, and which nothing fuses away.

    That is the last one of a plain `nn.Sequential`; of a convolution that a BatchNorm follows, the BatchNorm, as the
    two are one to whatever fuses them; and of a BatchNorm at the end of an `nn.Sequential` that Sequential.
    """
    module = model.get_submodule(name)
    while _is_plain_sequence(module) and len(module._modules):
        leaf, module = cast(tuple[str, nn.Module], next(reversed(module._modules.items())))
        name = f"{name}.{leaf}"
    norm = seen.flows[name].norm_behind
    name = norm if norm and id(model.get_submodule(norm)) not in seen.shared else name
    parent, _, leaf = name.rpartition(".")
    around = model.get_submodule(parent)
    if not isinstance(model.get_submodule(name), _BatchNorm) or not parent or seen.flows[parent].calls != 1:
        return name
    return parent if _is_plain_sequence(around) and leaf == next(reversed(around._modules)) else name


def _is_plain_sequence(module: nn.Module) -> bool:
    return type(module).forward is nn.Sequential.forward and not is_followed(module) and not hasattr(module, "fuse")


def _warn_of_norm(model: nn.Module, name: str) -> None:
    if isinstance(model.get_submodule(name), _BatchNorm):
        around = name.rpartition(".")[0]
        better = f"insert behind {around} instead" if around else "insert behind the block that it ends"
        warnings.warn(
            f"{name} is a BatchNorm: tools that put another one in its place (SyncBatchNorm, freezing) lose the layer "
            f"behind it; {better}",
            stacklevel=3,
        )


def _look(model: nn.Module, input_size: Sequence[int] | None) -> _Model:
    counts = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    layers = [*added_layers(model).values(), *(module for module in model.modules() if isinstance(module, ULSAM))]
    known = {id(layer) for layer in layers}
    return _Model(
        trace(model, input_size),
        {key for key, count in counts.items() if count > 1},
        known,
        {id(part) for layer in layers for part in layer.modules()} - known,
        _fused_blocks(model),
    )


def _targets(model: nn.Module, names: list[str], seen: _Model, why_not: WhyNot) -> dict[str, Flow]:
    """What flows through each named place; raises unless every one of them is valid."""
    for name in names:
        if reason := why_not(model.get_submodule(name), seen.flows[name], seen):
            valid = [n for n, m in model.named_modules() if n and not why_not(m, seen.flows[n], seen)]
            valid = [n for n in valid if seen.flows[n].macs] or valid  # rather a block than a norm
            raise UlsamError(f"{name} {reason}; {_nearest(name, valid)}")
    return {name: seen.flows[name] for name in names}


def _nearest(name: str, valid: list[str]) -> str:
    """The valid places most like ``name``, those at the same depth first."""
    same_depth = [v for v in valid if v.count(".") == name.count(".")] or valid
    near = difflib.get_close_matches(name, same_depth, n=4, cutoff=0.0)
    return f"valid places near it: {', '.join(near)}" if near else "this model has no valid place"


def _why_not_map(module: nn.Module, flow: Flow, image: Shape | None) -> str | None:
    shape = flow.output_shape
    if shape is None:
        return "does not put out one tensor"
    if len(shape) == 3:
        return f"puts out tokens [B, N, C] = {list(shape)}; an edit needs a feature map [B, C, H, W]"
    if len(shape) != 4:
        return f"puts out {list(shape)}; an edit needs a feature map [B, C, H, W]"
    if getattr(module, "normalized_shape", None) == shape[-1:] != shape[1:2]:  # such as attention's heads of tokens
        return f"normalizes the last dimension of {list(shape)}; an edit needs a feature map [B, C, H, W]"
    _, _, height, width = cast(Shape, image)
    first, last = (abs(shape[n] / height - shape[n + 1] / width) for n in (1, 2))
    if first < last:  # a map has the proportions of the image, and they are found in front of the channels
        return f"puts out {list(shape)}, channels in the last dimension; an edit needs a feature map [B, C, H, W]"
    return None


#: Methods by which a block becomes another one for inference, in whose place an edit inside it would be lost.
_FUSERS = ("forward_fuse", "fuse_convs", "reparameterize", "switch_to_deploy")


def _fused_blocks(model: nn.Module) -> dict[int, str]:
    """The block that fuses what is inside it into other layers, by id of the modules inside."""
    found: dict[int, str] = {}
    for name, module in model.named_modules():
        fuses = any(hasattr(module, method) for method in _FUSERS)
        for part in module.modules() if fuses else module.children() if hasattr(module, "fuse") else ():
            if part is not module:
                found.setdefault(id(part), name)
    return found


def _why_not_both(module: nn.Module, flow: Flow, model: _Model) -> str | None:
    if id(module) in model.inside:
        return "is part of an attention layer"
    if isinstance(module, torch.jit.ScriptModule | torch.fx.GraphModule) or "_orig_mod" in module._modules:
        return "is compiled or traced by itself: edit the model before"
    if id(module) in model.fused:
        return f"lies inside {model.fused[id(module)]}, which fuses what it holds for inference: an edit would be lost"
    if flow.calls == 0:
        return "is not called in a forward pass"
    if flow.calls > 1:
        return f"is used {flow.calls} times in one forward pass"
    if id(module) in model.shared:
        return "is one module under two names"
    return _why_not_map(module, flow, model.flows[""].input_shape)


def _why_not_insert(module: nn.Module, flow: Flow, model: _Model) -> str | None:
    if hasattr(module, "ulsam"):
        return "holds something named ulsam already"
    return _why_not_both(module, flow, model)


def _why_not_replace(module: nn.Module, flow: Flow, model: _Model) -> str | None:
    if id(module) in model.layers:
        return f"is a {type(module).__name__} layer already"
    if is_followed(module):
        return "has a layer inserted behind it"
    if any(is_edited(part) for part in module.modules()):
        return "holds an edit already"
    if reason := _why_not_both(module, flow, model):
        return reason
    if flow.input_shape is None:
        return "does not take exactly one tensor"
    if flow.input_shape != flow.output_shape:
        return f"changes the shape from {list(flow.input_shape)} to {list(cast(Shape, flow.output_shape))}"
    if next(module.parameters(), None) is None:
        return "has no parameters to save"
    return None


def _layers(model: nn.Module, flows: Mapping[str, Flow], make: Callable[..., nn.Module]) -> dict[str, nn.Module]:
    """A new layer for what each place puts out, on that module's device and in its dtype and mode."""
    made = {}
    for name, flow in flows.items():
        module = model.get_submodule(name)
        like = reference_tensor(module, model)
        try:
            with torch.inference_mode(False):  # or its weights could not be trained
                layer = make(channels=cast(Shape, flow.output_shape)[1], device=like.device, dtype=like.dtype)
        except UlsamError as error:
            raise UlsamError(f"{name}: {error}") from None
        made[name] = layer.train(module.training)
    return made


def _owners(model: nn.Module) -> Counter[int]:
    """Under how many names each parameter is registered, by its id."""
    return Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))


def _edit(model: nn.Module, new: Mapping[str, nn.Module], do: Do, undo: Undo, input_size: Sequence[int] | None) -> None:
    """Put every new module at its name, or none: with them the model must run, and call each of them once."""
    done = []
    try:
        for name, module in new.items():
            do(model, name, module)
            done.append(name)
        try:
            flows = trace(model, input_size)
        except UlsamError as error:
            raise UlsamError(f"cannot edit {', '.join(new)}: afterwards {error}") from error
        for name in new:
            if flows[name].calls != 1:
                raise UlsamError(f"cannot edit {name}: the model would call it {flows[name].calls} times, not once")
    except BaseException:
        for name in reversed(done):
            undo(model, name)
        raise
    mark_yaml(model)
