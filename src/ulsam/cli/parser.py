"""The parser of the command line: its verbs, its help, and what it says of a mistake.

It imports neither PyTorch nor timm nor numpy, so that ``--help``, a mistake and shell completion take no time.
"""

import argparse
import difflib
import importlib
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from ulsam import __version__
from ulsam.base.errors import UlsamError
from ulsam.cli.output import add_output_options

COMMANDS = {
    "demo": "draw birds, train a model, make it smaller, and restore its accuracy",
    "train": "train a model on a folder of images",
    "compare": "train several models with the same settings, and give intervals of their differences",
    "slim": "replace blocks of a trained model to fit a budget, and train it again",
    "eval": "measure a trained model on a folder of images",
    "predict": "classify images",
    "export": "write a trained model for another engine: ONNX, OpenVINO, ExecuTorch",
    "quantize": "write a trained model in 8-bit integers, and say what that costs",
    "push": "put a trained model on the Hugging Face hub, in timm's format",
    "bench": "time models side by side in the engines that run them: eager, compile, ONNX Runtime, OpenVINO",
    "serve": "classify images over HTTP, with batching, limits and metrics",
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
    "prepare": "turn an official data-set archive, or a CSV of paths and classes, into an image folder",
    "check": "look for broken, duplicate and leaked images, and odd classes, in an image folder or a CSV",
    "completion": "print a script that completes ulsam's commands and options in bash or zsh",
}

GUIDE = f"""\
ulsam {__version__}: subspace attention for compact CNNs

See it work, in about three minutes:
  ulsam demo
Add attention to a model, and train it on a folder with one folder a class:
  ulsam candidates mobilenetv2_100
  ulsam train images --pretrained --replace 14,17 --out runs/mine
Make a trained model smaller:
  ulsam slim runs/mine/model.safetensors images --macs 0.75
See what it looks at, and ship it:
  ulsam explain runs/mine/model.safetensors images/test
  ulsam export runs/mine/model.safetensors

ulsam --help lists all commands, ulsam COMMAND --help the options of one."""

_JSON = "print JSON objects to stdout, one a line, and nothing else"
_KINDS = {int: "a whole number", float: "a number"}


class Parser(argparse.ArgumentParser):
    """argparse's parser, but a mistake gets one line, which suggests what was meant.

    Options are written out: ``--seed`` is never taken for ``--seeds``.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False, formatter_class=_Help)
        self.verbs: dict[str, Parser] = {}

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        raise UlsamError(f"{message}{' See' if message.endswith('?') else '; see'} {self.prog} --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As in argparse, which calls this of a verb's parser too; what is not known is an error at once."""
        for word in () if self._subparsers else args or ():  # what follows a verb is its parser's
            if word == "--":
                break
            if word.startswith("--") and " " not in word:  # argparse takes any other word for a value
                self._check_option(word.partition("=")[0])
        found, left = super().parse_known_args(args, namespace)
        if left:
            if left[0].startswith("-"):
                self._check_option(left[0])
            self.error(f"unexpected argument {left[0]!r}{self._of_a_list(left[0], args)}")
        return found, left

    def _of_a_list(self, word: str, args: Any) -> str:
        """The end of a message about a word that follows the value of an option whose values have commas."""
        words = list(args or ())
        option, value = ["", "", *words[: words.index(word)]][-2:] if word in words else ("", "")
        action = self._option_string_actions.get(option)
        if action is None or not str(action.metavar).endswith(("AT", ",...")):
            return ""
        return f": several values of {option} have commas between them, and no blanks: {value.rstrip(',')},{word}"

    def _check_option(self, option: str) -> None:
        if option not in self._option_string_actions:
            names = [name.removeprefix("--") for name in self._option_string_actions if name.startswith("--")]
            self.error(f"no option {option}{did_you_mean(option.lstrip('-'), names, start='--')}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        if isinstance(action, argparse._SubParsersAction):
            raise argparse.ArgumentError(None, f"no command {value!r}{did_you_mean(value, action.choices)}")
        valid = ", ".join(map(str, action.choices))
        raise argparse.ArgumentError(action, f"{value!r} is not one of {valid}{did_you_mean(value, action.choices)}")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if action.nargs == "+" and action.type in _KINDS:  # numbers: commas between them do as well as blanks
            arg_strings = [part for word in arg_strings for part in word.replace(",", " ").split()] or arg_strings
        return super()._get_values(action, arg_strings)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError:
            if action.type not in _KINDS:
                raise
            raise argparse.ArgumentError(action, f"must be {_KINDS[action.type]}, not {arg_string!r}") from None


class _Help(argparse.RawDescriptionHelpFormatter):
    """argparse's help, but the line of usage names only what must be given: the options are listed below it."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(f"{prog} [options]", max_help_position=30, **options)

    def add_usage(
        self, usage: str | None, actions: Iterable[argparse.Action], groups: Iterable[Any], prefix: str | None = None
    ) -> None:
        super().add_usage(usage, [action for action in actions if action.required or not action.option_strings], ())


def did_you_mean(word: str, valid: Iterable[str], start: str = "") -> str:
    """The end of a message: the valid word nearest to ``word``, with ``start`` before it, or nothing.

    >>> did_you_mean("trian", ["train", "eval"]), did_you_mean("x", ["train"])
    ('; did you mean train?', '')
    """
    near = difflib.get_close_matches(word, list(valid), n=1)
    return f"; did you mean {start}{near[0]}?" if near else ""


def parser(verbs: Iterable[str]) -> Parser:
    """The parser of the command line, with the arguments of the given verbs alone."""
    main = Parser(prog="ulsam", description="Subspace attention for compact CNNs: edit, train, compare, ship.")
    main.add_argument("--version", action="version", version=f"ulsam {__version__}")
    commands = main.add_subparsers(dest="command", metavar="COMMAND", title="commands", prog="ulsam")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=textwrap.fill(text[0].upper() + text[1:] + ".", 80))
        main.verbs[name] = command
        if name in verbs:
            module = importlib.import_module(f"ulsam.cli.{name}")
            module.configure(command)
            if name != "completion":
                command.add_argument("--json", action="store_true", help=_JSON)
            add_output_options(command)
            command.set_defaults(parser=command)
            command.epilog = "example:\n" + textwrap.indent(module.EXAMPLE, "  ")
    return main


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read a command line; only the module of its verb is imported.

    Raises:
        UlsamError: what cannot be read.
        SystemExit: ``--help`` or ``--version``, after printing.
    """
    whole = parser([word for word in argv if not word.startswith("-")][:1])
    args = whole.parse_args(argv)
    if args.command is None:
        whole.error("no command")
    return args
