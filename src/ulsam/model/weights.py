"""Weights from elsewhere: the state dict in a safetensors file or a checkpoint of other programs; and into a model."""

import argparse
import copy
import os
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, cast

import numpy as np
import safetensors.torch
import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from ulsam.base.class_names import class_numbers
from ulsam.base.errors import UlsamError, a_few, first_line
from ulsam.base.file_signatures import kind_of
from ulsam.base.files import check_readable
from ulsam.base.logs import say
from ulsam.base.reading import open_regular
from ulsam.model.trained import EXPORTED, locate
from ulsam.surgery.edited import added_layers, are_whole, changes, is_followed, note_weights

Entries = dict[str, Tensor]

_AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema")
_PLAIN = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights", "params")
_WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "network.")  # of DataParallel, torch.compile, Lightning
_COUNTERS = ("total_ops", "total_params")  # thop leaves them in every layer
_OTHERS = ("optim", "sched", "scaler", "loss", "criterion")  # parts of names of what holds tensors, but no model
_DEPTH = 3  # of dictionaries within each other that are searched

# what checkpoints hold beside tensors, all of it plain values; the names are those of every Python and NumPy
_scalar = np.float64(0).__reduce__()[0]
_VALUES: list[Any] = [
    argparse.Namespace,
    *(
        (pure, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")  # the latter by Python 3.13
        for pure in (PurePosixPath, PureWindowsPath)
        for name in (pure.__name__, pure.__name__.removeprefix("Pure"))
    ),
    (_scalar, "numpy._core.multiarray.scalar"),
    (_scalar, "numpy.core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")),
]


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict in a safetensors file or a PyTorch checkpoint; nothing in the file is ever run.

    In a checkpoint it may lie among other entries. Averaged weights are preferred, and a line of the log says so. A
    prefix that all names have in common, such as that of DataParallel or Lightning, is taken off.

    Args:
        path: of the file, or the name of a trained model of the package.

    Raises:
        UlsamError: no such file, not weights, or several state dicts with nothing to prefer one.
    """
    path = locate(path)
    check_readable(path, "weight file")
    content = _content(path)
    name, state = _found(content, path)
    if name.partition(".")[0] in _AVERAGED or "n_averaged" in state:
        say(f"note    {path}: takes the averaged weights, {name or 'n_averaged'}")
    elif name and name.partition(".")[0] not in _PLAIN:
        say(f"note    {path}: takes the weights named {name}")
    tensors = _tensors(state)
    if "pytorch-lightning_version" in content:  # it saves losses and metrics beside the model
        tensors = {key: value for key, value in tensors.items() if key.startswith("model.")} or tensors
    return _unwrapped(tensors)


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: str = "the state dict") -> list[str]:
    """Fill ``model`` with ``state``; only the classifier may be missing, of another shape, or left over.

    An edited model also takes the state of the model that it was before some or all of its edits: the layers that these
    added then stay as they are, and the modules that they put aside are filled too, for `ulsam.undo` to bring back.

    Returns:
        One line about each part that was not filled, new layers aside.

    Raises:
        UlsamError: an entry other than the classifier's is missing, left over or of another shape; nothing is loaded.

    >>> import timm
    >>> model = timm.create_model("mobilenetv2_100", num_classes=7)
    >>> load_weights(model, timm.create_model("mobilenetv2_100", num_classes=9).state_dict())
    ['classifier.weight: [9, 1280] there, [7, 1280] here: skipped, starts fresh', \
'classifier.bias: [9] there, [7] here: skipped, starts fresh']
    """
    state = _adapted(model, state, model.state_dict())
    own, put_aside = _expected(model, state)
    head, left = _head_names(model), [name for name in state if name not in own and name not in put_aside]
    if left or own.keys() - state.keys():
        alone = _classifier_alone(model)
        if not alone & state.keys():  # of a model without classes
            head |= {name.rpartition(".")[0] for name in alone}
        elif not model.num_classes:
            state = {name: value for name, value in state.items() if name not in alone}
    fitting, notes, wrong = _compared(own, state, head)
    notes += [f"{name}: there, but the model has no classes: skipped" for name in left if name not in state]
    wrong += [f"{name} belongs to no layer" for name in left if name in state]
    wrong += [
        f"{name} has another shape" for name in put_aside.keys() & state if put_aside[name].shape != state[name].shape
    ]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise UlsamError(f"{source} does not fit this model: {wrong[0]}{more}")
    model.load_state_dict(fitting, strict=False)
    _fill_put_aside(model, {name: state[name] for name in put_aside.keys() & state})
    return notes


def with_classes(
    model: nn.Module, state: Mapping[str, Tensor], theirs: Sequence[str] | None, ours: Sequence[str]
) -> Mapping[str, Tensor]:
    """The state with its classifier for the classes of the model.

    The same classes in another order are put into that of the model. A classifier of as many other classes would be
    taken for theirs, and is left out. One of another size is left as it is: :func:`load_weights` skips it.

    Args:
        model: a timm classifier.
        state: of such a model.
        theirs: its classes; None: not known.
        ours: those of the model.

    >>> model = nn.Sequential()
    >>> model.classifier = nn.Linear(2, 2)
    >>> state = {"classifier.bias": torch.tensor([1.0, 2.0])}
    >>> with_classes(model, state, ("wren", "robin"), ("robin", "wren"))
    {'classifier.bias': tensor([2., 1.])}
    >>> with_classes(model, state, ("cat", "dog"), ("robin", "wren"))
    {}
    """
    if theirs is None or list(theirs) == list(ours) or len(theirs) != len(ours):
        return state
    numbers = class_numbers(ours, theirs)
    order = [numbers[name] for name in ours if name in numbers]
    head = {name for name in state if name.rpartition(".")[0] in _head_names(model)}
    if len(set(order)) < len(ours):
        return {name: value for name, value in state.items() if name not in head}
    rows = {name: value[order] for name, value in state.items() if name in head and value.shape[:1] == (len(ours),)}
    return {**state, **rows}


def _expected(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[Entries, Entries]:
    """The entries of the model that ``state`` should have, and those of modules put aside by edits that it may have.

    The state may be of the edited model, of the model before all edits, or of one before some of them.
    """
    own = model.state_dict()
    added, aside = changes(model)
    put_aside = {f"{name}.{key}": value for name, old in aside.items() for key, value in old.state_dict().items()}
    for place, old in aside.items():  # where the state has the old block, it is of a model from before that edit
        theirs = {f"{place}.{key}" for key in old.state_dict()}
        ours = {name for name in added if name.startswith(f"{place}.")}
        if (theirs - ours) & state.keys() and not (ours - theirs) & state.keys():
            own = {name: value for name, value in own.items() if name not in ours}
            added -= ours
    for name, layer in added_layers(model).items():  # where it has nothing of an inserted layer, likewise
        ours = {f"{name}.{key}" for key in layer.state_dict()}
        host, _, leaf = name.rpartition(".")
        if leaf == "ulsam" and is_followed(model.get_submodule(host)) and not ours & state.keys():
            own = {name: value for name, value in own.items() if name not in ours}
            added -= ours
    new = added - put_aside.keys()  # a layer may have names of the block that it replaced
    old_alone = put_aside.keys() - added
    is_edited = new & state.keys() or (added & state.keys() and not old_alone & state.keys())
    if is_edited:
        return own, {name: put_aside[name] for name in old_alone}
    return {name: value for name, value in own.items() if name not in added}, put_aside


def _compared(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], head_names: Collection[str]
) -> tuple[Entries, list[str], list[str]]:
    """The entries that fit; a line about each of the classifier that does not, and one about each other."""
    fitting: Entries = {}
    notes: list[str] = []
    wrong: list[str] = []
    for name, value in own.items():
        is_head = name.rpartition(".")[0] in head_names
        if name in state and state[name].shape == value.shape:
            fitting[name] = state[name]
        elif name in state:
            shapes = f"{name}: {list(state[name].shape)} there, {list(value.shape)} here"
            (notes if is_head else wrong).append(f"{shapes}: skipped, starts fresh" if is_head else shapes)
        elif not name.endswith("num_batches_tracked"):
            lacks = f"{name}: not there, starts fresh" if is_head else f"{name} is missing"
            (notes if is_head else wrong).append(lacks)
    return fitting, notes, wrong


def _head_names(model: nn.Module) -> set[str]:
    found = heads(model)
    return {name for name, module in model.named_modules() if any(module is head for head in found)}


def _classifier_alone(model: nn.Module) -> set[str]:
    """The entries that timm's model has only where it has classes: the classifier's, and those of a norm before it."""
    if not hasattr(model, "reset_classifier"):
        return set()
    other: Any = copy.deepcopy(model)
    other.reset_classifier(0 if model.num_classes else 1)
    return set(model.state_dict()) ^ set(other.state_dict())


def _fill_put_aside(model: nn.Module, filling: Mapping[str, Tensor]) -> None:
    """Fill the modules that edits put aside, as far as it goes, and note whether each is whole."""
    for place, old in changes(model)[1].items():
        names = {key: f"{place}.{key}" for key in old.state_dict()}
        filled = {key: filling[name] for key, name in names.items() if name in filling}
        old.load_state_dict(filled, strict=False)
        note_weights(old, are_whole(old, filled))


def _adapted(model: nn.Module, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The state with the first convolution's weights for the channels of this model, where they are for RGB.

    By timm's rule: for gray their sum over the colors; otherwise they are repeated, and scaled to keep the sum.
    """
    first = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv") or ()
    found = dict(state)
    for name in (f"{place}.weight" for place in ((first,) if isinstance(first, str) else first)):
        if name in state and name in own and own[name].ndim == 4:
            theirs, ours = state[name], own[name]
            if theirs.ndim == 4 and theirs.shape[1] == 3 != ours.shape[1]:
                say(f"note    {name} is for RGB: adapted to {ours.shape[1]} channels")
                found[name] = adapt_input_conv(ours.shape[1], theirs)
    return found


