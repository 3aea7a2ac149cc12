"""A sample of training pictures in memory, the same one each time."""

import hashlib
import random
from dataclasses import dataclass

from torch import Tensor

from ulsam.data.loading import Batch, EvalSet, Loader
from ulsam.data.sources import AnyPictures, StreamPictures
from ulsam.distributed import World
from ulsam.errors import UlsamError
from ulsam.evaluate import recipe_transform
from ulsam.recipe import Recipe


@dataclass(frozen=True)
class Sample:
    """Training pictures in memory, as the net's input.

    ``names`` is the SHA-256 of their names; ``unreadable`` are those of them that were left out (name, reason).
    """

    batches: list[Batch]
    pictures: int
    names: str
    unreadable: list[tuple[str, str]]

    @property
    def images(self) -> list[Tensor]:
        """The pictures of each batch, [B, C, H, W], without batches of which none could be read."""
        return [batch.images for batch in self.batches if len(batch.images)]


def draw_sample(
    pictures: AnyPictures,
    recipe: Recipe,
    number: int,
    world: World,
    *,
    apart_from: int = 0,
    batch_size: int = 32,
    workers: int = 0,
) -> Sample:
    """Read ``number`` of the pictures, or all if there are fewer; the same ones whenever the pictures are the same.

    Args:
        pictures: of the training split.
        recipe: of the net; how a picture becomes its input. There is no augmentation.
        number: 1 or more.
        world: its device gets the pictures: [number, C, H, W] in float32.
        apart_from: none of those that a sample of so many has, as long as there are enough others.

    Raises:
        UlsamError: the pictures are a stream, from which none can be picked.
    """
    if isinstance(pictures, StreamPictures):
        raise UlsamError("pictures cannot be picked from a stream of shards: name an image folder, or torch/... data")
    chosen = pick(len(pictures), number, apart_from)
    transform = recipe_transform(recipe)
    loader = Loader(
        EvalSet(pictures, transform),
        transform.normalise,
        world.device,
        workers,
        batch_size=batch_size,
        sampler=chosen,
    )
    batches = list(loader)
    names = pictures.names or list(map(str, range(len(pictures))))
    digest = hashlib.sha256("\0".join(names[index] for index in chosen).encode(errors="surrogateescape")).hexdigest()
    unreadable = [bad for batch in batches for bad in batch.unreadable]
    return Sample(batches, len(chosen) - len(unreadable), digest, unreadable)


def pick(pictures: int, number: int, apart_from: int = 0) -> list[int]:
    """Which pictures :func:`draw_sample` reads: their indices, in order.

    >>> pick(10, 4), pick(10, 4, apart_from=4)
    ([0, 2, 6, 9], [1, 3, 5, 8])
    """
    taken = set(pick(pictures, apart_from)) if apart_from else set()
    others = [index for index in range(pictures) if index not in taken]
    found = random.Random(0).sample(others, min(number, len(others)))
    return sorted(found + sorted(taken)[: number - len(found)])
