"""Image files, a batch at a time, as several models see them; and the numbers over all of them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from ulsam.base.errors import UlsamError
from ulsam.base.logs import progress
from ulsam.explanation.explainer import Explainer
from ulsam.explanation.explanation import Explanation
from ulsam.explanation.image_list import ListedImage
from ulsam.explanation.map_numbers import MapNumbers
from ulsam.explanation.regions import mark_areas
from ulsam.model.spec import ModelSpec
from ulsam.training.evaluate import read_batch

BATCH = 16


class ExplainedImage(NamedTuple):
    """An image, its number among all from 1 on, and what each model finds on it."""

    number: int
    image: ListedImage
    explanations: tuple[Explanation, ...]


def explained(
    images: Sequence[ListedImage], explainers: Sequence[Explainer], unreadable: list[str]
) -> Iterator[list[ExplainedImage]]:
    """Explain images, up to `BATCH` at a time, behind a progress bar.

    Args:
        images: their files.
        explainers: of the models.
        unreadable: gets a line about each image that cannot be read and is passed over.
    """
    with progress(total=len(images), unit=" images") as bar:
        for first in range(0, len(images), BATCH):
            chunk = list(enumerate(images[first : first + BATCH], start=first + 1))
            pixels, bad = read_batch([entry.path for _, entry in chunk], explainers[0].transform)
            unreadable += bad.values()
            good = [(number, entry) for number, entry in chunk if entry.path not in bad]
            if good:
                by_model = []
                for explainer in explainers:
                    same = look(explainer.spec) == look(explainers[0].spec)
                    by_model.append(
                        explainer(
                            pixels if same else read_batch([entry.path for _, entry in good], explainer.transform)[0]
                        )
                    )
                each = zip(*by_model, strict=True)
                yield [
                    ExplainedImage(number, entry, all_models)
                    for (number, entry), all_models in zip(good, each, strict=True)
                ]
            bar.update(len(chunk))


def add(tallies: Sequence[MapNumbers], seen: Sequence[ExplainedImage]) -> None:
    """Add what was just seen to the numbers of each model, which are in the order of ``explanations``."""
    for place, tally in enumerate(tallies):
        areas = [mark_areas(one.image.path, tally.explainer.transform) for one in seen]
        tally.add([one.explanations[place] for one in seen], [one.image.truth for one in seen], areas)


def measure(
    models: Mapping[str, tuple[nn.Module, ModelSpec]], images: Sequence[ListedImage], *, curves: bool = True
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The numbers of several models over images, without panels.

    Args:
        models: as `ulsam.load` gives them, by name.
        images: of :func:`ulsam.explanation.image_list.list_images`.
        curves: as of :class:`MapNumbers`.

    Returns:
        The results by the models' names, and a line about each image that could not be read.

    Raises:
        UlsamError: no image can be read, or a model has no feature map to explain.
    """
    tallies = {name: MapNumbers(*model, curves=curves) for name, model in models.items()}
    unreadable: list[str] = []
    for seen in explained(images, [tally.explainer for tally in tallies.values()], unreadable):
        add(list(tallies.values()), seen)
    check_any(len(images) - len(unreadable), unreadable)
    return {name: tally.result() for name, tally in tallies.items()}, unreadable


def check_any(read: int, unreadable: Sequence[str]) -> None:
    """Raise if no image could be read, with the reason of the first.

    Raises:
        UlsamError: then.
    """
    if not read:
        others = len(unreadable) - 1
        raise UlsamError(unreadable[0] + (f" (and {others} more that cannot be read)" if others else ""))


def look(spec: ModelSpec) -> tuple[Any, ...]:
    """What decides on an image before it is normalized: two models of the same look are given the same pixels."""
    return spec.input_size, spec.interpolation, spec.crop_pct
