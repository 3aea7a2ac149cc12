"""What slimming says of its search: what it will measure, how far it is, and how long the rest will take."""

import time
from typing import Any

from tqdm import tqdm

from ulsam.base import logs
from ulsam.base.timing import duration

INTERVAL = 30.0  # seconds between lines about how far the search is, where the output is no terminal
LONG = 10.0  # seconds of which it is worth to say how they could be fewer


class SearchProgress:
    """Shows how many sets were measured: by a bar on a terminal, elsewhere by a line now and then.

    Args:
        bar: of `ulsam.base.logs.progress`.
        shorter: the ways to measure less, for the user.
        interval: seconds between two lines.
    """

    def __init__(self, bar: "tqdm[Any]", shorter: str, interval: float = INTERVAL) -> None:
        self.bar, self.shorter, self.interval = bar, shorter, interval
        self.sets, self.seconds, self.last = 0, 0.0, time.monotonic()

    def count(self, sets: int, seconds: float) -> None:
        """So many more sets were measured, in so many seconds."""
        self.sets += sets
        self.seconds += seconds
        self.bar.update(sets)
        if self.bar.disable and time.monotonic() - self.last >= self.interval:
            left = int(self.bar.total or 0) - self.sets
            rest = f"; about {duration(self.left(left))} left for up to {left} more" if left > 0 else ""
            self.say(f"damage  sets measured so far: {self.sets}{rest}")

    def expect(self, sets: int) -> None:
        """Say how long so many more sets will take at most, from those that were measured so far."""
        self.bar.total = self.sets + sets
        self.bar.refresh()
        if self.sets and sets:
            long = f"; to shorten it: {self.shorter}" if self.left(sets) > LONG else ""
            self.say(f"time    up to {sets} sets to measure, about {duration(self.left(sets))} or less{long}")

    def left(self, sets: int) -> float:
        """Seconds that so many sets will take."""
        return sets * self.seconds / max(1, self.sets)

    def say(self, line: str) -> None:
        """Log a line."""
        self.last = time.monotonic()
        logs.say(line)
