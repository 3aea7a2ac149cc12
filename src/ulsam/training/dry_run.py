"""Build what a training run is made of, without reading an image."""

import dataclasses

from torch import nn

from ulsam.base.distributed import World
from ulsam.data import sources
from ulsam.model.build import build
from ulsam.model.spec import ModelSpec
from ulsam.surgery.cost import cost
from ulsam.training import parts
from ulsam.training.class_weights import class_weights_of
from ulsam.training.config import TrainConfig
from ulsam.training.distill import Teacher, open_teacher
from ulsam.training.reconstruct_first import to_reconstruct


def dry_run(
    config: TrainConfig, images: sources.AnyImages, world: World
) -> tuple[ModelSpec, nn.Module, Teacher | None, int]:
    """Build everything that training builds before its first step, so that what is wrong with the settings shows.

    Args:
        config: the settings; weights are read from a file, but not from timm's hub.
        images: to train on.
        world: the processes.

    Returns:
        The spec, its model with what is frozen, the teacher, and the optimizer updates in an epoch.

    Raises:
        UlsamError: as `ulsam.training.train.train` would before its first step.

    >>> import tempfile, torch
    >>> from ulsam.data.birds import draw_birds
    >>> data = draw_birds(tempfile.mkdtemp() + "/birds", classes=2, train=8, val=4, size=32)
    >>> config = TrainConfig(str(data), batch_size=8, freeze=["nothing"])
    >>> dry_run(config, parts.open_images(config)[0], World(0, 1, torch.device("cpu")))
    Traceback (most recent call last):
    ulsam.base.errors.UlsamError: no module is named 'nothing'; names here begin with conv_stem, bn1, bn1.drop
    """
    spec = parts.spec_of_run(config, images.classes, isinstance(images, sources.LabelSetImages))
    model, _ = build(spec, weights=config.weights)
    cost(model, spec.input_size)
    _, _, updates, _ = parts.batches_of(dataclasses.replace(config, cache="false"), spec, images, world)
    to_reconstruct(config, model, images)
    class_weights_of(config.class_weights, images)
    teacher = open_teacher(config, spec, model)
    parts.freeze(model, config.freeze)
    parts.optimizer_of(config, model, updates)
    return spec, model, teacher, updates
