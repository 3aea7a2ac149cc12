"""Measure a model: top-1, top-5, loss, every class, with confidence intervals; and classify images."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ulsam.base import logs
from ulsam.base.distributed import World
from ulsam.base.errors import NotFinite, UlsamError
from ulsam.base.eval_mode import eval_mode
from ulsam.data.augment import EvalTransform
from ulsam.data.image_channels import MAX_CHANNELS
from ulsam.data.images import Pixels, UnreadableImage, read_pixels
from ulsam.data.loading import Batch
from ulsam.data.sources import AnyImages, StreamImages
from ulsam.data.targets import check_labels
from ulsam.model.spec import ModelSpec
from ulsam.training.predict import NOT_FINITE, Logits
from ulsam.training.train_summary import OutcomeEntry

ALONE = World(0, 1, torch.device("cpu"))


class Stopped(Exception):
    """Measuring was given up, because one of the processes was asked to stop."""


@dataclass(frozen=True)
class Scores:
    """What a model scores on a set of images; shares are 0..1."""

    images: int
    loss: float  # mean cross-entropy, nats
    top1: float
    top5: float
    class_images: tuple[int, ...]  # of each class
    class_right: tuple[int, ...]  # images of each class that were predicted right
    unreadable: tuple[tuple[str, str], ...]  # name, reason
    hits: tuple[tuple[bool, ...], ...] = ()  # of each process: whether each image that it read was right, in order

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of top-1 over the choice of images (Wilson's score interval)."""
        return wilson(round(self.top1 * self.images), self.images)

    def per_class(self, classes: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Images and top-1 of every class; top-1 is None without an image."""
        return {
            name: {"images": n, "top1": r / n if n else None}
            for name, n, r in zip(classes, self.class_images, self.class_right, strict=True)
        }


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share: ``right`` of ``n``, by default at 95 %.

    >>> [round(v, 4) for v in wilson(80, 100)]
    [0.7112, 0.8666]
    """
    if n == 0:
        return 0.0, 1.0
    share, spread = right / n, z * z / n
    center = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, center - half), min(1.0, center + half)


def evaluate_batches(
    model: nn.Module,
    batches: Iterable[Batch],
    n_classes: int,
    *,
    world: World = ALONE,
    amp: torch.dtype | None = None,
    channels_last: bool = True,
    progress: str | None = None,
    stop: Callable[[], bool] | None = None,
    on_batch: Callable[[Tensor, Tensor], None] | None = None,
) -> Scores:
    """Measure ``model`` on batches; with several processes each measures its share and all get the sum.

    Args:
        model: [B, C, H, W] -> logits [B, n_classes]; in eval mode for the time being.
        batches: of `ulsam.data.loading.eval_loader`.
        amp: autocast to this dtype.
        progress: label of the progress bar; None shows none.
        stop: asked before each batch; once it is true in one process, all give up.
        on_batch: called with the logits [B, n_classes] and the labels [B] of each batch of this process.

    Raises:
        NotFinite: the model's outputs are not finite.
        Stopped: ``stop`` said so.
        UlsamError: not one image could be read, or model and images differ in their classes.
    """
    sums = torch.zeros(3, dtype=torch.float64)  # loss, right, right among five
    counts = torch.zeros(2, n_classes, dtype=torch.int64)  # images and right, by class
    hit: list[bool] = []

    def add(logits: Tensor, labels: Tensor) -> None:
        if on_batch:
            on_batch(logits, labels)
        best = logits.topk(min(5, n_classes)).indices
        hits = best == labels[:, None]
        hit.extend(hits[:, 0].tolist())
        loss = F.cross_entropy(logits.double(), labels, reduction="sum")
        sums.add_(torch.stack([loss, hits[:, 0].sum().double(), hits.any(1).sum().double()]))
        for row, found in zip(counts, (labels, labels[hits[:, 0]]), strict=True):
            row += torch.bincount(found, minlength=n_classes)

    unreadable = run_batches(
        model,
        batches,
        n_classes,
        add,
        world=world,
        amp=amp,
        channels_last=channels_last,
        progress=progress,
        stop=stop,
    )
    sums, counts = world.sum(sums).cpu(), world.sum(counts).cpu()
    n = int(counts[0].sum())
    loss, top1, top5 = (sums / n).tolist()
    if not math.isfinite(loss):
        raise NotFinite(NOT_FINITE)
    per_class, right = counts.tolist()
    hits_of = tuple(tuple(share) for share in world.gather(hit))
    return Scores(n, loss, top1, top5, tuple(per_class), tuple(right), tuple(unreadable), hits_of)


