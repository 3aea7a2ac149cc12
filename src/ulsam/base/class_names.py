"""Which of a model's classes a name means."""

import re
from collections.abc import Iterable, Sequence


def class_numbers(names: Iterable[str], classes: Sequence[str]) -> dict[str, int]:
    """Which of a model's classes these names mean, by their positions: the same name, or the same WordNet id in front.

    What means none of them is left out, as is a WordNet id that two classes begin with.

    >>> class_numbers(["n01440764", "wren", "n02085620-Chihuahua"], ["n02085620 Chihuahua", "n01440764 tench", "wren"])
    {'n01440764': 1, 'wren': 2, 'n02085620-Chihuahua': 0}
    """
    exact = {name: number for number, name in enumerate(classes)}
    ids = [_wordnet_id(name) for name in classes]
    by_id = {found: number for number, found in enumerate(ids) if found and ids.count(found) == 1}
    numbers = {name: exact.get(name, by_id.get(_wordnet_id(name) or "")) for name in names}
    return {name: number for name, number in numbers.items() if number is not None}


def _wordnet_id(name: str) -> str | None:
    found = re.match(r"n\d{8}(?!\w)|n\d{8}(?=_)", name)
    return found and found[0]
