"""What an edit leaves in a model, and how it is undone: a layer hung behind a module, or one in a module's place.

The rules of who may be edited are in `ulsam.surgery.edit`.
"""

import copy
import warnings
from collections.abc import Collection, Mapping
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ulsam.base.errors import UlsamError
from ulsam.surgery.layer_host import LayerHost, attach_layer, check_detach_layer, detach_layer
from ulsam.surgery.places import original

ModelT = TypeVar("ModelT", bound=nn.Module)
_WEIGHTS = "ulsam_weights"  # attribute of a module that was put aside: see note_weights
_RECONSTRUCTED = "ulsam_reconstructed"  # attribute of a module that an edit put in: see note_reconstructed
State = dict[str, Tensor]


def edited(model: nn.Module) -> list[str]:
    """The names of the modules that edits put in, and of those that an inserted layer follows.

    >>> from ulsam import insert
    >>> edited(insert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), "0", input_size=(3, 16, 16)))
    ['0']
    """
    return [name for name, module in model.named_modules() if is_edited(module)]


def changes(model: nn.Module) -> tuple[set[str], dict[str, nn.Module]]:
    """What edits did: the state-dict keys that they added, and the modules that they put aside, by name.

    >>> from ulsam import replace
    >>> model = replace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)), "1", input_size=(3, 16, 16))
    >>> added, aside = changes(model)
    >>> sorted(added), list(aside)
    (['1.depthwise.weight', '1.pointwise.weight'], ['1'])
    """
    added = {f"{name}.{key}" for name, layer in added_layers(model).items() for key in layer.state_dict()}
    modules = model.named_modules()
    return added, {name: original(module) for name, module in modules if "replaced_module" in vars(module)}