def run_batches(
    model: nn.Module,
    batches: Iterable[Batch],
    n_classes: int,
    add: Callable[[Tensor, Tensor], None],
    *,
    several: bool = False,
    world: World = ALONE,
    amp: torch.dtype | None = None,
    channels_last: bool = True,
    progress: str | None = None,
    stop: Callable[[], bool] | None = None,
) -> list[tuple[str, str]]:
    """Run ``model`` on this process's batches, without gradients; what of all processes could not be read.

    Args:
        model, batches, n_classes, world, amp, channels_last, progress, stop: as of :func:`evaluate_batches`.
        add: is given the logits [B, n_classes] and the labels of each batch, on the CPU.
        several: whether an image may have several labels, [B, n_classes]; else they are [B].

    Raises:
        Stopped: ``stop`` said so.
        UlsamError: not one image could be read, or model and images differ in their classes.
    """
    device, count = world.device, 0
    unreadable: list[tuple[str, str]] = []
    layout = torch.channels_last if channels_last else torch.contiguous_format
    bar = logs.progress(batches, desc=progress, shown=progress is not None, unit="batch")
    with bar, eval_mode(model), torch.no_grad():
        for batch in bar if stop is None else _until(stop, bar, world):
            unreadable += batch.unreadable
            if not len(batch.labels):
                continue
            check_labels(batch.labels, n_classes, several=several)
            images = batch.images.to(device, memory_format=layout)
            with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
                logits = model(images).float().cpu()
            if logits.shape[1] != n_classes:
                raise UlsamError(f"the model has {logits.shape[1]} outputs, the images have {n_classes} classes")
            add(logits, batch.labels)
            count += len(batch.labels)
    unreadable = [bad for share in world.gather(unreadable) for bad in share]
    if not sum(world.gather(count)):
        raise UlsamError(f"none of the {len(unreadable)} images could be read")
    return unreadable


def outcomes(scores: Scores, images: AnyImages) -> OutcomeEntry | None:
    """Which images were right, for pairing this measurement with another one of the same images; JSON.

    Args:
        scores: of :func:`evaluate_batches` on the batches of `ulsam.data.loading.eval_loader`.
        images: that were measured.

    Returns:
        ``images``: how many were read; ``right``: a bit for each of them, in the order of the data set, the first
        image the highest bit of the first byte, as hexadecimal digits; ``names``: SHA-256 of their names. None for
        a stream of shards, whose contents are not known before it is read.
    """
    if isinstance(images, StreamImages):
        return None
    bad = {name for name, _ in scores.unreadable}
    right: dict[int, bool] = {}
    for rank, hits in enumerate(scores.hits):
        share = range(rank, len(images), len(scores.hits))
        read = [number for number in share if images.name(number) not in bad]
        right.update(zip(read, hits, strict=True))
    all_names = images.names or [images.name(number) for number in range(len(images))]
    names = [all_names[number] for number in sorted(right)]
    return {
        "images": len(right),
        "right": np.packbits([right[number] for number in sorted(right)]).tobytes().hex(),
        "names": hashlib.sha256("\0".join(names).encode(errors="surrogateescape")).hexdigest(),
    }


def _until(stop: Callable[[], bool], batches: Iterable[Batch], world: World) -> Iterator[Batch]:
    """The batches; the processes, which may have more or fewer of them, agree before each whether one is to stop."""
    left = iter(batches)
    while True:
        batch = next(left, None)
        more, stopping = world.sum(torch.tensor([batch is not None, stop()], dtype=torch.int64)).tolist()
        if stopping:
            raise Stopped
        if not more:
            return
        if batch is not None:
            yield batch


def logits_of(model: nn.Module, transform: EvalTransform) -> Callable[[Pixels], Logits]:
    """A function from bytes [B, H, W, C] at the model's size to the model's outputs [B, classes].

    >>> look = spec_transform(ModelSpec("resnet18", ("cat",), input_size=(3, 8, 8)))
    >>> logits_of(nn.Conv2d(3, 1, 8), look)(np.zeros((2, 8, 8, 3), np.uint8)).shape
    (2, 1, 1, 1)
    """
    like = next(model.parameters())

    @torch.no_grad()
    def logits(images: Pixels) -> Logits:
        with eval_mode(model):
            found: Tensor = model(transform.normalize(torch.from_numpy(images).to(like.device)).to(like.dtype))
        return found.float().cpu().numpy()

    return logits


def read_batch(paths: Iterable[str], transform: EvalTransform) -> tuple[list[Tensor], dict[str, str]]:
    """Read image files for a model.

    Returns:
        The images that can be read, uint8 [H, W, C] each, in the order of ``paths`` (stacked, ``transform.normalize``
        makes the model's input of them); and why the others cannot, by path.

    >>> read_batch(["missing.jpg"], spec_transform(ModelSpec("resnet18", ("cat",))))
    ([], {'missing.jpg': 'missing.jpg: no such file or directory'})
    """
    images, errors = [], {}
    for path in paths:
        try:
            images.append(transform.pixels(read_pixels(path, transform.reduction, channels=transform.channels)))
        except UnreadableImage as error:
            errors[path] = str(error)
    return images, errors


def spec_transform(spec: ModelSpec) -> EvalTransform:
    """The evaluation transform of a spec: image -> tensor [C, H, W].

    Raises:
        UlsamError: the spec's model takes more channels than images are read with.
    """
    if spec.input_size[0] > MAX_CHANNELS:
        raise UlsamError(
            f"images are read with {MAX_CHANNELS} channels at most, but this model takes {spec.input_size[0]}"
        )
    return EvalTransform(
        spec.input_size,
        mean=spec.mean,
        std=spec.std,
        interpolation=spec.interpolation,
        crop_pct=spec.crop_pct,
    )
