"""Which set of blocks to replace: the least damage among the sets that save enough. Nothing here knows of models.

Blocks are numbers, the positions in a list of what each of them saves. A set is minimal if it saves enough and no part
of it does; only these are looked at, since replacing one more block is not expected to help.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ulsam.base.errors import UlsamError

Blocks = frozenset[int]
#: The damage of replacing a set of blocks; called often for the same set, so it should remember.
Damage = Callable[[Blocks], float]
#: Called with the sets whose damage is needed next, to measure them together.
Ahead = Callable[[Iterable[Blocks]], object]


@dataclass(frozen=True)
class SearchResult:
    """The chosen set.

    ``how`` is "exact" where all minimal sets were measured, else "greedy". ``rivals`` are the minimal sets that were
    measured, by damage, the chosen one first; ``greedy`` is where the greedy search ended. Where time decides, ``how``
    is "timed", or "all" for all blocks, and ``rivals`` are the sets that are fast enough, by damage, and then those
    that were timed and are too slow.
    """

    blocks: Blocks
    how: Literal["exact", "greedy", "timed", "all"]
    greedy: Blocks
    rivals: tuple[Blocks, ...]


def _nothing(sets: Iterable[Blocks]) -> None:
    pass


def search(
    savings: Sequence[float], min_saving: float, damage: Damage, max_sets: int = 200, ahead: Ahead = _nothing
) -> SearchResult:
    """Find the set of least damage that saves ``min_saving`` or more.

    First greedily (:func:`greedy`). Then, where there are at most ``max_sets`` minimal sets, all of them are measured
    and the result is the best; else the greedy set is improved by swaps (:func:`improve`), and a better one may exist.

    Args:
        savings: of each block, above 0; those of a set add up.
        min_saving: to be saved, above 0.
        damage: of a set.
        max_sets: how many sets to measure at most, those of the greedy search aside.
        ahead: called with the sets whose damage is needed next.

    Raises:
        UlsamError: all blocks together save less.

    >>> search([3, 2, 2], 4, lambda blocks: sum([5, 1, 2][block] for block in blocks)).blocks
    frozenset({1, 2})
    """
    if sum(savings) < min_saving:
        raise UlsamError(f"all {len(savings)} blocks together save {sum(savings):g}, less than {min_saving:g}")
    first = greedy(savings, min_saving, damage, ahead)
    sets = []
    for blocks in minimal_sets(savings, min_saving):
        sets.append(blocks)
        if len(sets) > max_sets:
            rivals = improve(first, savings, min_saving, damage, max_sets, ahead)
            return SearchResult(rivals[0], "greedy", first, tuple(rivals))
    ahead(sets)
    sets.sort(key=lambda blocks: (damage(blocks), sorted(blocks)))
    return SearchResult(sets[0], "exact", first, tuple(sets))


def greedy(savings: Sequence[float], min_saving: float, damage: Damage, ahead: Ahead = _nothing) -> Blocks:
    """Add the block of least added damage for what it saves until the set saves enough, then take out what it need not.

    Returns:
        A minimal set.

    >>> sorted(greedy([4, 2, 3], 5, lambda blocks: sum([8, 1, 3][block] for block in blocks)))
    [1, 2]
    """
    chosen: Blocks = frozenset()
    before = 0.0  # only differences of it count
    while saved(savings, chosen) < min_saving:
        options = [chosen | {block} for block in range(len(savings)) if block not in chosen]
        ahead(options)
        worth = {option: (damage(option) - before) / savings[next(iter(option - chosen))] for option in options}
        chosen = min(options, key=lambda option: (worth[option], sorted(option)))
        before = damage(chosen)
    return _trimmed(chosen, savings, min_saving, damage, ahead)


def improve(
    start: Blocks,
    savings: Sequence[float],
    min_saving: float,
    damage: Damage,
    max_sets: int,
    ahead: Ahead = _nothing,
) -> list[Blocks]:
    """Exchange one block of the set for another while that lessens the damage; measures at most ``max_sets`` sets.

    Where the exchange saves too little the set gets one block more.

    Args:
        start: a minimal set.
        savings, min_saving, damage, max_sets, ahead: as for :func:`search`.

    Returns:
        The minimal sets that were measured, by damage.

    >>> damage = lambda blocks: sum([5, 1, 2][block] for block in blocks)
    >>> [sorted(blocks) for blocks in improve(frozenset({0, 1}), [3, 2, 2], 4, damage, 10)]
    [[1, 2], [0, 1], [0, 2]]
    """
    seen = {start: damage(start)}
    tried: set[Blocks] = set()
    while (best := min(seen, key=lambda blocks: (seen[blocks], sorted(blocks)))) not in tried:
        tried.add(best)
        fresh = [blocks for blocks in _neighbors(best, savings, min_saving) if blocks not in seen]
        fresh = fresh[: max_sets - len(seen)]
        ahead(fresh)
        seen.update({blocks: damage(blocks) for blocks in fresh})
    return sorted(seen, key=lambda blocks: (seen[blocks], sorted(blocks)))


def minimal_sets(savings: Sequence[float], min_saving: float) -> Iterator[Blocks]:
    """Every set that saves ``min_saving`` or more and of which no part does; each once, the largest blocks first.

    Blocks are added from the largest saving to the smallest. So the last one added saves the least, and a set that has
    just reached ``min_saving`` is minimal.

    >>> [sorted(blocks) for blocks in minimal_sets([3, 2, 2], 4)]
    [[0, 1], [0, 2], [1, 2]]
    """
    order = sorted(range(len(savings)), key=lambda block: -savings[block])

    def extend(chosen: tuple[int, ...], start: int) -> Iterator[Blocks]:
        for place in range(start, len(order)):
            if saved(savings, (*chosen, *order[place:])) < min_saving:
                return
            more = (*chosen, order[place])
            if saved(savings, more) >= min_saving:
                yield frozenset(more)
            else:
                yield from extend(more, place + 1)

    return extend((), 0)


def saved(savings: Sequence[float], blocks: Blocks | tuple[int, ...]) -> float:
    """What the blocks save together, added up in the order of the list: the same for the same set."""
    return sum(savings[block] for block in sorted(blocks))


def _neighbors(blocks: Blocks, savings: Sequence[float], min_saving: float) -> list[Blocks]:
    """The minimal sets in what comes of ``blocks`` when one of them is exchanged for one or two others."""
    others = [block for block in range(len(savings)) if block not in blocks]
    found: dict[Blocks, None] = {}  # in order
    for out, block in itertools.product(sorted(blocks), others):
        exchanged = (blocks - {out}) | {block}
        enough = saved(savings, exchanged) >= min_saving
        for more in [block] if enough else others:
            numbers = sorted(exchanged | {more})
            inner = minimal_sets([savings[number] for number in numbers], min_saving)
            found.update({frozenset(numbers[number] for number in minimal): None for minimal in inner})
    return list(found)


def _trimmed(blocks: Blocks, savings: Sequence[float], min_saving: float, damage: Damage, ahead: Ahead) -> Blocks:
    """Without the blocks that are not needed, the one first whose absence leaves the least damage."""
    while options := [blocks - {block} for block in blocks if saved(savings, blocks - {block}) >= min_saving]:
        ahead(options)
        blocks = min(options, key=lambda option: (damage(option), sorted(option)))
    return blocks
