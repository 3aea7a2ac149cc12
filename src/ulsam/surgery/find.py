"""Where a model can be edited: the candidates, what a selection means, and why a place will not do."""

import difflib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.fx
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ulsam.base.errors import UlsamError
from ulsam.layer.ulsam import ULSAM, divisors
from ulsam.surgery.edited import added_layers, is_edited, is_followed
from ulsam.surgery.layer_host import host_class
from ulsam.surgery.places import At, match, unwrapped, words
from ulsam.surgery.trace import ModuleTrace, Shape, is_feature_map, trace


class TracedModel(NamedTuple):
    """What is known of a model before it is edited."""

    flows: dict[str, ModuleTrace]
    shared: set[int]  # ids of modules registered under more than one name
    layers: set[int]  # ids of ULSAM layers and of those that edits put in
    inside: set[int]  # ids of modules that are part of such a layer
    fused: dict[int, str]  # the block that fuses it, by id of a module


WhyNot = Callable[[nn.Module, ModuleTrace, TracedModel], str | None]


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
    traced_model = traced(model, input_size)
    owners = _owners(model)
    blocks = []
    for name, module in model.named_modules():
        if not name or why_not_replace(module, traced_model.flows[name], traced_model):
            continue
        if not leaves and next((p for child in module.children() for p in child.parameters()), None) is None:
            continue
        _, channels, height, width = cast(tuple[int, int, int, int], traced_model.flows[name].output_shape)
        inside = _owners(module)
        saved = sum(p.numel() for p in module.parameters() if inside[id(p)] == owners[id(p)])
        params = saved - 2 * channels
        macs = traced_model.flows[name].macs - 2 * channels * height * width
        blocks.append(Candidate(name, host_class(module).__name__, (channels, height, width), params, macs))
    return blocks


def blocks_at(model: nn.Module, at: At) -> list[str]:
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


def host_of(model: nn.Module, name: str, traced_model: TracedModel) -> str:
    """The module whose output is the output of ``name``, and which nothing fuses away.

    That is the last one of a plain `nn.Sequential`; of a convolution that a BatchNorm follows, the BatchNorm, as the
    two are one to whatever fuses them; and of a BatchNorm at the end of an `nn.Sequential` that Sequential.
    """
    module = model.get_submodule(name)
    while _is_plain_sequence(module) and len(module._modules):
        leaf, module = cast(tuple[str, nn.Module], next(reversed(module._modules.items())))
        name = f"{name}.{leaf}"
    norm = traced_model.flows[name].norm_behind
    name = norm if norm and id(model.get_submodule(norm)) not in traced_model.shared else name
    parent, _, leaf = name.rpartition(".")
    around = model.get_submodule(parent)
    if not isinstance(model.get_submodule(name), _BatchNorm) or not parent or traced_model.flows[parent].calls != 1:
        return name
    return parent if _is_plain_sequence(around) and leaf == next(reversed(around._modules)) else name


def _is_plain_sequence(module: nn.Module) -> bool:
    return type(module).forward is nn.Sequential.forward and not is_followed(module) and not hasattr(module, "fuse")


def traced(model: nn.Module, input_size: Sequence[int] | None) -> TracedModel:
    counts = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    layers = [*added_layers(model).values(), *(module for module in model.modules() if isinstance(module, ULSAM))]
    known = {id(layer) for layer in layers}
    return TracedModel(
        trace(model, input_size),
        {key for key, count in counts.items() if count > 1},
        known,
        {id(part) for layer in layers for part in layer.modules()} - known,
        _fused_blocks(model),
    )


def targets(model: nn.Module, names: list[str], traced_model: TracedModel, why_not: WhyNot) -> dict[str, ModuleTrace]:
    """What flows through each named place; raises unless every one of them is valid."""
    for name in names:
        if reason := why_not(model.get_submodule(name), traced_model.flows[name], traced_model):
            valid = [n for n, m in model.named_modules() if n and not why_not(m, traced_model.flows[n], traced_model)]
            valid = [n for n in valid if traced_model.flows[n].macs] or valid  # rather a block than a norm
            raise UlsamError(f"{name} {reason}; {_nearest(name, valid)}")
    return {name: traced_model.flows[name] for name in names}


def _nearest(name: str, valid: list[str]) -> str:
    """The valid places most like ``name``, those at the same depth first."""
    same_depth = [v for v in valid if v.count(".") == name.count(".")] or valid
    near = difflib.get_close_matches(name, same_depth, n=4, cutoff=0.0)
    return f"valid places near it: {', '.join(near)}" if near else "this model has no valid place"


def _why_not_map(module: nn.Module, flow: ModuleTrace, image: Shape | None) -> str | None:
    shape = flow.output_shape
    if shape is None:
        return "does not output one tensor"
    if len(shape) == 3:
        return f"outputs tokens [B, N, C] = {list(shape)}; an edit needs a feature map [B, C, H, W]"
    if len(shape) != 4:
        return f"outputs {list(shape)}; an edit needs a feature map [B, C, H, W]"
    if getattr(module, "normalized_shape", None) == shape[-1:] != shape[1:2]:  # such as attention's heads of tokens
        return f"normalizes the last dimension of {list(shape)}; an edit needs a feature map [B, C, H, W]"
    if not is_feature_map(shape, cast(Shape, image)):
        return f"outputs {list(shape)}, channels in the last dimension; an edit needs a feature map [B, C, H, W]"
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


def _why_not_both(module: nn.Module, flow: ModuleTrace, model: TracedModel) -> str | None:
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


def why_not_insert(module: nn.Module, flow: ModuleTrace, model: TracedModel) -> str | None:
    if hasattr(module, "ulsam"):
        return "holds something named ulsam already"
    return _why_not_both(module, flow, model)


def why_not_replace(module: nn.Module, flow: ModuleTrace, model: TracedModel) -> str | None:
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
    if any(map(_has_hooks, module.modules())):
        return "has forward hooks, as those of features_only, which would no longer be called: remove them before"
    return None


def _has_hooks(module: nn.Module) -> bool:
    """Whether someone looks at what a module is given or outputs; PyTorch's own hooks compute its weight."""
    before = module._forward_pre_hooks.values()
    return bool(module._forward_hooks) or any(not type(hook).__module__.startswith("torch.nn.utils") for hook in before)


def _owners(model: nn.Module) -> Counter[int]:
    """Under how many names each parameter is registered, by its id."""
    return Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
