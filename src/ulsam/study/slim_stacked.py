"""The scores of many sets of blocks in one pass over the sample: what the sets have in common is computed once.

The variants of the model lie one behind the other in the batch. In front of the first block that any set replaces there
is one variant. Where sets part, the features are computed by the old block and by the new one, and stacked.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ulsam.base.errors import NotFinite
from ulsam.base.eval_mode import eval_mode
from ulsam.base.logs import LOGGER
from ulsam.data.loading import Batch
from ulsam.study.slim_blocks import SwitchableModel
from ulsam.study.slim_damage import SampleScore
from ulsam.training.predict import NOT_FINITE

Names = frozenset[str]
TOGETHER = 32  # sets in one pass; more share little more, and a stop loses what is not finished
ROWS = {"cpu": 128, "cuda": 4096}  # of the batch at its longest: on a CPU its features are to stay in the cache


class _Variants:
    """Which variants lie in the batch at the moment, in order, each the blocks that it replaced so far."""

    def __init__(self, sets: Sequence[Names]) -> None:
        self.sets = sets
        self.start()

    def start(self) -> None:
        """The model begins with a new batch, of one variant."""
        self.seen: Names = frozenset()
        self.now: list[Names] = [frozenset()]

    def pass_block(self, name: str) -> list[Names]:
        """Go behind this block; the variants in front of it."""
        before, self.seen = self.now, self.seen | {name}
        self.now = list(dict.fromkeys(blocks & self.seen for blocks in self.sets))
        return before


class _SharedPrefix(nn.Module):
    """Stands at the place of a block: runs the old one for some variants and the new one for others."""

    def __init__(self, name: str, old: nn.Module, new: nn.Module, variants: _Variants) -> None:
        super().__init__()
        self.name, self.old, self.new, self.variants = name, old, new, variants

    def forward(self, x: Tensor) -> Tensor:
        before = self.variants.pass_block(self.name)
        given = dict(zip(before, x.chunk(len(before)), strict=True))
        output: dict[Names, Tensor] = {}
        for module, replaced in ((self.old, False), (self.new, True)):
            if mine := [blocks for blocks in self.variants.now if (self.name in blocks) == replaced]:
                stacked = module(torch.cat([given[blocks - {self.name}] for blocks in mine]))
                output.update(zip(mine, stacked.chunk(len(mine)), strict=True))
        return torch.cat([output[blocks] for blocks in self.variants.now])


@contextmanager
def _sharing_prefixes(switched: SwitchableModel, sets: Sequence[Names]) -> Iterator[_Variants]:
    """Within it the model outputs the logits of every set, one behind the other, in the order of ``variants.now``."""
    variants, model = _Variants(sets), switched.model
    places = frozenset[str]().union(*sets)
    try:
        for name in places:
            model.set_submodule(name, _SharedPrefix(name, switched.old[name], switched.new[name], variants))
        with torch.no_grad(), eval_mode(model):
            yield variants
    finally:
        for name in places:
            model.set_submodule(name, switched.old[name])


def scores_together(
    switched: SwitchableModel, sets: Sequence[Sequence[str]], batches: Sequence[Batch]
) -> list[SampleScore]:
    """The score of each set of blocks, replaced together, on batches of images.

    Args:
        switched: a model for which :func:`can_stack` is true, on the device on which it is measured.
        sets: different ones, not empty, of names of its blocks.
        batches: a sample with at least one image.

    Raises:
        NotFinite: with one of the sets replaced the model's outputs are not finite.
    """
    wanted = [frozenset(names) for names in sets]
    device = next(switched.model.parameters()).device
    for module in switched.new.values():
        module.to(device)
    sums = {blocks: torch.zeros(2, dtype=torch.float64) for blocks in wanted}  # loss and right
    count = 0
    with _sharing_prefixes(switched, wanted) as variants:
        for batch in batches:
            for images, labels in _parts(batch, max(1, ROWS.get(device.type, ROWS["cpu"]) // len(wanted))):
                count += len(labels)
                variants.start()
                logits = switched.model(images.to(device, memory_format=torch.channels_last)).float().cpu()
                for blocks, mine in zip(variants.now, logits.chunk(len(variants.now)), strict=True):
                    loss = F.cross_entropy(mine.double(), labels, reduction="sum")
                    sums[blocks] += torch.stack([loss, (mine.argmax(1) == labels).sum().double()])
    scores = [SampleScore(*(sums[blocks] / count).tolist()) for blocks in wanted]
    if not all(torch.isfinite(total).all() for total in sums.values()):
        raise NotFinite(NOT_FINITE)
    return scores


def _parts(batch: Batch, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    if len(batch.labels):
        yield from zip(batch.images.split(size), batch.labels.split(size), strict=True)


def can_stack(switched: SwitchableModel, images: Tensor) -> bool:
    """Whether variants in one batch give what each gives alone: not where a connection leads around a block.

    Args:
        switched: the model, on the device of ``images``.
        images: a few, [B, C, H, W].
    """
    names = list(switched.old)
    sets = list(dict.fromkeys(frozenset(some) for some in ([], *([name] for name in names), names)))
    for module in switched.new.values():
        module.to(images.device)
    alone = []
    for blocks in sets:
        with switched.replaced(blocks) as model, torch.no_grad(), eval_mode(model):
            alone.append(model(images))
    expected = torch.cat(alone)
    try:
        with _sharing_prefixes(switched, sets) as variants:
            found = switched.model(images)
            found = torch.cat([found.chunk(len(sets))[variants.now.index(blocks)] for blocks in sets])
    except (RuntimeError, ValueError) as error:  # of the model's own code, at a batch that grew on the way
        LOGGER.debug("sets of blocks are measured one by one: %s", error)
        return False
    return torch.allclose(found, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))
