"""The model that a caller means: a model file, or a model in memory with its spec."""

import os

from torch import nn

from ulsam.base.errors import UlsamError
from ulsam.model.build import load
from ulsam.model.spec import ModelSpec


def model_and_spec(
    model: nn.Module | str | os.PathLike[str], spec: ModelSpec | None = None, *, classes: bool = True
) -> tuple[nn.Module, ModelSpec]:
    """A model in memory with the ``spec`` that it must come with, or what `ulsam.load` finds in a model file.

    Args:
        model: in memory, or a file.
        spec: of a model in memory.
        classes: whether it must have any; a starting point for training has none.

    Raises:
        UlsamError: a model without its spec, a file with one, one without classes, or as of `ulsam.load`.

    >>> model_and_spec(nn.ReLU())
    Traceback (most recent call last):
    ulsam.base.errors.UlsamError: a model in memory needs its `spec`: ulsam.load(file) gives both
    """
    name = "the model" if isinstance(model, nn.Module) else os.fspath(model)
    if not isinstance(model, nn.Module):
        if spec is not None:
            raise UlsamError(f"{name} is a file, which holds its own spec: leave `spec` out")
        model, spec = load(model)
    elif spec is None:
        raise UlsamError("a model in memory needs its `spec`: ulsam.load(file) gives both")
    if classes:
        spec.check_classes(name)
    return model, spec
