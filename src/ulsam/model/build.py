"""Models: any timm classifier by name with edits, self-describing model files, and the paper's presets.

Importing this module registers the presets of `ulsam.model.presets` with timm.
"""

import dataclasses
import math
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors.torch import save as to_safetensors
from torch import nn

from ulsam.base.errors import UlsamError, first_line
from ulsam.base.files import read_json, write_atomic
from ulsam.base.tensor_limit import TensorLimit
from ulsam.layer.ulsam import ULSAM
from ulsam.model.hub import hub_folder, timm_weights
from ulsam.model.model_file import SPEC_KEY, classes_of, open_model_file
from ulsam.model.presets import PLACEMENTS
from ulsam.model.pretrained import HUB, LOCAL, class_names, is_hub_name, is_pretrained_name, means_file
from ulsam.model.same_outputs import check_same_outputs
from ulsam.model.spec import Json, ModelSpec
from ulsam.model.timm_spec import check_base, make_spec, pretrained_config, spec_from
from ulsam.model.trained import locate, names
from ulsam.model.weights import heads, load_weights, read_weights, shrink_head, with_classes
from ulsam.surgery.edited import changes, note_weights

__all__ = [
    "PLACEMENTS",
    "build",
    "file_content",
    "load",
    "load_weights",
    "make_spec",
    "meta_model",
    "read_spec",
    "read_weights",
    "save",
    "spec_of_name",
    "ulsam_parameters",
]

UNSAVED = 256_000_000
"""Bytes in memory beyond four times a model's weights: computed tables, and blocks that edits took out."""
_FORBIDDEN = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "features_only"}


