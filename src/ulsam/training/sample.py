"""A sample of training images in memory, the same one each time."""

import hashlib
import random
from dataclasses import dataclass

from torch import Tensor

from ulsam.base.distributed import World
from ulsam.base.errors import UlsamError
from ulsam.data.loading import Batch, EvalSet, Loader
from ulsam.data.sources import AnyImages, StreamImages
from ulsam.model.spec import ModelSpec
from ulsam.training.evaluate import spec_transform


@dataclass(frozen=True)
class ImageSample:
    """Training images in memory, as the model's input.

    ``names`` is the SHA-256 of their names; ``unreadable`` are those of them that were left out (name, reason).
    """

    batches: list[Batch]
    count: int
    names: str
    unreadable: list[tuple[str, str]]

    @property
    def images(self) -> list[Tensor]:
        """The images of each batch, [B, C, H, W], without batches of which none could be read."""
        return [batch.images for batch in self.batches if len(batch.images)]


def draw_sample(
    images: AnyImages,
    spec: ModelSpec,
    number: int,
    world: World,
    *,
    apart_from: int = 0,
    batch_size: int = 32,
    workers: int = 0,
) -> ImageSample:
    """Read ``number`` of the images, or all if there are fewer; the same ones whenever the images are the same.

    Args:
        images: of the training split.
        spec: of the model; how an image becomes its input. There is no augmentation.
        number: 1 or more.
        world: its device gets the images: [number, C, H, W] in float32.
        apart_from: none of those that a sample of so many has, as long as there are enough others.

    Raises:
        UlsamError: the images are a stream, from which none can be picked.
    """
    if isinstance(images, StreamImages):
        raise UlsamError("images cannot be picked from a stream of shards: name an image folder, or torch/... data")
    chosen = pick(len(images), number, apart_from)
    transform = spec_transform(spec)
    loader = Loader(
        EvalSet(images, transform),
        transform.normalize,
        world.device,
        workers,
        batch_size=batch_size,
        sampler=chosen,
    )
    batches = list(loader)
    names = images.names or list(map(str, range(len(images))))
    digest = hashlib.sha256("\0".join(names[index] for index in chosen).encode(errors="surrogateescape")).hexdigest()
    unreadable = [bad for batch in batches for bad in batch.unreadable]
    return ImageSample(batches, len(chosen) - len(unreadable), digest, unreadable)


def pick(images: int, number: int, apart_from: int = 0) -> list[int]:
    """Which images :func:`draw_sample` reads: their indices, in order.

    >>> pick(10, 4), pick(10, 4, apart_from=4)
    ([0, 2, 6, 9], [1, 3, 5, 8])
    """
    taken = set(pick(images, apart_from)) if apart_from else set()
    others = [index for index in range(images) if index not in taken]
    found = random.Random(0).sample(others, min(number, len(others)))
    return sorted(found + sorted(taken)[: number - len(found)])
