"""What the library says while it works: lines of the logger "ulsam", and progress bars. It prints nothing itself."""

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ulsam.base.errors import printable

if TYPE_CHECKING:
    from tqdm import tqdm

WARNING = logging.WARNING

LOGGER = logging.getLogger("ulsam")

_bars_shown = True


def say(line: str, *, level: int = logging.INFO) -> None:
    """Log a line about the progress of some work; what would not print on one line becomes ?.

    ``logging.basicConfig(level=logging.INFO)`` shows such lines; the command line shows them by itself.

    >>> import sys
    >>> LOGGER.addHandler(shown := logging.StreamHandler(sys.stdout))
    >>> LOGGER.setLevel(logging.INFO)
    >>> say("epoch   1/2")
    epoch   1/2
    >>> LOGGER.removeHandler(shown)
    >>> LOGGER.setLevel(logging.NOTSET)
    """
    LOGGER.log(level, "%s", printable(line))


def show_progress(shown: bool) -> bool:
    """Show progress bars on terminals, which is the default, or none: for the whole process, from the next bar on.

    Returns:
        Whether they were shown before.

    >>> before = show_progress(False)
    >>> progress(range(3)).disable
    True
    >>> show_progress(before)
    False
    """
    global _bars_shown
    before, _bars_shown = _bars_shown, shown
    return before


def progress(items: Iterable[Any] | None = None, *, shown: bool = True, **options: Any) -> "tqdm[Any]":
    """A progress bar on stderr, if that is a terminal, unless :func:`show_progress` switched bars off.

    Args:
        items: to iterate over; without them the caller updates the bar.
        shown: False for none here.
        options: of `tqdm.tqdm`.

    >>> sum(progress([1, 2, 3]))
    6
    """
    from tqdm import tqdm  # the runtime without PyTorch comes without it

    return tqdm(items, **{"disable": None if shown and _bars_shown else True, "leave": False, **options})
