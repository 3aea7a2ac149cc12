"""The time that calls take on this machine, in turn with each other."""

import functools
import random
import time
from collections.abc import Callable, Iterator, Mapping
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
    turns = list(in_turn({name: functools.partial(_timed, call) for name, call in calls.items()}, seconds, most_turns))
    return {name: [turn[name] for turn in turns] for name in calls}


def in_turn(
    measures: Mapping[NameT, Callable[[], float]], seconds: float, most_turns: int
) -> Iterator[dict[NameT, float]]:
    """As :func:`times_in_turn`, a turn at a time, of calls that take their own time.

    Args:
        measures: by name; each makes a call and returns the seconds that it took.

    >>> next(in_turn({"one": lambda: 1.0, "two": lambda: 2.0}, 0, 1)) == {"one": 1.0, "two": 2.0}
    True
    """
    for measure in measures.values():
        for _ in range(WARM_UP):
            measure()
    order, shuffle = list(measures), random.Random(0).shuffle
    end = time.monotonic() + seconds
    for turn in range(most_turns):
        if turn >= LEAST_TURNS and time.monotonic() > end:
            break
        shuffle(order)
        yield {name: measures[name]() for name in order}


def _timed(call: Call) -> float:
    before = time.perf_counter()
    call()
    return time.perf_counter() - before
