"""Fitting a run's new thin blocks before its first step."""

from torch import nn

from ulsam.data.sources import AnyPictures, StreamPictures
from ulsam.distributed import World
from ulsam.errors import UlsamError
from ulsam.fitting import fit, new_layers
from ulsam.recipe import Recipe
from ulsam.sampling import draw_sample
from ulsam.train import parts
from ulsam.train.config import TrainConfig


def to_fit(config: TrainConfig, model: nn.Module, pictures: AnyPictures) -> bool:
    """Whether the run fits layers of ``model`` before its first step.

    Raises:
        UlsamError: it should, and the pictures are a stream.
    """
    if not (config.fit_pictures and (config.weights or config.pretrained) and new_layers(model)):
        return False
    if isinstance(pictures, StreamPictures):
        raise UlsamError("thin blocks cannot be fitted on a stream of shards: --fit-pictures 0 starts them as nothing")
    return True


def fit_layers(config: TrainConfig, recipe: Recipe, model: nn.Module, pictures: AnyPictures, world: World) -> list[str]:
    """Fit the new thin blocks of ``model`` to the blocks that they replaced, if these have weights.

    Random generators stay as they were. All processes do the same, and DistributedDataParallel takes the first one's.

    Returns:
        A line for the user about each layer.

    Raises:
        UlsamError: as :func:`to_fit`.
    """
    if not to_fit(config, model, pictures):
        return []
    with parts.same_generators(world.device):
        sample = draw_sample(pictures, recipe, config.fit_pictures, world, workers=config.workers)
    found = fit(model.to(world.device), sample.images)
    return [
        f"{layer.name}: width {layer.width} gives {100 * layer.explained:.0f} % of what the block added, "
        f"on {sample.pictures} training pictures"
        for layer in found
    ]