def added_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that edits put in, of any kind, by name.

    >>> from ulsam import insert
    >>> list(added_layers(insert(nn.Sequential(nn.Conv2d(3, 8, 3)), "0", layer="se", input_size=(3, 16, 16))))
    ['0.ulsam']
    """
    names = []
    for name, module in model.named_modules():
        if "replaced_module" in vars(module):
            names.append(f"{name}.0" if type(module) is nn.Sequential else name)
        if is_followed(module):
            names.append(f"{name}.ulsam")
    found = {name: model.get_submodule(name) for name in names}
    return {
        name: layer for name, layer in found.items() if not isinstance(layer, nn.Identity)
    }  # a removal puts none in


def put_back(model: ModelT) -> ModelT:
    """Put every module that has weights back where an edit replaced or removed it; inserted layers stay.

    Kept blocks that were reconstructed since are as before, unless something else trained them further.

    >>> from ulsam import remove, insert
    >>> model = insert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)), "0", groups=2, input_size=(3, 9, 9))
    >>> [type(module).__name__ for module in put_back(remove(model, "1", input_size=(3, 9, 9)))], edited(model)
    (['LayerHostConv2d', 'Conv2d'], ['0'])
    """
    names = edited_blocks(model)
    restore_reconstructed(model, names)
    for name in names:
        swap_back(model, name)
    return model


def edited_blocks(model: nn.Module) -> list[str]:
    """The names of removed and replaced blocks whose weights are known, so that they can return.

    >>> from ulsam import remove
    >>> edited_blocks(remove(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)), "1", input_size=(3, 9, 9)))
    ['1']
    """
    return [name for name, old in changes(model)[1].items() if not lacks_weights(old)]


def undo_edits(model: nn.Module, kept: Collection[nn.Module] = ()) -> list[str]:
    """Undo the edits, all of them or none: all but those that put in the modules in ``kept``.

    Returns:
        Modules that were reconstructed for them and trained since, and so stay as they are.
    """
    places = [(name, model.get_submodule(name)) for name in edited(model)]
    inserted = [name for name, module in places if is_followed(module) and module.ulsam not in kept]
    replaced = [name for name, module in places if "replaced_module" in vars(module) and module not in kept]
    for name in inserted:
        check_detach_layer(model.get_submodule(name))
    left = restore_reconstructed(model, replaced)
    for name, _ in reversed(places):
        if name in inserted:
            detach(model, f"{name}.ulsam")
        if name in replaced:
            swap_back(model, name)
    mark_yaml(model)
    return left


def note_reconstructed(model: nn.Module, place: str, name: str, before: State) -> None:
    """Note at an edited place that a module was trained for it, and what it was before, so that undoing restores it."""
    after = {key: value.clone() for key, value in model.get_submodule(name).state_dict().items()}
    noted = vars(model.get_submodule(place)).setdefault(_RECONSTRUCTED, {})
    if name in noted and _are_equal(before, noted[name][1]):  # it is reconstructed once more
        before = noted[name][0]
    noted[name] = before, after


def restore_reconstructed(model: nn.Module, places: Collection[str]) -> list[str]:
    """Give modules that were reconstructed for these places their weights of before.

    Returns:
        The names of those that something trained since; they stay as they are.
    """
    noted = [vars(model.get_submodule(place)).get(_RECONSTRUCTED, {}) for place in places]
    waiting = [(model.get_submodule(name), name, *states) for entry in noted for name, states in entry.items()]
    while True:  # one at a time, as one may lie in another
        ready = next((at for at, each in enumerate(waiting) if _are_equal(each[0].state_dict(), each[3])), None)
        if ready is None:
            return [name for _, name, _, _ in waiting]
        module, _, before, _ = waiting.pop(ready)
        module.load_state_dict(before)


def _are_equal(now: State, then: State) -> bool:
    """Whether weights are the same but for device and dtype, those of ``now``."""
    return now.keys() == then.keys() and all(torch.equal(now[key], then[key].to(now[key])) for key in now)


def note_weights(old: nn.Module, filled: bool | None) -> None:
    """Note of a module that was put aside where its weights are from, for :func:`lacks_weights`.

    Args:
        old: the module.
        filled: None: it was just made; then whether a file that the model was filled from held weights of it. One that
            a file did not hold keeps what it had from elsewhere.
    """
    if filled:
        vars(old).pop(_WEIGHTS, None)
    elif filled is None or _WEIGHTS in vars(old):
        vars(old)[_WEIGHTS] = filled


def lacks_weights(old: nn.Module) -> bool:
    """Whether a module that was put aside is as it was made, while the model was filled from a file without it.

    >>> block = nn.Conv2d(3, 8, 3)
    >>> note_weights(block, None)
    >>> note_weights(block, False)
    >>> lacks_weights(block)
    True
    """
    return vars(old).get(_WEIGHTS) is False


def are_whole(old: nn.Module, weights: Mapping[str, Tensor]) -> bool:
    """Whether these are all weights of a module; BatchNorm's counters, which old files lack, may be missing.

    >>> are_whole(nn.BatchNorm2d(2, affine=False), {"running_mean": torch.zeros(2), "running_var": torch.ones(2)})
    True
    """
    return all(key in weights for key in old.state_dict() if not key.endswith("num_batches_tracked"))


def attach(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put ``layer`` behind its host, the module before ``.ulsam`` in ``name``."""
    attach_layer(model.get_submodule(name.removesuffix(".ulsam")), layer)


def detach(model: nn.Module, name: str) -> None:
    """Undo :func:`attach`."""
    detach_layer(model.get_submodule(name.removesuffix(".ulsam")))


