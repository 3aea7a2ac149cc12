"""The command line: `ulsam VERB ...`, one module a verb, imported only when that verb is called.

A command module has two functions: ``configure(parser)`` adds its arguments, ``run(args)`` calls the library and
prints.
"""

import argparse
import importlib
import io
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from ulsam import __version__
from ulsam.base.errors import UlsamError, printable
from ulsam.base.processes import is_first_process
from ulsam.cli.output import add_output_options, in_flags, shown

COMMANDS = {
    "demo": "draw birds, train a model without and with ULSAM, show both",
    "train": "train a model on a folder of images",
    "compare": "train several models under one recipe, and say how sure their difference is",
    "slim": "replace blocks of a trained model to fit a budget, and train it again",
    "eval": "measure a trained model on a folder of images",
    "predict": "name what is in images",
    "export": "write a trained model for another engine: ONNX, OpenVINO, ExecuTorch",
    "quantize": "write a trained model in 8-bit integers, and say what that costs",
    "bench": "time models side by side in the engines that run them: eager, compile, ONNX Runtime, OpenVINO",
    "serve": "name images over HTTP, with batching, limits and metrics",
    "inspect": "say what the attention layers of a trained model do on images",
    "explain": "show what a model looks at, image by image, in a report",
    "explore": "ask models about images on a local web page",
    "report": "one page about one or several runs: curves, cost, confusions, images",
    "info": "print what a model file holds",
    "candidates": "list the blocks of a model that ULSAM can replace",
    "profile": "count parameters, MACs and activations, block by block",
    "paper": "the paper's cost tables beside what this code counts",
    "doctor": "say which backend computes the attention layers here, and why",
    "birds": "draw the generated bird data set as an image folder",
    "prepare": "turn an official data-set archive into an image folder",
}


class _Parser(argparse.ArgumentParser):
    """argparse's parser, but a mistake gets one line, without the usage of every option above it.

    Options are written out: ``--seed`` is never taken for ``--seeds``.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"ulsam: error: {message}; see {self.prog} --help\n")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read a command line; only the module of its verb is imported. Exits with status 2 on what cannot be read."""
    parser = _Parser(prog="ulsam", description="Subspace attention for compact CNNs: edit, train, compare, ship.")
    parser.add_argument("--version", action="version", version=f"ulsam {__version__}")
    verbs = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        sub = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if argv and argv[0] == name:
            importlib.import_module(f"ulsam.cli.{name}").configure(sub)
            add_output_options(sub)
            sub.set_defaults(parser=sub)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 2 a mistake that the user can fix, 130 interrupted."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log says at any time how far a run is
    try:
        args = parse(list(sys.argv[1:] if argv is None else argv))
        with shown(args, args.parser):
            importlib.import_module(f"ulsam.cli.{args.command}").run(args)
        return 0
    except UlsamError as error:
        if args.verbose:
            traceback.print_exc()
        print(f"ulsam: error: {printable(in_flags(str(error), args.parser))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        if is_first_process():  # of several processes, which all stop, the first one tells
            print(f"ulsam: {in_flags(str(stop), args.parser) or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
