"""Training that begins from a model file: the settings that the file stands for."""

import os
from typing import TYPE_CHECKING, Any

from ulsam.base.errors import UlsamError
from ulsam.model.build import read_spec
from ulsam.model.pretrained import means_file
from ulsam.model.spec import ModelSpec
from ulsam.model.trained import locate, names

if TYPE_CHECKING:
    from ulsam.training.config import TrainConfig


def settings_from(config: "TrainConfig") -> dict[str, Any]:
    """What to change in settings whose ``model`` is a model file, a run's folder, or a trained model of the package.

    Architecture, edits, image and weights become those of the file. Edits and ``model_args`` of the settings are added,
    and what they say of the image stays.

    Raises:
        UlsamError: not a model file, or the settings name weights too.

    >>> from ulsam.training.config import TrainConfig
    >>> settings_from(TrainConfig("birds", model="resnet18"))
    {}
    """
    if not means_file(config.model):
        return {}
    if config.weights or config.pretrained:
        raise UlsamError(
            f"`model` is the model file {config.model}, which has its weights: leave `weights` and `pretrained` out"
        )
    file = config.model if config.model in names() else locate(config.model)
    found = settings_of(file, read_spec(file), size=config.size)
    added = {"edits": found["edits"] + config.edits, "model_args": found["model_args"] | config.model_args}
    kept = {name for name in ("size", "mean", "std", "interpolation", "crop_pct") if getattr(config, name) is not None}
    return {name: value for name, value in {**found, **added}.items() if name not in kept}


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
        "model_args": dict(spec.model_args),
        "edits": [str(edit) for edit in spec.edits],
        "size": size or height,
        "mean": list(spec.mean),
        "std": list(spec.std),
        "interpolation": spec.interpolation,
        "crop_pct": spec.crop_pct,
        "weights": os.fspath(file),
    }
