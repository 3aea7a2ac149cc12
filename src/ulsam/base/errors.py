"""Errors: the one that the user can fix, and an orderly stop."""

from collections.abc import Sequence
from pathlib import Path


class UlsamError(ValueError):
    """Something is wrong that the caller can put right; the message is one line that says how.

    The command line prints it as ``ulsam: error: ...`` and exits with status 2; every other exception is a bug.
    """


class NotFinite(UlsamError):
    """A model outputs NaN or infinity."""


class MachineError(UlsamError):
    """The machine lacks something, or a disk or a network fails: not the fault of the file that was being read."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: the state is saved, and the message says how to resume.

    Attributes:
        event: what happened, and how far the work had come.
        run: the folder that `ulsam.resume` takes; None for other work than a run.
    """

    def __init__(self, event: str, advice: str, run: Path | None = None) -> None:
        super().__init__(f"{event}; {advice}")
        self.event, self.run = event, run


class LostProcess(MachineError):
    """One of several processes is gone, so the others cannot go on; the message says how to resume.

    Attributes:
        event: what happened.
        run: the folder that `ulsam.resume` takes; None for other work than a run.
        reports: whether this process is the one of those left that should say so.
    """

    def __init__(self, event: str, advice: str = "start them all again", run: Path | None = None) -> None:
        super().__init__(f"{event}; {advice}")
        self.event, self.run, self.reports = event, run, True


def printable(text: str) -> str:
    """``text`` with ? for what would not print on one line; a stranger's names can hold commands to a terminal.

    >>> printable("a\\x1b[2Jwren\\n")
    'a?[2Jwren?'
    """
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def shortened(text: str, max_length: int = 300) -> str:
    """``text`` without its middle where it is longer than a message may be; advice stands at the end.

    >>> shortened("no model " + "x" * 500, max_length=40)
    'no model xxxxxxxxxxxxxxx ... xxxxxxxxxxx'
    """
    if len(text) <= max_length:
        return text
    end = max_length // 4 + 1
    return f"{text[: max_length - end - 5]} ... {text[-end:]}"


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or the name of its type where it has none.

    >>> first_line(RuntimeError("too big\\nat line 3")), first_line(KeyError())
    ('too big', 'KeyError')
    """
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether this is what PyTorch raises when the device's memory is full.

    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
    True
    """
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def a_few(names: Sequence[str]) -> str:
    """The first five names, for a line.

    >>> a_few("abcdefg")
    'a, b, c, d, e, ...'
    """
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
