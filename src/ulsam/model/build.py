"""Models: any timm classifier by name with edits, self-describing model files, and the paper's presets.

Importing this module registers the presets of `ulsam.model.presets` with timm.
"""

import dataclasses
import difflib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from timm.data import resolve_data_config
from torch import Tensor, nn

from ulsam.base.errors import UlsamError, first_line
from ulsam.base.files import check_readable, write_atomic
from ulsam.base.tensor_limit import AtMost
from ulsam.layer.ulsam import ULSAM
from ulsam.model.presets import PLACEMENTS
from ulsam.model.spec import Edit, Json, ModelSpec
from ulsam.model.trained import locate, names
from ulsam.model.weights import read_weights
from ulsam.surgery.edited import changes, note_weights

__all__ = [
    "PLACEMENTS",
    "build",
    "load",
    "load_weights",
    "make_spec",
    "read_spec",
    "read_weights",
    "save",
    "sketch",
    "spec_of",
    "ulsam_parameters",
]

UNSAVED = 256_000_000
"""Bytes in memory beyond four times a model's weights: computed tables, and blocks that edits took out."""
_KEY = "ulsam"  # of the spec among a model file's metadata
_FORBIDDEN = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "features_only"}


def make_spec(
    base: str,
    classes: Sequence[str],
    edits: Sequence[Edit] = (),
    *,
    size: int | None = None,
    model_args: Mapping[str, Json] | None = None,
    **data: Any,
) -> ModelSpec:
    """The spec of a timm model with edits; what is not given comes from timm's data configuration of that model.

    Args:
        base: a timm name, one of `ulsam`'s presets included.
        classes: output names.
        edits: see :class:`ulsam.model.spec.Edit`.
        size: height and width of the input, in pixels.
        model_args: keyword arguments for `timm.create_model`.
        data: ``mean``, ``std``, ``interpolation`` or ``crop_pct`` in place of timm's.

    Raises:
        UlsamError: timm has no model of this name.

    >>> make_spec("mobilenetv2_100", ["cat", "dog"], size=160).input_size
    (3, 160, 160)
    """
    _check_base(base)
    known = timm.get_pretrained_cfg(base)
    config = resolve_data_config({"img_size": size, **data}, pretrained_cfg=known.to_dict() if known else {})
    channels = cast(int, (model_args or {}).get("in_chans", config["input_size"][0]))
    for key in ("mean", "std"):
        if len(config[key]) != channels:  # a model for other than RGB images
            config[key] = (sum(config[key]) / len(config[key]),) * channels
    return ModelSpec(
        base=base,
        classes=tuple(classes),
        edits=tuple(edits),
        model_args=dict(model_args or {}),
        input_size=(channels, *config["input_size"][1:]),
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


def spec_of(model: str, *, size: int | None = None, model_args: Mapping[str, Json] | None = None) -> ModelSpec:
    """The spec that a name means: a model file's own, or that of timm's model with all its classes.

    Args:
        model: a timm name, a preset's included, a model file NAME.safetensors, or a trained model of the package.
        size: height and width of the input in place of the model's own, in pixels.
        model_args: of a timm name, as of :func:`make_spec`.

    Raises:
        UlsamError: no such model, not a model file, or a size below 1.

    >>> spec = spec_of("mobilenetv2_100", size=96)
    >>> len(spec.classes), spec.input_size
    (1000, (3, 96, 96))
    """
    if size is not None and size < 1:
        raise UlsamError(f"`size` must be 1 pixel or more, not {size}")
    if model.endswith(".safetensors") or model in names():
        spec = read_spec(model)
    elif not timm.is_model(model) and (Path(model).suffix or os.path.exists(model)):
        raise UlsamError(f"{model} is neither timm's name of a model nor a model file, NAME.safetensors")
    else:
        spec = make_spec(model, [], model_args=model_args)
        config = timm.get_pretrained_cfg(model)
        classes = tuple(str(n) for n in range(config.num_classes if config else 1000))
        spec = dataclasses.replace(spec, classes=classes)
    if size is not None:
        spec = dataclasses.replace(spec, input_size=(spec.input_size[0], size, size))
    return spec


def build(
    spec: ModelSpec, *, pretrained: bool = False, weights: str | os.PathLike[str] | None = None
) -> tuple[nn.Module, list[str]]:
    """Build a spec's model.

    Args:
        spec: what to build; the model's outputs are its classes.
        pretrained: start from timm's hub weights of the base model.
        weights: start from this file instead: safetensors, or a checkpoint that ``torch.load(weights_only=True)``
            reads; of the base model, or of the edited one. A head of another shape is skipped.

    Returns:
        The model in training mode, and one line about each thing that the weights did not fill.

    Raises:
        UlsamError: the base is unknown, an edit is not possible, or the weights are not for this model.

    >>> model, _ = build(ModelSpec("mobilenetv2_100", ("cat", "dog"), (Edit("replace", "14,17"),)))
    >>> type(model.blocks[5][2]).__name__
    'ULSAM'
    """
    _check_base(spec.base)
    if forbidden := _FORBIDDEN & set(spec.model_args):
        raise UlsamError(f"model arguments may not hold {', '.join(sorted(forbidden))}")
    try:
        arguments = cast(dict[str, Any], spec.model_args)
        model = timm.create_model(spec.base, pretrained=pretrained, num_classes=len(spec.classes), **arguments)
    except UlsamError:
        raise
    except Exception as error:  # whatever timm raises at these arguments, or the hub
        if pretrained:
            sketch(spec)  # raises unless it was the weights
            raise UlsamError(
                f"no hub weights of {spec.base} to be had: {first_line(error)} Name a weight file by `weights`"
            ) from error
        raise UlsamError(f"timm cannot build {spec.base} with {dict(spec.model_args)}: {first_line(error)}") from error
    for edit in spec.edits:
        edit.apply(model, spec.input_size)
    for old in changes(model)[1].values() if not pretrained else ():
        note_weights(old, filled=None)
    notes = load_weights(model, read_weights(weights), os.fspath(weights)) if weights is not None else []
    from_file, from_hub = weights is not None, pretrained and model.pretrained_cfg["num_classes"] == len(spec.classes)
    if notes or not (from_file or from_hub):
        _shrink_head(model)
    return model.train(), notes


def sketch(spec: ModelSpec) -> nn.Module:
    """A spec's model on the meta device: shapes to look at and count, no memory, no weights.

    Raises:
        UlsamError: as :func:`build`.

    >>> sketch(ModelSpec("mobilenetv2_100", ("cat", "dog"))).classifier.weight.device
    device(type='meta')
    """
    with torch.device("meta"):
        return build(spec)[0]


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: str = "the state dict") -> list[str]:
    """Fill ``model`` with ``state``; only the classifier may be missing or of another shape.

    An edited model also takes the state of the model that it was before some or all of its edits: the layers that these
    added then stay as they are, and the modules that they put aside are filled too, for `ulsam.undo` to bring back.

    Returns:
        One line about each part that was not filled, new layers aside.

    Raises:
        UlsamError: an entry other than the classifier's is missing, left over or of another shape; nothing is loaded.

    >>> model = timm.create_model("mobilenetv2_100", num_classes=7)
    >>> load_weights(model, timm.create_model("mobilenetv2_100", num_classes=9).state_dict())
    ['classifier.weight: [9, 1280] there, [7, 1280] here: skipped, starts fresh', \
'classifier.bias: [9] there, [7] here: skipped, starts fresh']
    """
    own = model.state_dict()
    heads = _heads(model)
    added, aside = changes(model)
    before = {f"{name}.{key}": value for name, old in aside.items() for key, value in old.state_dict().items()}
    for place, old in aside.items():  # where the state has the old block, it is of a model from before that edit
        theirs = {f"{place}.{key}" for key in old.state_dict()}
        ours = {name for name in added if name.startswith(f"{place}.")}
        if (theirs - ours) & state.keys() and not (ours - theirs) & state.keys():
            own = {name: value for name, value in own.items() if name not in ours}
            added -= ours
    new, old_alone = (
        added - before.keys(),
        before.keys() - added,
    )  # a layer may have names of the block that it replaced
    if new & state.keys() or (added & state.keys() and not old_alone & state.keys()):  # the state of the edited model
        before = {name: before[name] for name in old_alone}
    else:
        own = {name: value for name, value in own.items() if name not in added}
    fitting: dict[str, Tensor] = {}
    notes: list[str] = []
    wrong: list[str] = []
    for name, value in own.items():
        head = any(model.get_submodule(name.rpartition(".")[0]) is layer for layer in heads)
        if name in state and state[name].shape == value.shape:
            fitting[name] = state[name]
        elif name in state:
            shapes = f"{name}: {list(state[name].shape)} there, {list(value.shape)} here"
            (notes if head else wrong).append(f"{shapes}: skipped, starts fresh" if head else shapes)
        elif not name.endswith("num_batches_tracked"):
            (notes if head else wrong).append(f"{name}: not there, starts fresh" if head else f"{name} is missing")
    wrong += [f"{name} belongs to no layer" for name in state if name not in own and name not in before]
    wrong += [f"{name} has another shape" for name in before.keys() & state if before[name].shape != state[name].shape]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise UlsamError(f"{source} does not fit this model: {wrong[0]}{more}")
    model.load_state_dict(fitting, strict=False)
    for place, old in aside.items():
        keys = {key: f"{place}.{key}" for key in old.state_dict()}
        filled = {key: state[name] for key, name in keys.items() if name in before.keys() & state}
        old.load_state_dict(filled, False)
        note_weights(old, all(key in filled for key in keys if not key.endswith("num_batches_tracked")))
    return notes


