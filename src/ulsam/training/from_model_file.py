"""Training that begins from a model file: the settings that the file stands for."""

import os
from collections.abc import Mapping
from typing import Any

from ulsam.base.errors import UlsamError
from ulsam.model.build import read_spec
from ulsam.model.pretrained import is_hub_name, means_file
from ulsam.model.spec import ModelSpec
from ulsam.model.trained import locate, names

_DROPOUT = ("drop_rate", "drop_path_rate")


def settings_from(given: Mapping[str, Any]) -> dict[str, Any]:
    """What to add to settings whose ``model`` is a model file, a run's folder, or a trained model of the package.

    Architecture, edits, image and weights become those of the file. Edits and ``model_args`` of the settings are added,
    and what they say of the image stays. How the file's model was trained, its dropout too, is not taken.

    Args:
        given: settings of `ulsam.TrainConfig`; None is one that was not given.

    Raises:
        UlsamError: no model file, images that are not square, or weights that are named too.

    >>> settings_from({"model": "resnet18", "edits": []})
    {}
    """
    model = given["model"]
    is_path = os.sep in model or "/" in model
    if is_hub_name(model) or not (means_file(model) or is_path):
        return {}
    if given.get("weights") or given.get("pretrained"):
        raise UlsamError(
            f"`model` is the model file {model}, which has its weights: leave `weights` and `pretrained` out"
        )
    file = model if model in names() else locate(model)
    spec = read_spec(file)
    found = settings_of(file, spec, size=given.get("size"))
    kept = {name for name in ("mean", "std", "interpolation", "crop_pct") if given.get(name) is not None}
    channels = given.get("in_chans")
    if channels not in (None, spec.input_size[0]):
        found["model_args"].pop("in_chans", None)
        kept |= {"mean", "std"}
    found |= {
        "edits": [*found["edits"], *given["edits"]],
        "model_args": found["model_args"] | (given.get("model_args") or {}),
    }
    return {name: value for name, value in found.items() if name not in kept}


def settings_of(file: str | os.PathLike[str], spec: ModelSpec, *, size: int | None = None) -> dict[str, Any]:
    """The settings of `ulsam.TrainConfig` that build the model of a file, with its weights, for its images.

    Args:
        file: the model file.
        spec: in it.
        size: of the images in training, in pixels; None: the model's own.

    Raises:
        UlsamError: its images are not square, and no size is given.

    >>> settings_of("model.safetensors", ModelSpec("resnet18", ("a", "b")))["weights"]
    'model.safetensors'
    """
    _, height, width = spec.input_size
    if height != width and size is None:
        raise UlsamError(f"this model's images are {height} x {width}, and training makes square ones: give a `size`")
    return {
        "model": spec.base,
        "model_args": {name: value for name, value in spec.model_args.items() if name not in _DROPOUT},
        "edits": [str(edit) for edit in spec.edits],
        "size": size or height,
        "mean": list(spec.mean),
        "std": list(spec.std),
        "interpolation": spec.interpolation,
        "crop_pct": spec.crop_pct,
        "weights": os.fspath(file),
        "pretrained": False,
    }
