"""The search for blocks to replace, on made-up savings and damages, against brute force."""

import itertools
import random

import pytest
import timm
from hypothesis import given
from hypothesis import strategies as st

from ulsam.base.errors import UlsamError
from ulsam.study.slim_blocks import find_blocks
from ulsam.study.slim_search import Blocks, greedy, improve, minimal_sets, search
from ulsam.surgery.cost import cost

SAVINGS = st.lists(st.integers(1, 12), min_size=1, max_size=7)


def all_minimal(savings: list[int], least: float) -> set[Blocks]:
    """By the definition: it saves enough, and without any one of its blocks it does not."""

    def enough(blocks: frozenset[int]) -> bool:
        return sum(savings[block] for block in blocks) >= least

    sizes = range(1, len(savings) + 1)
    sets = (frozenset(some) for size in sizes for some in itertools.combinations(range(len(savings)), size))
    return {blocks for blocks in sets if enough(blocks) and not any(enough(blocks - {block}) for block in blocks)}


class Damages:
    """A damage for every set, not the sum of its blocks' and sometimes below 0; counts the sets that were measured."""

    def __init__(self, seed: int) -> None:
        self.seed, self.asked = seed, set[Blocks]()

    def __call__(self, blocks: Blocks) -> float:
        self.asked.add(blocks)
        draw = random.Random(f"{self.seed} {sorted(blocks)}")
        return sum(random.Random(f"{self.seed} {block}").random() for block in blocks) + draw.uniform(-0.5, 0.5)


@given(SAVINGS, st.floats(0.01, 1))
def test_minimal_sets_are_those_of_the_definition(savings, share):
    least = share * sum(savings)
    found = list(minimal_sets(savings, least))
    assert len(found) == len(set(found))
    assert set(found) == all_minimal(savings, least)


@given(SAVINGS, st.floats(0.01, 1), st.integers(0, 99))
def test_the_exact_search_finds_the_best_minimal_set(savings, share, seed):
    least, damage = share * sum(savings), Damages(seed)
    found = search(savings, least, damage, max_sets=1000)
    everything = all_minimal(savings, least)
    assert found.how == "exact"
    assert damage(found.blocks) == min(map(damage, everything)) <= damage(found.greedy)
    assert set(found.rivals) == everything
    assert found.rivals[0] == found.blocks
    assert found.greedy == greedy(savings, least, damage)
    assert found.greedy in everything


@given(SAVINGS, st.floats(0.01, 1), st.integers(0, 99), st.integers(1, 10))
def test_a_search_of_few_sets_is_no_worse_than_greedy_and_keeps_to_its_limit(savings, share, seed, most):
    least, damage = share * sum(savings), Damages(seed)
    greedy(savings, least, damage)
    for_greedy = set(damage.asked)
    found = search(savings, least, damage, max_sets=most)
    everything = all_minimal(savings, least)
    assert found.how == ("exact" if len(everything) <= most else "greedy")
    assert damage(found.blocks) <= damage(found.greedy)
    assert set(found.rivals) <= everything
    assert sorted(map(damage, found.rivals)) == [damage(rival) for rival in found.rivals]
    assert len(damage.asked - for_greedy) <= most


def test_mobilenet_v2_at_three_quarters_is_searched_exactly_by_default():
    """The example of the documentation: some 160 minimal sets."""
    model = timm.create_model("mobilenetv2_100")
    savings = [block.macs for block in find_blocks(model, (3, 160, 160), {})[0]]
    found = search(savings, cost(model, (3, 160, 160)).macs / 4, Damages(0))
    assert found.how == "exact"
    assert len(found.rivals) > 150


def test_greedy_weighs_damage_against_what_is_saved_with_those_already_replaced():
    table = {(0,): 1.0, (1,): 3.0, (2,): 1.5, (0, 1): 9.0, (0, 2): 2.6, (1, 2): 3.5, (0, 1, 2): 9.0}
    # 1/2 < 1.5/2 < 3/3: block 0 first; then 2 (1.6/2) rather than 1 (8/3); then 1; and 0 is not needed any more
    assert greedy([2, 3, 2], 5, lambda blocks: table[tuple(sorted(blocks))]) == {1, 2}


def test_swaps_leave_a_greedy_set_that_is_not_the_best():
    table = {(0, 1): 5.0, (0, 2): 4.0, (1, 2): 6.0, (2, 3): 1.0, (0, 3): 7.0, (1, 3): 8.0}
    found = improve(frozenset({0, 1}), [1, 1, 1, 1], 2, lambda blocks: table[tuple(sorted(blocks))], 64)
    assert found[0] == {2, 3}  # two exchanges away
    assert len(found) == len(set(found)) == 6


def test_too_little_to_save_is_refused():
    with pytest.raises(UlsamError, match="all 2 blocks together save 3, less than 4"):
        search([1, 2], 4, len)
