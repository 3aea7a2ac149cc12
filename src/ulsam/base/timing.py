"""The time that calls take on this machine, in turn with each other."""

import functools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch

NameT = TypeVar("NameT")
Call = Callable[[], Any]

WARM_UP = 3  # calls of each that are not timed
LEAST_TURNS = 15


@dataclass(frozen=True)
class Timing:
    """The time of one call; a turn makes every call once, so that what slows the machine slows them all."""

    seconds: float  # median
    ratio: float  # to the first call's time, median over the turns
    ratio_quartiles: tuple[float, float]
    turns: int

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "ratio_quartiles": list(self.ratio_quartiles)}


def time_in_turn(calls: Mapping[NameT, Call], seconds: float, most_turns: int) -> dict[NameT, Timing]:
    """Time calls in turns as :func:`times_in_turn`, and compare each with the first one.

    >>> found = time_in_turn({"short": lambda: sum(range(100)), "long": lambda: sum(range(100_000))}, 0.1, 100)
    >>> found["short"].ratio, found["long"].ratio > 2
    (1.0, True)
    """
    times = times_in_turn(calls, seconds, most_turns)
    first = times[next(iter(calls))]
    found = {}
    for name, taken in times.items():
        low, middle, high = statistics.quantiles((mine / base for mine, base in zip(taken, first, strict=True)), n=4)
        found[name] = Timing(statistics.median(taken), middle, (low, high), len(taken))
    return found


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