def save(model: nn.Module, spec: ModelSpec, path: str | os.PathLike[str]) -> None:
    """Write a self-describing model file: safetensors, with the spec in its metadata.

    Raises:
        UlsamError: the model is not what the spec builds, or the file cannot be written.

    >>> import tempfile
    >>> spec = ModelSpec("mobilenetv2_100", ("cat", "dog"), (Edit("insert", "17"),))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(build(spec)[0], spec, f"{folder}/model.safetensors")
    ...     model, same = load(f"{folder}/model.safetensors")
    >>> same == spec, model.training
    (True, False)
    """
    state = {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}
    _check_fit(spec, {name: tuple(value.shape) for name, value in state.items()}, "the model")
    write_atomic(path, to_safetensors(state, metadata={_KEY: spec.to_json()}))


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> tuple[nn.Module, ModelSpec]:
    """Rebuild a model from its file alone, in eval mode; no code in the file, nothing unpickled, nothing fetched.

    Args:
        path: a model file, or the name of a trained model of the package, one of `ulsam.model.trained.names`.
        device: where to.

    Raises:
        UlsamError: not a model file, cut off, from an unknown base, or not what its spec builds.

    >>> load("mobilenet.safetensors")
    Traceback (most recent call last):
    ulsam.base.errors.UlsamError: no model file mobilenet.safetensors
    """
    spec = read_spec(path)
    with _opened(path) as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
    model, _ = build(spec)
    model.load_state_dict(state)
    for old in changes(model)[1].values():
        note_weights(old, filled=not old.state_dict())
    return model.eval().to(device), spec


