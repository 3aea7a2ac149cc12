"""The time that calls take on this machine, in turn with each other, and its summary."""

import functools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

NameT = TypeVar("NameT")
Call = Callable[[], Any]

WARM_UP = 3  # calls of each that are not timed
MIN_TURNS = 15
RESAMPLES = 1000
MIN_TURNS_OF_INTERVAL = 6  # below, no interval of a median has 95 %


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


def time_in_turn(calls: Mapping[NameT, Call], seconds: float, max_turns: int) -> dict[NameT, Timing]:
    """Time calls in turns as :func:`times_in_turn`, and compare each with the first one.

    >>> found = time_in_turn({"short": lambda: sum(range(100)), "long": lambda: sum(range(100_000))}, 0.1, 100)
    >>> found["short"].ratio, found["long"].ratio > 2
    (1.0, True)
    """
    times = times_in_turn(calls, seconds, max_turns)
    first = times[next(iter(calls))]
    found = {}
    for name, taken in times.items():
        low, middle, high = statistics.quantiles((mine / base for mine, base in zip(taken, first, strict=True)), n=4)
        found[name] = Timing(statistics.median(taken), middle, (low, high), len(taken))
    return found


@torch.inference_mode()
def times_in_turn(calls: Mapping[NameT, Call], seconds: float, max_turns: int) -> dict[NameT, list[float]]:
    """Time calls in turns, each of them once a turn in shuffled order, so that what slows the machine slows them all.

    Args:
        calls: by name.
        seconds: after which, and at least 15 turns, it ends.
        max_turns: after which it ends in any case.

    Returns:
        Seconds of each call, a turn each, after three calls of each that are not timed.

    >>> found = times_in_turn({"short": lambda: sum(range(100)), "long": lambda: sum(range(100_000))}, 0, 100)
    >>> len(found["short"]), min(found["long"]) > min(found["short"])
    (15, True)
    """
    turns = list(in_turn({name: functools.partial(_timed, call) for name, call in calls.items()}, seconds, max_turns))
    return {name: [turn[name] for turn in turns] for name in calls}


def in_turn(
    measures: Mapping[NameT, Callable[[], float]], seconds: float, max_turns: int
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
    for turn in range(max_turns):
        if turn >= MIN_TURNS and time.monotonic() > end:
            break
        shuffle(order)
        yield {name: measures[name]() for name in order}


def figures(times: Sequence[float], first: Sequence[float] | None) -> dict[str, Any]:
    """A summary of seconds, a turn each: the median, the 95th percentile, and the ratio of the medians of two models.

    The ratio of a :class:`Timing` is the median of the turns' ratios instead. That one bears a machine whose speed
    changes; this one is the quotient of the two medians in a table.

    Args:
        times: of the model.
        first: of the model that it is compared with, in the same turns; ``times`` itself for that model.

    >>> figures([3.0, 1.0, 2.0], [6.0, 2.0, 4.0])["ratio"]
    0.5
    """
    ratio = interval = None
    if first is not None:
        ratio = float(np.median(times) / np.median(first))
        if first is not times and len(times) >= MIN_TURNS_OF_INTERVAL:
            interval = ratio_interval(np.array(times), np.array(first))
    return {
        "seconds": float(np.median(times)),
        "seconds_p95": float(np.quantile(times, 0.95)),
        "ratio": ratio,
        "ratio_interval": interval,
        "turns": len(times),
    }


def ratio_interval(times: NDArray[Any], first: NDArray[Any]) -> tuple[float, float]:
    """The 95 % interval of the ratio of two medians, by the bootstrap: whole turns are drawn, with both their times.

    So what slowed both in a turn stays together (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, 13.3).

    >>> ratio_interval(np.array([2.0] * 9), np.array([4.0] * 9))
    (0.5, 0.5)
    """
    chosen = np.random.default_rng(0).integers(0, len(times), (RESAMPLES, len(times)))
    low, high = np.quantile(np.median(times[chosen], 1) / np.median(first[chosen], 1), [0.025, 0.975])
    return float(low), float(high)


def _timed(call: Call) -> float:
    before = time.perf_counter()
    call()
    return time.perf_counter() - before


def duration(seconds: float) -> str:
    """A time in the two units that say most of it.

    >>> duration(59), duration(1544.6), duration(7500)
    ('59 s', '25 min 45 s', '2 h 5 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"
