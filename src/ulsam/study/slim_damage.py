"""What replacing blocks does to a trained model before any training, on a sample of its training images."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ulsam.base.distributed import World
from ulsam.study.slim_blocks import SwitchableModel
from ulsam.training.evaluate import evaluate_batches
from ulsam.training.sample import Sample


@dataclass(frozen=True)
class Score:
    """What a model scores on the sample: mean cross-entropy in nats, and top-1 as a share."""

    loss: float
    top1: float


def score(
    switched: SwitchableModel, blocks: Collection[str], sample: Sample, classes: Sequence[str], world: World
) -> Score:
    """Measure the model with these blocks replaced.

    Raises:
        UlsamError: not one image could be read, or what the model outputs is not finite.
    """
    with switched.replaced(blocks) as model:
        found = evaluate_batches(model.to(world.device), sample.batches, len(classes), world=world)
    return Score(found.loss, found.top1)