def shrink_head(model: nn.Module) -> None:
    """Start a new classifier near zero: timm's own start is wild with few classes, and upsets trained layers."""
    for layer in heads(model):
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.01)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def heads(model: nn.Module) -> list[nn.Module]:
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "classifier"
    modules = dict(model.named_modules())
    return [modules[name] for name in ((names,) if isinstance(names, str) else names) if name in modules]


def _content(path: Path) -> dict[Any, Any]:
    """What the file holds."""
    with open_regular(path) as file:
        kind = kind_of(file.read(64))
    if path.suffix in EXPORTED:
        kind = "an exported model, whose weights are folded: name the model file or the checkpoint it was made from"
    elif _is_torchscript(path):
        kind = "a TorchScript archive, which is a whole program: save the model's state_dict() alone"
    if kind:
        raise UlsamError(f"{path} holds no weights that can be read safely: it is {kind}")
    try:
        if path.suffix == ".safetensors":
            return cast(dict[Any, Any], safetensors.torch.load_file(path))
        with torch.serialization.safe_globals(_VALUES):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken file makes its reader raise
        raise UlsamError(f"{path} holds no weights that can be read safely: {_reason(path, error)}") from error
    if not isinstance(content, dict):
        raise UlsamError(
            f"{path} is no state dict, but a {type(content).__name__}: save the model's state_dict() alone"
        )
    return content


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _reason(path: Path, error: Exception) -> str:
    """Why the file could not be read, without PyTorch's advice to run what is in it."""
    with open_regular(path) as file:
        head = file.read(2)
    if path.suffix != ".safetensors" and not head.startswith((b"PK", b"\x80")):
        return "it is neither a checkpoint of PyTorch nor safetensors"
    try:
        with torch.serialization.safe_globals(_VALUES):
            code = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # as above
        code = []
    if code:
        needed = a_few(sorted(code, key=lambda name: (not name.startswith(("torch.nn", "timm.")), name))[:2])
        advice = "save the model's state_dict() alone"
        return f"it holds a whole model, or other objects than weights: {advice} (it needs the code of {needed})"
    return first_line(error).partition("This file can still be loaded")[0].strip() or type(error).__name__


