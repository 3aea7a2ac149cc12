"""Images that cannot be read: a few are left out and named, too many end the run."""

import logging
from collections.abc import Iterable

from ulsam.base.errors import UlsamError
from ulsam.base.logs import say


class Unreadable:
    """Images that any process could not read: each is named once, and too many of them end the run."""

    def __init__(self, total: int, largest_share: float, reports: bool = True) -> None:
        self.limit = max(3, int(total * largest_share))
        self.reports = reports
        self.reasons: dict[str, str] = {}

    @property
    def names(self) -> list[str]:
        """The names of those that were met, sorted."""
        return sorted(self.reasons)

    def add(self, unreadable: Iterable[tuple[str, str]]) -> None:
        """Note what was met; all processes note the same, so that all end.

        Raises:
            UlsamError: more than the largest share of all images (and more than 3) cannot be read.
        """
        for name, reason in unreadable:
            if name not in self.reasons:
                self.reasons[name] = reason
                if self.reports and len(self.reasons) <= self.limit + 1:
                    say(f"unreadable {reason}", level=logging.WARNING)
        if len(self.reasons) > self.limit:
            causes = {reason.partition(": ")[2] for reason in self.reasons.values()}
            common = f"; all of them: {cause}" if len(causes) == 1 and (cause := causes.pop()) else ""
            raise UlsamError(
                f"more than {self.limit} images cannot be read (named above): see `max_unreadable`{common}"
            )
