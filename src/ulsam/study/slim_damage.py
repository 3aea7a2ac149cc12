"""What replacing blocks does to a trained model before any training, on a sample of its training images."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ulsam.base.distributed import World
from ulsam.training.evaluate import evaluate_batches
from ulsam.training.sample import ImageSample


@dataclass(frozen=True)
class SampleScore:
    """What a model scores on the sample: mean cross-entropy in nats, and top-1 as a share."""

    loss: float
    top1: float


def score(model: nn.Module, sample: ImageSample, classes: Sequence[str], world: World) -> SampleScore:
    """Measure a model on the sample.

    Raises:
        UlsamError: not one image could be read, or what the model outputs is not finite.
    """
    found = evaluate_batches(model.to(world.device), sample.batches, len(classes), world=world)
    return SampleScore(found.loss, found.top1)
