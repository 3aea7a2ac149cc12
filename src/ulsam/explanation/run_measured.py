"""What a run's model says of each image that it was measured on: run again, and compared with the run's own result."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ulsam.base.distributed import start
from ulsam.base.errors import UlsamError
from ulsam.data.augment import EvalTransform
from ulsam.data.images import Pixels
from ulsam.data.loading import eval_loader
from ulsam.data.sources import FactoryImages, FolderImages, MapImages
from ulsam.explanation.trained_runs import TrainedRun
from ulsam.model.build import load
from ulsam.study.statistics import right
from ulsam.training.evaluate import evaluate_batches, outcomes, spec_transform
from ulsam.training.parts import open_images
from ulsam.training.train_summary import OutcomeEntry


@dataclass(frozen=True)
class RunPrediction:
    """What a model says of one image."""

    image: int  # its number in the data set
    name: str
    truth: str
    named: str
    share: float  # the probability of ``named``

    @property
    def right(self) -> bool:
        """Whether it is."""
        return self.truth == self.named


@dataclass(frozen=True)
class Measured:
    """All that a model says of the images of its run."""

    run: TrainedRun
    images: MapImages
    guesses: Mapping[str, RunPrediction]  # in the images' order; the keys are the same for all runs on the same images
    changed: int  # images that were right in the run and are wrong now, or the other way round
    transform: EvalTransform

    def pixels(self, guess: RunPrediction) -> Pixels:
        """An image as the model is given it, uint8 [H, W, C]."""
        pixels, _ = self.images.fetch(guess.image, self.transform.reduction, self.transform.channels)
        return self.transform.pixels(pixels).numpy()


def measure_again(run: TrainedRun, data: str | None = None) -> Measured:
    """Run a finished run's model on the images that it was measured on, in float32.

    Args:
        run: the run.
        data: where its images lie now, if not where its settings say.

    Raises:
        UlsamError: why it cannot be done: the run is not finished, no spec builds its model, or its model file or its
            images are not there, or are others.
    """
    if run.result is None:
        raise UlsamError("the run is not finished")
    if run.result.prepared:
        raise UlsamError("no spec builds its model, so it cannot be run again")
    if (channels := run.result.spec.input_size[0]) not in (1, 3):
        raise UlsamError(f"pages show RGB and gray images, and this model takes {channels} channels")
    config = run.config if data is None else replace(run.config, data=data)
    _, images, _ = open_images(config)
    if not isinstance(images, FolderImages | FactoryImages):
        raise UlsamError("a stream of shards: images cannot be picked from it")
    spec, image_count = run.result.spec, run.result.image_count
    if images.classes != spec.classes or len(images) != image_count:
        raise UlsamError(
            f"{config.data} no longer holds the {image_count} {run.result.split} images of {len(spec.classes)} classes "
            "that it was measured on"
        )
    predictions: list[tuple[int, int, float]] = []

    def keep(logits: Tensor, labels: Tensor) -> None:
        shares, named = logits.softmax(1).max(1)
        predictions.extend(zip(labels.tolist(), named.tolist(), shares.tolist(), strict=True))

    with start("auto") as world:
        model, _ = load(run.folder / "model.safetensors", world.device)
        transform = spec_transform(spec)
        batches = eval_loader(
            images, transform, batch_size=config.batch_size, workers=config.workers, device=world.device
        )
        scores = evaluate_batches(model, batches, len(spec.classes), world=world, progress=run.key, on_batch=keep)
    bad = {name for name, _ in scores.unreadable}
    read = [number for number in range(len(images)) if images.name(number) not in bad]
    paths = [os.path.abspath(images.name(number)) for number in range(len(images))]
    shown = images.names if isinstance(images, FolderImages) else [images.name(n) for n in range(len(images))]
    names = [name.partition("\t")[0].strip("/") for name in shown]  # without the labels that a table says
    guesses = {
        paths[number]: RunPrediction(number, names[number], spec.classes[truth], spec.classes[named], share)
        for number, (truth, named, share) in zip(read, predictions, strict=True)
    }
    changed = _changed(run, outcomes(scores, images), config.data)
    return Measured(run, images, guesses, changed, transform)


def _changed(run: TrainedRun, now: OutcomeEntry | None, data: str) -> int:
    """On how many images the outcome is another one than in the run.

    Raises:
        UlsamError: they are other images.
    """
    before = run.result and run.result.summary.get("outcomes")
    if not before or not now:
        return 0
    if (before["names"], before["images"]) != (now["names"], now["images"]):
        raise UlsamError(f"{data} holds other images than those that it was measured on")
    return int((right({"outcomes": before}) != right({"outcomes": now})).sum())