def spec_of_name(model: str, *, size: int | None = None, model_args: Mapping[str, Json] | None = None) -> ModelSpec:
    """The spec that a name means: a model file's own, or that of timm's model with all its classes.

    Args:
        model: a timm name, a preset's included, a model file, the folder of a run, or a trained model of the package.
        size: height and width of the input in place of the model's own, in pixels.
        model_args: of a timm name, as of :func:`make_spec`.

    Raises:
        UlsamError: no such model, not a model file, or a size below 1.

    >>> spec = spec_of_name("mobilenetv2_100", size=96)
    >>> len(spec.classes), spec.input_size
    (1000, (3, 96, 96))
    """
    if size is not None and size < 1:
        raise UlsamError(f"`size` must be 1 pixel or more, not {size}")
    if means_file(model):
        spec = read_spec(model)
    elif not timm.is_model(model) and (Path(model).suffix or os.path.exists(model)):
        raise UlsamError(f"{model} is neither timm's name of a model nor a model file, NAME.safetensors")
    else:
        spec = make_spec(model, [], model_args=model_args)
        spec = dataclasses.replace(spec, classes=class_names({"num_classes": 1000, **pretrained_config(model)}))
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
            reads; of the base model, or of the edited one. A head of another shape is skipped, and so is one of other
            classes; that of the same classes in another order is put into this one.

    Returns:
        The model in training mode, and one line about each thing that the weights did not fill.

    Raises:
        UlsamError: the base is unknown, an edit is not possible, or the weights are not for this model.

    >>> from ulsam.model.spec import Edit
    >>> model, _ = build(ModelSpec("mobilenetv2_100", ("cat", "dog"), (Edit("replace", "14,17"),)))
    >>> type(model.blocks[5][2]).__name__
    'ULSAM'
    """
    check_base(spec.base)
    if forbidden := _FORBIDDEN & set(spec.model_args):
        raise UlsamError(f"model arguments may not hold {', '.join(sorted(forbidden))}")
    try:
        arguments = cast(dict[str, Any], spec.model_args)
        found = {"pretrained_cfg_overlay": timm_weights(spec.base)} if pretrained else {}
        model = timm.create_model(spec.base, pretrained=pretrained, num_classes=len(spec.classes), **arguments, **found)
    except UlsamError:
        raise
    except Exception as error:  # whatever timm raises at these arguments, or the hub
        if pretrained:
            meta_model(spec)  # raises unless it was the weights
            raise UlsamError(
                f"no hub weights of {spec.base} to be had: {first_line(error)} Name a weight file by `weights`"
            ) from error
        raise UlsamError(f"timm cannot build {spec.base} with {dict(spec.model_args)}: {first_line(error)}") from error
    for edit in spec.edits:
        edit.apply(model, spec.input_size)
    for old in changes(model)[1].values() if not pretrained else ():
        note_weights(old, filled=None)
    notes: list[str] = []
    if weights is not None:
        read = read_weights(weights)
        state = with_classes(model, read, classes_of(weights), spec.classes)
        others = read.keys() - state.keys()
        unfilled = load_weights(model, state, os.fspath(weights))
        notes = [f"{name}: of other classes there: skipped, starts fresh" for name in sorted(others)]
        notes += [note for note in unfilled if note.partition(":")[0] not in others]
    from_file, from_hub = weights is not None, pretrained and model.pretrained_cfg["num_classes"] == len(spec.classes)
    if notes or not (from_file or from_hub):
        shrink_head(model)
    return model.train(), notes


def meta_model(spec: ModelSpec) -> nn.Module:
    """A spec's model on the meta device: shapes to look at and count, no memory, no weights.

    Raises:
        UlsamError: as :func:`build`.

    >>> meta_model(ModelSpec("mobilenetv2_100", ("cat", "dog"))).classifier.weight.device
    device(type='meta')
    """
    with torch.device("meta"):
        return build(spec)[0]


def save(model: nn.Module, spec: ModelSpec, path: str | os.PathLike[str]) -> None:
    """Write a self-describing model file: safetensors, with the spec in its metadata.

    Raises:
        UlsamError: the model is not what the spec builds, or computes something else, or the file cannot be written.

    >>> import tempfile
    >>> from ulsam.model.spec import Edit
    >>> spec = ModelSpec("mobilenetv2_100", ("cat", "dog"), (Edit("insert", "17"),))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(build(spec)[0], spec, f"{folder}/model.safetensors")
    ...     model, same = load(f"{folder}/model.safetensors")
    >>> same == spec, model.training
    (True, False)
    """
    content = file_content(model, spec)
    with torch.random.fork_rng([]):
        built = build(spec)[0]
    built.load_state_dict(model.state_dict())
    check_same_outputs(model, built, spec.input_size)
    write_atomic(path, content)


def file_content(model: nn.Module, spec: ModelSpec) -> bytes:
    """What :func:`save` writes: the same for the same model and spec."""
    state = {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}
    _check_fit(spec, {name: tuple(value.shape) for name, value in state.items()}, "the model")
    return to_safetensors(state, metadata={SPEC_KEY: spec.to_json()})


def load(
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    *,
    pretrained: bool = False,
    weights: str | os.PathLike[str] | None = None,
) -> tuple[nn.Module, ModelSpec]:
    """Open a trained model, in eval mode; no code in a file is run.

    Args:
        path: a model file, the folder of a run, or the name of a trained model of the package, one of
            `ulsam.model.trained.names`: nothing is fetched then. Or a pretrained model: a timm name with a tag, such as
            ``mobilenetv2_100.ra_in1k``, or ``hf-hub:USER/MODEL``, which is fetched if it is not in the cache.
        device: where to.
        pretrained: with a timm name without a tag: load the weights that timm has by default.
        weights: with a timm name: load the weights in this file; it decides how many classes there are.

    Returns:
        The model, and its spec. The classes of an ImageNet model are called "WNID description".

    Raises:
        UlsamError: not a model file, cut off, from an unknown base, or not what its spec builds; a timm name without
            weights; weights that cannot be downloaded or opened, or are not for this model.

    >>> load("mobilenet.safetensors")
    Traceback (most recent call last):
    ulsam.base.errors.UlsamError: no model file mobilenet.safetensors
    >>> load("mobilenetv2_100")
    Traceback (most recent call last):
    ulsam.base.errors.UlsamError: mobilenetv2_100 is a model without weights: `pretrained=True` loads timm's, \
`weights=FILE` those in a file
    """
    if isinstance(path, str) and path not in names() and is_pretrained_name(path):
        with _same_random_numbers():
            model, spec = _load_name(path, pretrained, weights)
        return model.eval().to(device), spec
    if pretrained or weights is not None:
        option = "pretrained" if pretrained else "weights"
        if not os.path.exists(locate(path)):
            check_base(os.fspath(path))
        raise UlsamError(f"`{option}` is for a timm name; {path} has its own weights")
    with _same_random_numbers():
        model, spec = _load_file(path)
    return model.eval().to(device), spec


def _same_random_numbers() -> AbstractContextManager[None]:
    """Within it a model is made whose first weights, drawn at random, are then replaced."""
    return torch.random.fork_rng(devices=[])


def _load_file(path: str | os.PathLike[str]) -> tuple[nn.Module, ModelSpec]:
    spec = read_spec(path)
    with open_model_file(path) as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
    model, _ = build(spec)
    model.load_state_dict(state)
    for old in changes(model)[1].values():
        note_weights(old, filled=not old.state_dict())
    return model, spec


def _load_name(name: str, pretrained: bool, weights: str | os.PathLike[str] | None) -> tuple[nn.Module, ModelSpec]:
    """A pretrained model by its name; as :func:`load`."""
    if pretrained and weights is not None:
        raise UlsamError("give `pretrained` or `weights`, not both")
    if is_hub_name(name):
        if weights is not None:
            raise UlsamError(f"`weights` is for a timm name; {name} has its own weights")
        return _load_hub(name)
    check_base(name)
    if not pretrained and weights is None and "." not in name:
        raise UlsamError(
            f"{name} is a model without weights: `pretrained=True` loads timm's, `weights=FILE` those in a file"
        )
    spec = spec_of_name(name)
    if weights is None:
        return build(spec, pretrained=True)[0], spec
    if classes_of(weights) is not None:
        raise UlsamError(
            f"{os.fspath(weights)} is a model file, with its own classes and input size: name it in place of {name}"
        )
    state = read_weights(weights)
    plain = meta_model(spec)
    outputs = [key for key, part in plain.named_modules() if part in heads(plain)]
    counts = [len(state[f"{key}.weight"]) for key in outputs if f"{key}.weight" in state]
    if counts and counts[0] != len(spec.classes):
        spec = dataclasses.replace(spec, classes=class_names({"num_classes": counts[0]}))
    model, _ = build(spec)
    if notes := load_weights(model, state, os.fspath(weights)):
        raise UlsamError(f"{os.fspath(weights)} does not fit {name}: {notes[0].removesuffix(', starts fresh')}")
    return model, spec


def _load_hub(name: str) -> tuple[nn.Module, ModelSpec]:
    """A model of the hub, or in a folder of that form: a model file, as `ulsam push` writes it, or timm's format."""
    try:
        folder = hub_folder(name.removeprefix(HUB)) if name.startswith(HUB) else Path(name.removeprefix(LOCAL))
    except (OSError, ValueError) as error:  # a ValueError: what is no name of the hub
        raise UlsamError(f"no model {name} to be had: {first_line(error)}") from error
    file = folder / "model.safetensors"
    if file.exists():
        with open_model_file(file) as weights:
            ours = SPEC_KEY in (weights.metadata() or {})
        if ours:
            return _load_file(file)
    given = read_json(folder / "config.json")
    base, arguments = given.get("architecture"), dict(given.get("model_args") or {})
    arguments.pop("num_classes", None)  # as many as there are classes
    if not isinstance(base, str):
        raise UlsamError(f"{name} is no model of timm: its config.json names no architecture")
    check_base(base)
    if forbidden := _FORBIDDEN & set(arguments):
        raise UlsamError(f"model arguments may not hold {', '.join(sorted(forbidden))}")
    adapted = (given.get("pretrained_cfg") or {}).get("first_conv")
    if arguments.get("in_chans", 3) not in (1, 3) and adapted:  # timm would start that layer from random weights
        raise UlsamError(f"{name} takes {arguments['in_chans']} channels, with which timm cannot load its {adapted}")
    try:
        model = timm.create_model(f"{LOCAL}{folder}", pretrained=True)
    except Exception as error:  # whatever timm raises at this folder
        raise UlsamError(f"timm cannot build {name}: {first_line(error)}") from error
    config = model.pretrained_cfg
    if not config.get("num_classes"):
        raise UlsamError(f"{name} has no classifier: it gives features alone")
    spec = spec_from(base, class_names(config), (), config, model_args=arguments)
    if thresholds := given.get("thresholds"):  # of `ulsam.push`
        try:
            spec = dataclasses.replace(spec, thresholds=tuple(map(float, thresholds)))
        except (TypeError, ValueError) as error:
            raise UlsamError(f"the thresholds in the config.json of {name} are no list of numbers") from error
    _check_fit(spec, {key: tuple(value.shape) for key, value in model.state_dict().items()}, name)
    return model, spec


def read_spec(path: str | os.PathLike[str]) -> ModelSpec:
    """The spec in a model file, which builds a model of the file's shapes; no weights are read.

    Raises:
        UlsamError: not a model file, from an unknown base, or not what its spec builds.
    """
    with open_model_file(path) as file:
        metadata = file.metadata() or {}
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if SPEC_KEY not in metadata:
        raise UlsamError(
            f"{path} holds weights without a spec: name timm's model in its place, and this file as its `weights`; "
            "or name a model file"
        )
    try:
        spec = ModelSpec.from_json(metadata[SPEC_KEY])
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


def _check_fit(spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]], source: str) -> nn.Module:
    """Compare shapes with the spec's model on the meta device, which is returned, before any memory is taken.

    A spec that makes far more parameters than there are shapes is refused while it makes them.
    """
    too_many = f"{source} is not what its spec builds: it holds {len(shapes)} tensors, that many more"
    with TensorLimit(4_000 + 10 * len(shapes), too_many):  # far more, because edits take blocks out
        model = meta_model(spec)
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
