"""What replacing blocks does to a trained net before any training, on a sample of its training pictures."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ulsam.distributed import World
from ulsam.evaluate import evaluate
from ulsam.sampling import Sample
from ulsam.slimming.blocks import Switched


@dataclass(frozen=True)
class Score:
    """What a net scores on the sample: mean cross-entropy in nats, and top-1 as a share."""

    loss: float
    top1: float


def score(switched: Switched, blocks: Collection[str], sample: Sample, classes: Sequence[str], world: World) -> Score:
    """Measure the net with these blocks replaced.

    Raises:
        UlsamError: not one picture could be read, or what the net puts out is not finite.
    """
    with switched.replaced(blocks) as net:
        found = evaluate(net.to(world.device), sample.batches, len(classes), world=world)
    return Score(found.loss, found.top1)
