"""Reconstructing a run's edited model before its first step, on its training images."""

from torch import nn

from ulsam import reconstruction
from ulsam.data.sources import AnyPictures, StreamPictures
from ulsam.distributed import World
from ulsam.edits import edited_blocks
from ulsam.errors import UlsamError
from ulsam.fitting import fit, new_layers
from ulsam.recipe import Recipe
from ulsam.sampling import draw_sample
from ulsam.train import parts
from ulsam.train.config import TrainConfig


def to_reconstruct(config: TrainConfig, model: nn.Module, pictures: AnyPictures) -> bool:
    """Whether the run reconstructs ``model``, or fits new layers of it, before its first step.

    Raises:
        UlsamError: it should, and the images are a stream.
    """
    edited = edited_blocks(model) if config.reconstruct else new_layers(model)
    if not (config.fit_pictures and (config.weights or config.pretrained) and edited):
        return False
    if isinstance(pictures, StreamPictures):
        raise UlsamError("a stream of shards has no images to reconstruct on: --fit-pictures 0 leaves that out")
    return True


def reconstruct_model(
    config: TrainConfig, recipe: Recipe, model: nn.Module, pictures: AnyPictures, world: World
) -> list[str]:
    """Reconstruct ``model`` where blocks with known weights were removed or replaced; a line for the user about each.

    With ``config.reconstruct`` off, new thin blocks are fitted all the same, each to the block that it replaced.
    Random generators stay as they were. All processes do the same, and DistributedDataParallel takes the first one's.

    Raises:
        UlsamError: as :func:`to_reconstruct`.
    """
    if not to_reconstruct(config, model, pictures):
        return []
    with parts.same_generators(world.device):
        sample = draw_sample(pictures, recipe, config.fit_pictures, world, workers=config.workers)
    model.to(world.device)
    if config.reconstruct:
        found = reconstruction.reconstruct(model, sample.images)
        return [reconstruction.describe(entry, sample.pictures) for entry in found]
    return [
        f"{layer.name}: width {layer.width} gives {100 * layer.explained:.0f} % of what the block added, "
        f"on {sample.pictures} training pictures"
        for layer in fit(model, sample.images)
    ]
