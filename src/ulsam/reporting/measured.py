"""What a run's net says of each picture that it was measured on: run again, and held against the run's own result."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ulsam.comparison.statistics import right
from ulsam.data.augment import EvalTransform
from ulsam.data.loading import eval_loader
from ulsam.data.pictures import Pixels
from ulsam.data.sources import FactoryPictures, FolderPictures, MapPictures
from ulsam.distributed import start
from ulsam.errors import UlsamError
from ulsam.evaluate import evaluate, outcomes, recipe_transform
from ulsam.models import load
from ulsam.reporting.runs import TrainedRun
from ulsam.train.parts import open_pictures


@dataclass(frozen=True)
class Guess:
    """What a net says of one picture."""

    picture: int  # its number in the data set
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
    """All that a net says of the pictures of its run."""

    run: TrainedRun
    pictures: MapPictures
    guesses: Mapping[str, Guess]  # in the pictures' order; the keys are the same for all runs on the same pictures
    changed: int  # pictures that were right in the run and are wrong now, or the other way round
    transform: EvalTransform

    def pixels(self, guess: Guess) -> Pixels:
        """A picture as the net is given it, uint8 [H, W, 3]."""
        pixels, _ = self.pictures.fetch(guess.picture, self.transform.reduction)
        return self.transform.pixels(pixels).numpy()


def measure_again(run: TrainedRun, data: str | None = None) -> Measured:
    """Run a finished run's net on the pictures that it was measured on, in float32.

    Args:
        run: the run.
        data: where its pictures lie now, if not where its settings say.

    Raises:
        UlsamError: why it cannot be done: the run is not finished, no recipe builds its net, or its model file or its
            pictures are not there, or are others.
    """
    if run.result is None:
        raise UlsamError("the run is not finished")
    if run.result.prepared:
        raise UlsamError("no recipe builds its net, so it cannot be run again")
    config = run.config if data is None else replace(run.config, data=data)
    _, pictures, _ = open_pictures(config)
    if not isinstance(pictures, FolderPictures | FactoryPictures):
        raise UlsamError("a stream of shards: pictures cannot be picked from it")
    recipe, counted = run.result.recipe, run.result.measured
    if pictures.classes != recipe.classes or len(pictures) != counted:
        raise UlsamError(
            f"{config.data} no longer holds the {counted} {run.result.split} pictures of {len(recipe.classes)} classes "
            "that it was measured on"
        )
    found: list[tuple[int, int, float]] = []

    def keep(logits: Tensor, labels: Tensor) -> None:
        shares, named = logits.softmax(1).max(1)
        found.extend(zip(labels.tolist(), named.tolist(), shares.tolist(), strict=True))

    with start("auto") as world:
        model, _ = load(run.folder / "model.safetensors", world.device)
        transform = recipe_transform(recipe)
        batches = eval_loader(
            pictures, transform, batch_size=config.batch_size, workers=config.workers, device=world.device
        )
        scores = evaluate(model, batches, len(recipe.classes), world=world, progress=run.key, seen=keep)
    bad = {name for name, _ in scores.unreadable}
    read = [number for number in range(len(pictures)) if pictures.name(number) not in bad]
    paths = [os.path.abspath(pictures.name(number)) for number in range(len(pictures))]
    names = pictures.names if isinstance(pictures, FolderPictures) else [pictures.name(n) for n in range(len(pictures))]
    guesses = {
        paths[number]: Guess(number, names[number].strip("/"), recipe.classes[truth], recipe.classes[named], share)
        for number, (truth, named, share) in zip(read, found, strict=True)
    }
    changed = _changed(run, outcomes(scores, pictures), config.data)
    return Measured(run, pictures, guesses, changed, transform)


def _changed(run: TrainedRun, now: dict[str, Any] | None, data: str) -> int:
    """On how many pictures the outcome is another one than in the run.

    Raises:
        UlsamError: they are other pictures.
    """
    before = run.result and run.result.summary.get("outcomes")
    if not before or not now:
        return 0
    if (before["names"], before["pictures"]) != (now["names"], now["pictures"]):
        raise UlsamError(f"{data} holds other pictures than those that it was measured on")
    return int((right({"outcomes": before}) != right({"outcomes": now})).sum())
