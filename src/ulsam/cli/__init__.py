"""The command line: `ulsam VERB ...`, one module a verb, imported only when that verb is called.

A command module has ``EXAMPLE``, command lines for its help; ``configure(parser)``, which adds its arguments; and
``run(args)``, which calls the library and prints. Only ``run`` imports what is heavy, PyTorch above all.
"""

import importlib
import io
import os
import sys
import traceback
from collections.abc import Sequence

from ulsam.base.errors import LostProcess, UlsamError, printable, shortened
from ulsam.base.processes import is_first_process
from ulsam.base.reading import machine_fault
from ulsam.cli.output import in_flags, shown
from ulsam.cli.parser import COMMANDS, GUIDE, parse

__all__ = ["COMMANDS", "main", "parse"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 2 a mistake that the user can fix, 130 interrupted."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log says at any time how far a run is
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        print(GUIDE)
        return 0
    try:
        args = parse(words)
    except UlsamError as error:
        print(f"ulsam: error: {shortened(printable(str(error)))}", file=sys.stderr)
        return 2
    try:
        with shown(args, args.parser):
            importlib.import_module(f"ulsam.cli.{args.command}").run(args)
        return 0
    except UlsamError as error:
        if args.verbose:
            traceback.print_exc()
        if not isinstance(error, LostProcess) or error.reports:
            print(f"ulsam: error: {shortened(printable(in_flags(str(error), args.parser)))}", file=sys.stderr)
        return 2
    except (OSError, MemoryError) as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        fault = machine_fault(error)
        if isinstance(error, OSError) and error.filename:
            fault = f"{os.fsdecode(error.filename)}: {fault or str(error.strerror).lower()}"
        if fault is None:
            raise
        if args.verbose:
            traceback.print_exc()
        print(f"ulsam: error: {shortened(printable(in_flags(fault, args.parser)))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        if is_first_process():  # of several processes, which all stop, the first one reports it
            print(f"ulsam: {in_flags(str(stop), args.parser) or 'interrupted'}", file=sys.stderr)
        return 130