def swap(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` at ``name``; it remembers what stood there, unseen by parameters() and state_dict()."""
    old = model.get_submodule(name)
    if type(old).forward is nn.Sequential.forward:
        new = nn.Sequential(new)
    keep_attributes(old, new)
    _set(model, name, new.train(old.training))
    like = reference_tensor(new, model)
    vars(new)["replaced_module"] = (old, like.device, like.dtype)
    new.register_load_state_dict_pre_hook(_fill_replaced)


def _fill_replaced(new: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict[str, Any], *_: object) -> None:
    """Give the module that was put aside its weights too, where a state dict of the unedited model is loaded."""
    held = vars(new).get("replaced_module")
    if not held:  # a copy to look at, or to train
        return
    old = held[0]
    own = old.state_dict()
    found = {key: value for key in own if (value := state.get(prefix + key)) is not None}
    if not found or own.keys() & new.state_dict().keys():  # whose weights would they be?
        return
    if are_whole(old, found) and all(value.shape == own[key].shape for key, value in found.items()):
        old.load_state_dict(found, strict=False, assign=bool(metadata.get("assign_to_params_buffers")))
        note_weights(old, filled=True)


def swap_back(model: nn.Module, name: str) -> None:
    """Put back what stood at ``name``, moved and switched as the model was meanwhile, and frozen if all of it is."""
    new = model.get_submodule(name)
    old, *was = cast(Any, new).replaced_module
    like = reference_tensor(new, model)
    if [like.device, like.dtype] != was:
        old.to(like.device, like.dtype)
    if old.training != new.training:
        old.train(new.training)
    learns = [parameter.requires_grad for parameter in model.parameters()]
    if learns and not any(learns):
        old.requires_grad_(False)
    _set(model, name, old)


def reference_tensor(module: nn.Module, model: nn.Module) -> Tensor:
    """A tensor with the device and dtype of ``module``, or, where it has no parameters, of ``model``."""
    return next(module.parameters(), next(model.parameters(), torch.empty(0)))


def is_followed(module: nn.Module) -> bool:
    """Whether a layer was inserted behind this module."""
    return isinstance(module, LayerHost) and "ulsam" in module._modules  # a slice of a Sequential may have none


def is_edited(module: nn.Module) -> bool:
    """Whether this module was put in by an edit, or is followed by one that was."""
    return "replaced_module" in vars(module) or is_followed(module)


def _set(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def keep_attributes(old: nn.Module, new: nn.Module) -> None:
    """Give ``new`` the plain attributes of ``old`` that it lacks: the code around may read them, as Ultralytics does.

    Plain are numbers, texts and other values without a tensor, a module or a function in them.

    >>> old, new = nn.ReLU(), nn.Identity()
    >>> old.i, old.type = 6, "block"
    >>> keep_attributes(old, new)
    >>> new.i, new.type
    (6, 'block')
    """
    has = (set(dir(new)) - set(dir(nn.Module))) | set(vars(new))  # what nn.Module has may be covered, as it was in old
    for key, value in vars(old).items():
        plain = not any(isinstance(leaf, Tensor) or callable(leaf) for leaf in tree_leaves(value))
        if plain and key not in has and not key.startswith("_") and key != "replaced_module":
            setattr(new, key, value)


class EditedYaml(dict[str, Any]):
    """The ``yaml`` of an edited model: Ultralytics builds a model anew from it to train, and that one lacks the edits.

    It begins with a copy of this dictionary by itself, which is refused; in copies of the whole model it is copied.

    >>> copy.deepcopy(EditedYaml(nc=2))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ulsam.base.errors.UlsamError: a model built anew lacks the edits: yolo.train(trainer=ulsam...trainer_for(yolo))
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        if not memo:
            raise UlsamError(
                "a model built anew lacks the edits: yolo.train(trainer=ulsam.ultralytics.trainer_for(yolo))"
            )
        return type(self)(copy.deepcopy(dict(self), memo))


def mark_yaml(model: nn.Module) -> None:
    """Mark the ``yaml`` of a model that is built from one, or take the mark off where no edit is left."""
    found = getattr(model, "yaml", None)
    if isinstance(found, dict):
        holds_edits = bool(edited(model))
        if holds_edits and not isinstance(found, EditedYaml):
            warnings.warn(
                "yolo.train() would build this model anew, without the edits: pass it "
                "trainer=ulsam.ultralytics.trainer_for(yolo)",
                stacklevel=4,
            )
        model.yaml = EditedYaml(found) if holds_edits else dict(found)  # type: ignore[assignment]
