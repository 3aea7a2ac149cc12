"""Build what a training run is made of, without reading a picture."""

import dataclasses

from torch import nn

from ulsam.costs import cost
from ulsam.data import sources
from ulsam.distributed import World
from ulsam.models import build
from ulsam.recipe import Recipe
from ulsam.train import parts
from ulsam.train.config import TrainConfig
from ulsam.train.distill import Teacher, open_teacher
from ulsam.train.reconstruct import to_reconstruct


def rehearse(
    config: TrainConfig, pictures: sources.AnyPictures, world: World
) -> tuple[Recipe, nn.Module, Teacher | None, int]:
    """Build everything that training builds before its first step, so that what is wrong with the settings shows.

    Args:
        config: the settings; weights are read from a file, but not from timm's hub.
        pictures: to train on.
        world: the processes.

    Returns:
        The recipe, its net with what is frozen, the teacher, and the optimizer updates in an epoch.

    Raises:
        UlsamError: as `ulsam.train.loop.train` would before its first step.

    >>> import tempfile, torch
    >>> from ulsam.data.birds import draw_birds
    >>> data = draw_birds(tempfile.mkdtemp() + "/birds", classes=2, train=8, val=4, size=32)
    >>> config = TrainConfig(str(data), batch_size=8, freeze=["nothing"])
    >>> rehearse(config, parts.open_pictures(config)[0], World(0, 1, torch.device("cpu")))
    Traceback (most recent call last):
    ulsam.errors.UlsamError: no module is named 'nothing'; names here begin with conv_stem, bn1, bn1.drop
    """
    recipe = parts.recipe_of(config, pictures.classes)
    model, _ = build(recipe, weights=config.weights)
    cost(model, recipe.input_size)
    _, _, updates, _ = parts.batches_of(dataclasses.replace(config, cache="false"), recipe, pictures, world)
    to_reconstruct(config, model, pictures)
    teacher = open_teacher(config, recipe, model)
    parts.freeze(model, config.freeze)
    parts.optimizer_of(config, model, updates)
    return recipe, model, teacher, updates
