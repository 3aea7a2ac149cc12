"""What benchmarks share about time: short calls in turn, one call, and an interval of medians.

Calls of a millisecond or more are timed by `ulsam.base.timing` itself.
"""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

Call = Callable[[], Any]


def medians(
    calls: Mapping[str, Call],
    seconds: float = 0.0,
    *,
    least_turns: int = 5,
    block: float = 4e-3,
    wait: Call = lambda: None,
) -> dict[str, float]:
    """Seconds a call of each, medians of turns in which each is called as often as takes about ``block`` seconds.

    Args:
        calls: by name.
        seconds: after which, and at least so many turns, it ends.
        least_turns: so many.
        block: seconds of a turn; where that is 4 calls or more, one more is made first and not timed.
        wait: for a device to be done.
    """
    numbers = {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        wait()
        began = time.perf_counter()
        call()
        wait()
        numbers[name] = max(1, min(2000, int(block / (time.perf_counter() - began))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < least_turns:
        for name, call in calls.items():
            if numbers[name] > 3:
                call()
                wait()
            began = time.perf_counter()
            for _ in range(numbers[name]):
                call()
            wait()
            times[name].append((time.perf_counter() - began) / numbers[name])
    return {name: statistics.median(found) for name, found in times.items()}


def seconds_of(call: Call) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def interval(values: list[float], rounds: int = 1000) -> tuple[float, float]:
    """95 % of the medians of samples drawn from ``values`` with repetition."""
    draw = random.Random(0)
    found = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(rounds))
    return found[int(0.025 * rounds)], found[int(0.975 * rounds)]