def _found(content: Mapping[Any, Any], path: Path) -> tuple[str, Mapping[str, Any]]:
    """The state dict, and under which name the file holds it."""
    states = dict(_states(content))
    plain = next((name for name in states if name.partition(".")[0] in _PLAIN), None)
    averaged = [name for name in states if name.partition(".")[0] in _AVERAGED]
    for name in averaged:  # and not the average's own counters
        if plain is None or _unwrapped(_tensors(states[name])).keys() == _unwrapped(_tensors(states[plain])).keys():
            return name, states[name]
    if plain is not None:
        return plain, states[plain]
    if named := [name for name in _PLAIN if isinstance(content.get(name), dict)]:
        raise UlsamError(f"{path}: {named[0]!r} holds no state dict alone; save the model's state_dict() alone")
    if "" in states:
        return "", states[""]
    if len(states) == 1:
        return next(iter(states.items()))
    keys = a_few([repr(key) for key in states or content])
    if states:
        raise UlsamError(f"{path} holds several state dicts, {keys}: save the one of the model alone")
    raise UlsamError(f"{path} is no state dict: it holds {keys or 'nothing'}; save the model's state_dict() alone")


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Its tensors, without what other programs count in them."""
    others = (*_COUNTERS, "n_averaged")
    return {
        key: value for key, value in state.items() if isinstance(value, Tensor) and key.rpartition(".")[2] not in others
    }


def _unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes that all names have in common."""
    found = dict(tensors)
    while prefix := next((one for one in _WRAPPERS if found and all(key.startswith(one) for key in found)), None):
        found = {key.removeprefix(prefix): value for key, value in found.items()}
    return found


def _states(content: Mapping[Any, Any], name: str = "", depth: int = 0) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """All that could be the state dict of a model, with their names; what lies within one is no other one."""
    if _is_state(content):
        yield name, content
    elif depth < _DEPTH:
        for key, value in content.items():
            if isinstance(key, str) and isinstance(value, dict) and not any(o in key for o in _OTHERS):
                yield from _states(value, f"{name}.{key}" if name else key, depth + 1)


def _is_state(value: Mapping[Any, Any]) -> bool:
    """Whether this has names alone as keys, and tensors, and beside them nothing but plain numbers and texts."""
    plain = all(isinstance(item, Tensor | np.generic | int | float | str | None) for item in value.values())
    return (
        plain
        and all(isinstance(key, str) for key in value)
        and any(isinstance(item, Tensor) for item in value.values())
    )