def read_spec(path: str | os.PathLike[str]) -> ModelSpec:
    """The spec in a model file, which builds a model of the file's shapes; no weights are read.

    Raises:
        UlsamError: not a model file, from an unknown base, or not what its spec builds.
    """
    with _opened(path) as file:
        metadata = file.metadata() or {}
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if _KEY not in metadata:
        raise UlsamError(
            f"{path} holds weights without a spec; start `ulsam.train` from it by `weights`, or pass a model file"
        )
    try:
        spec = ModelSpec.from_json(metadata[_KEY])
    except UlsamError as error:
        raise UlsamError(f"{path}: {error}") from error
    _check_memory(_check_fit(spec, shapes, str(path)), shapes, str(path))
    return spec


def ulsam_parameters(model: nn.Module) -> list[str]:
    """The names of all parameters of the model's ULSAM layers.

    >>> ulsam_parameters(nn.Sequential(nn.Conv2d(3, 8, 1), ULSAM(8)))
    ['1.depthwise.weight', '1.pointwise.weight']
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, ULSAM)]
    return [f"{name}.{leaf}" for name, layer in layers for leaf, _ in layer.named_parameters()]


def _shrink_head(model: nn.Module) -> None:
    """Start a new classifier near zero: timm's own start is wild with few classes, and upsets trained layers."""
    for layer in _heads(model):
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.01)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _heads(model: nn.Module) -> list[nn.Module]:
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "classifier"
    modules = dict(model.named_modules())
    return [modules[name] for name in ((names,) if isinstance(names, str) else names) if name in modules]


def _opened(path: str | os.PathLike[str]) -> Any:
    path = locate(path)
    if not os.path.exists(path) and (near := difflib.get_close_matches(str(path), names(), n=1)):
        raise UlsamError(f"no model file {path}; the package has a trained model {near[0]}")
    check_readable(path, "model file")
    if path.suffix in (".onnx", ".xml", ".pte"):
        raise UlsamError(f"{path} is an exported model; this takes the .safetensors model file that it was made from")
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise UlsamError(f"{path} is no safetensors file, or is cut off: {first_line(error)}") from error


def _check_base(base: str) -> None:
    if not timm.is_model(base):
        near = difflib.get_close_matches(base, timm.list_models(), n=3)
        raise UlsamError(f"timm has no model {base!r}{'; nearest: ' + ', '.join(near) if near else ''}")
    try:
        timm.get_pretrained_cfg(base)
    except RuntimeError as error:
        raise UlsamError(f"timm has no model {base!r}: {first_line(error)}") from error


def _check_fit(spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]], source: str) -> nn.Module:
    """Compare shapes with the spec's model on the meta device, which is returned, before any memory is taken.

    A spec that makes far more parameters than there are shapes is refused while it makes them.
    """
    too_many = f"{source} is not what its spec builds: it holds {len(shapes)} tensors, that many more"
    with AtMost(4_000 + 10 * len(shapes), too_many):  # far more, because edits take blocks out
        model = sketch(spec)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    wrong = sorted(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name))
    if wrong:
        here, there = shapes.get(wrong[0], "nothing"), expected.get(wrong[0], "nothing")
        raise UlsamError(f"{source} is not what its spec builds: {wrong[0]} is {here}, expected {there}")
    return model


def _check_memory(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Raise where a model takes far more memory than its weights: tables for each pair of positions are in no file."""
    parts = [model, *changes(model)[1].values()]
    asked = sum(value.nbytes for part in parts for value in [*part.parameters(), *part.buffers()])
    held = 4 * sum(math.prod(shape) for shape in shapes.values())
    if asked > 4 * held + UNSAVED:
        raise UlsamError(
            f"{source} is not what its spec builds: {asked / 1e6:.0f} MB in memory of {held / 1e6:.1f} MB of weights"
        )
