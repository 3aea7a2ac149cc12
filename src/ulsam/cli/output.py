"""What a command shows of the library's work, and the library's messages in the words of the command line."""

import argparse
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ulsam.base.errors import printable

_MARKED = re.compile(r"`(?:ulsam\.(?P<verb>\w+)|(?P<name>\w+)(?:=(?P<value>[^`]*))?)`")


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--quiet`` and ``--verbose``; :func:`shown` heeds them."""
    group = parser.add_argument_group("output").add_mutually_exclusive_group()
    group.add_argument("--quiet", action="store_true", help="show results, warnings and errors alone")
    group.add_argument("--verbose", action="store_true", help="also show details, and where in the code an error arose")


def in_flags(message: str, parser: argparse.ArgumentParser) -> str:
    """A message of the library with the arguments that it marks as options of this command.

    The library writes ```batch_size```, ```amp=none``` or ```reconstruct=False```. What the command has no option for
    stays as it is. A marked function, ```ulsam.export```, becomes the command, or the option, of that name.

    >>> parser = argparse.ArgumentParser()
    >>> _ = parser.add_argument("data", metavar="DATA")
    >>> _ = parser.add_argument("--batch-size", type=int)
    >>> _ = parser.add_argument("--fold", action=argparse.BooleanOptionalAction)
    >>> in_flags("`data` is too large for `batch_size=64`: set `fold=False`, or `lr`", parser)
    'DATA is too large for --batch-size 64: set --no-fold, or `lr`'
    """
    actions = {action.dest: action for action in parser._actions}

    def flag(match: re.Match[str]) -> str:
        action, value = actions.get(match["verb"] or match["name"]), match["value"]
        if action is None:
            return f"ulsam {match['verb']}" if match["verb"] else match[0]
        if not action.option_strings:
            return str(action.metavar or action.dest)
        if value in ("True", "False") and action.nargs == 0:
            off = [option for option in action.option_strings if option.startswith("--no-")]
            return off[0] if value == "False" and off else action.option_strings[0]
        return action.option_strings[-1 if action.nargs != 0 else 0] + (f" {value}" if value else "")

    return _MARKED.sub(flag, message)


@contextmanager
def shown(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Iterator[None]:
    """Within it the library's log lines are shown: progress on stdout, warnings on stderr; and its progress bars."""
    from ulsam.base.logs import LOGGER, show_progress

    before, handler = LOGGER.level, _Lines(parser)
    bars = show_progress(not args.quiet)
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.WARNING if args.quiet else logging.DEBUG if args.verbose else logging.INFO)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(before)
        show_progress(bars)


class _Lines(logging.Handler):
    """Shows the message alone, above the progress bar if there is one."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        line = printable(in_flags(record.getMessage(), self.parser))
        tqdm.write(line, file=sys.stderr if record.levelno >= logging.WARNING else sys.stdout)
