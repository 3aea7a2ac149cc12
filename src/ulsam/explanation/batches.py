"""Picture files, a batch at a time, as several nets see them; and the numbers over all of them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn
from tqdm import tqdm

from ulsam.errors import UlsamError
from ulsam.evaluate import read_batch
from ulsam.explanation.explainer import Explainer, Explanation
from ulsam.explanation.index import Picture
from ulsam.explanation.numbers import Numbers
from ulsam.explanation.regions import mark_areas
from ulsam.recipe import Recipe

BATCH = 16


class Seen(NamedTuple):
    """A picture, its number among all from 1 on, and what each net finds on it."""

    number: int
    picture: Picture
    found: tuple[Explanation, ...]


def explained(
    pictures: Sequence[Picture], explainers: Sequence[Explainer], unreadable: list[str]
) -> Iterator[list[Seen]]:
    """Explain pictures, up to `BATCH` at a time, behind a progress bar.

    Args:
        pictures: their files.
        explainers: of the nets.
        unreadable: gets a line about each picture that cannot be read and is passed over.
    """
    with tqdm(total=len(pictures), unit=" pictures", disable=None, leave=False) as bar:
        for first in range(0, len(pictures), BATCH):
            chunk = list(enumerate(pictures[first : first + BATCH], start=first + 1))
            pixels, bad = read_batch([one.path for _, one in chunk], explainers[0].transform)
            unreadable += bad.values()
            good = [(number, one) for number, one in chunk if one.path not in bad]
            if good:
                found = []
                for explainer in explainers:
                    if look(explainer.recipe) != look(explainers[0].recipe):
                        pixels, _ = read_batch([one.path for _, one in good], explainer.transform)
                    found.append(explainer(pixels))
                each = zip(*found, strict=True)
                yield [Seen(number, one, all_nets) for (number, one), all_nets in zip(good, each, strict=True)]
            bar.update(len(chunk))


def add(tallies: Sequence[Numbers], seen: Sequence[Seen]) -> None:
    """Add what was just seen to the numbers of each net, which are in the order of ``found``."""
    for place, tally in enumerate(tallies):
        areas = [mark_areas(one.picture.path, tally.explainer.transform) for one in seen]
        tally.add([one.found[place] for one in seen], [one.picture.truth for one in seen], areas)


def measure(
    nets: Mapping[str, tuple[nn.Module, Recipe]], pictures: Sequence[Picture], *, curves: bool = True
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The numbers of several nets over pictures, without panels.

    Args:
        nets: as `ulsam.load` gives them, by name.
        pictures: of :func:`ulsam.explanation.index.list_pictures`.
        curves: as of :class:`Numbers`.

    Returns:
        The results by the nets' names, and a line about each picture that could not be read.

    Raises:
        UlsamError: no picture can be read, or a net has no feature map to explain.
    """
    tallies = {name: Numbers(*net, curves=curves) for name, net in nets.items()}
    unreadable: list[str] = []
    for seen in explained(pictures, [tally.explainer for tally in tallies.values()], unreadable):
        add(list(tallies.values()), seen)
    check_any(len(pictures) - len(unreadable), unreadable)
    return {name: tally.result() for name, tally in tallies.items()}, unreadable


def check_any(read: int, unreadable: Sequence[str]) -> None:
    """Raise if no picture could be read, with the reason of the first.

    Raises:
        UlsamError: then.
    """
    if not read:
        others = len(unreadable) - 1
        raise UlsamError(unreadable[0] + (f" (and {others} more that cannot be read)" if others else ""))


def look(recipe: Recipe) -> tuple[Any, ...]:
    """What decides on a picture before it is normalised: two nets of the same look are given the same pixels."""
    return recipe.input_size, recipe.interpolation, recipe.crop_pct
