"""Put ULSAM, or another attention layer, into any `nn.Module`: find where it fits, insert, replace, remove, and undo.

An edit happens or raises: on an error the model is as it was. An inserted layer is the child ``ulsam`` of the module
it follows (see `ulsam.surgery.layer_host`): every other parameter keeps its name, and a checkpoint of the unedited
model loads strictly, the new keys aside. What wraps a model (`torch.compile`, DataParallel) is looked through.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar, cast

import torch
import torch.fx
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ulsam.base.errors import UlsamError
from ulsam.layer.make_layer import Layer, make_layer
from ulsam.layer.ulsam import Form
from ulsam.surgery.edited import (
    attach,
    changes,
    detach,
    edited,
    lacks_weights,
    mark_yaml,
    reference_tensor,
    swap,
    swap_back,
    undo_edits,
)
from ulsam.surgery.find import blocks_at, host_of, targets, traced, why_not_insert, why_not_replace
from ulsam.surgery.places import At, match, unwrapped
from ulsam.surgery.trace import ModuleTrace, Shape, trace

ModelT = TypeVar("ModelT", bound=nn.Module)


Do = Callable[[nn.Module, str, nn.Module], None]
Undo = Callable[[nn.Module, str], None]


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

    Where an `nn.Sequential` stood, an `nn.Sequential` of that one layer stands: code that walks it keeps working.

    Args:
        model: any `nn.Module`.
        at: module names, globs (``*`` stays within one level, ``**`` crosses levels), or, for MobileNet-V1 and V2, the
            paper's layer numbers (1 = stem, then one a block): ``"14,17"``, ``[14, 17]``, ``"blocks.4.2"``.
        groups: subspaces of each new ULSAM layer, by default 4.
        layer: what to put there; see :func:`ulsam.layer.make_layer.make_layer`.
        form: as in :class:`ulsam.ULSAM`; like ``groups`` refused for other layers.
        momentum: as ``form``.
        width: of the :class:`ulsam.InvertedResidual` that ``layer="inverted_residual"`` is; behind another layer, put
            one of this width. :func:`ulsam.reconstruct` trains the new layer to output what the block did.
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
    flows = targets(inner, blocks_at(inner, at), traced(inner, input_size), why_not_replace)
    make = partial(make_layer, layer, groups=groups, form=form, momentum=momentum, width=width)
    _edit(inner, _layers(inner, flows, make), swap, swap_back, input_size)
    return model


def remove(model: ModelT, at: At, *, input_size: Sequence[int] | None = None) -> ModelT:
    """Take each named module out: `nn.Identity` in its place. It is the control for `replace`.

    Arguments, result and errors are those of :func:`replace`.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1))
    >>> remove(model, "1", input_size=(3, 16, 16))[1]
    Identity()
    """
    inner = unwrapped(model)
    names = targets(inner, blocks_at(inner, at), traced(inner, input_size), why_not_replace)
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
    subclass that runs it (`ulsam.surgery.layer_host`): no other name changes. It follows the last module of an
    `nn.Sequential`, and the BatchNorm behind a convolution. Arguments and errors are those of :func:`replace`;
    ``"17:1"`` and ``17`` both mean behind the paper's layer 17. The output may have another shape than the input, but
    must be a map [B, C, H, W]. An inserted narrow inverted residual stands for no block, and is not reconstructed. A
    place that is a BatchNorm warns, as tools that put another BatchNorm there lose the layer.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    >>> list(insert(model, "0", groups=2, input_size=(3, 16, 16)).state_dict())
    ['0.weight', '0.bias', '0.ulsam.depthwise.weight', '0.ulsam.pointwise.weight']
    """
    inner = unwrapped(model)
    traced_model = traced(inner, input_size)
    names = list(dict.fromkeys(host_of(inner, name, traced_model) for name in match(inner, after)))
    flows = targets(inner, names, traced_model, why_not_insert)
    for name in names:
        _warn_of_norm(inner, name)
    make = partial(make_layer, layer, groups=groups, form=form, momentum=momentum, width=width)
    layers = {f"{name}.ulsam": made for name, made in _layers(inner, flows, make).items()}
    _edit(inner, layers, attach, detach, input_size)
    return model


def undo(model: ModelT) -> ModelT:
    """Undo every :func:`insert`, :func:`replace` and :func:`remove`: the replaced modules return with their weights.

    They follow the model to the device, dtype and mode that it has by now. Blocks that `ulsam.reconstruct` trained for
    them are as before, with a warning where something trained them since. Layers that the model's own code holds are
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
    left = undo_edits(inner)
    if not places:
        raise UlsamError(f"this {type(model).__name__} holds no edit to undo")
    if left:
        names = ", ".join(name or "the whole model" for name in left)
        warnings.warn(f"{names}: reconstructed for the edit and trained since, so not as before the edit", stacklevel=2)
    return model


def _warn_of_norm(model: nn.Module, name: str) -> None:
    if isinstance(model.get_submodule(name), _BatchNorm):
        around = name.rpartition(".")[0]
        better = f"insert behind {around} instead" if around else "insert behind the block that it ends"
        warnings.warn(
            f"{name} is a BatchNorm: tools that put another one in its place (SyncBatchNorm, freezing) lose the layer "
            f"behind it; {better}",
            stacklevel=3,
        )


def _layers(model: nn.Module, flows: Mapping[str, ModuleTrace], make: Callable[..., nn.Module]) -> dict[str, nn.Module]:
    """A new layer for what each place outputs, on that module's device and in its dtype and mode."""
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
