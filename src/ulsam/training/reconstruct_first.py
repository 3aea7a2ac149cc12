"""Reconstructing a run's edited model before its first step, on its training images."""

from torch import nn

from ulsam.base.distributed import World
from ulsam.base.errors import UlsamError
from ulsam.data.opening import unlabeled
from ulsam.data.sources import AnyImages, StreamImages
from ulsam.model.spec import ModelSpec
from ulsam.surgery import reconstruct as reconstruction
from ulsam.surgery.edited import edited_blocks
from ulsam.surgery.reconstruct_layers import new_layers, reconstruct_layers
from ulsam.training import parts
from ulsam.training.config import TrainConfig
from ulsam.training.sample import draw_sample


def to_reconstruct(config: TrainConfig, model: nn.Module, images: AnyImages) -> bool:
    """Whether the run reconstructs ``model``, or fits new layers of it, before its first step.

    Raises:
        UlsamError: it should, and the images are a stream; or it should not, and images for it are named.
    """
    edited = edited_blocks(model) if config.reconstruct else new_layers(model)
    if not (config.reconstruct_images and (config.weights or config.pretrained) and edited):
        if config.images_for_reconstruction:
            raise UlsamError(
                "`images_for_reconstruction` has nothing to reconstruct: it needs edits, the base model's weights, "
                "`reconstruct=True` and `reconstruct_images` above 0"
            )
        return False
    if isinstance(images, StreamImages) and not config.images_for_reconstruction:
        raise UlsamError(
            "a stream of shards has no images to reconstruct on: name a folder by `images_for_reconstruction`, or "
            "leave reconstruction out by `reconstruct_images=0`"
        )
    return True


def reconstruct_model(
    config: TrainConfig, spec: ModelSpec, model: nn.Module, images: AnyImages, world: World
) -> list[str]:
    """Reconstruct ``model`` where blocks with known weights were removed or replaced; a line for the user about each.

    With ``config.reconstruct`` off, new narrow inverted residuals are reconstructed all the same, each to the block
    that it replaced. Random generators stay as they were. All processes do the same, and DistributedDataParallel takes
    the first one's.

    Raises:
        UlsamError: as :func:`to_reconstruct`.
    """
    if not to_reconstruct(config, model, images):
        return []
    source = "training images"
    if folder := config.images_for_reconstruction:
        images, source = unlabeled(folder), f"images of {folder}"
    with parts.same_generators(world.device):
        sample = draw_sample(images, spec, config.reconstruct_images, world, workers=config.workers)
    model.to(world.device)
    if config.reconstruct:
        found = reconstruction.reconstruct(model, sample.images, freeze=config.freeze)
        lines = [reconstruction.describe(entry, sample.count, source) for entry in found]
        done = {name for entry in found for name in entry.edits}
        left = [name for name in edited_blocks(model) if name not in done]
        return [*lines, *(f"{name}: no block behind it that may change, so nothing is reconstructed" for name in left)]
    return [
        f"{layer.name}: width {layer.width} gives {100 * layer.explained:.0f} % of what the block added, "
        f"on {sample.count} {source}"
        for layer in reconstruct_layers(model, sample.images)
    ]
