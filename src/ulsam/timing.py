"""The time that calls take on this machine, in turn with each other."""

import random
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

NameT = TypeVar("NameT")
Call = Callable[[], Any]

WARM_UP = 3  # calls of each that are not timed
LEAST_TURNS = 15


@torch.inference_mode()
def times_in_turn(calls: Mapping[NameT, Call], seconds: float, most_turns: int) -> dict[NameT, list[float]]:
    """Time calls in turns, each of them once a turn in shuffled order, so that what slows the machine slows them all.

    Args:
        calls: by name.
        seconds: after which, and at least 15 turns, it ends.
        most_turns: after which it ends in any case.

    Returns:
        Seconds of each call, a turn each, after three calls of each that are not timed.

    >>> found = times_in_turn({"short": lambda: sum(range(100)), "long": lambda: sum(range(100_000))}, 0, 100)
    >>> len(found["short"]), min(found["long"]) > min(found["short"])
    (15, True)
    """
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    times: dict[NameT, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    end = time.monotonic() + seconds
    for turn in range(most_turns):
        if turn >= LEAST_TURNS and time.monotonic() > end:
            break
        shuffle(order)
        for name in order:
            before = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - before)
    return times
