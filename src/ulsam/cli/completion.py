"""`ulsam completion SHELL`: a script that completes commands, options, values and file names."""

import argparse

from ulsam.base.extras import extra
from ulsam.cli.parser import COMMANDS, parser

EXAMPLE = """\
ulsam completion bash > ~/.local/share/bash-completion/completions/ulsam
ulsam completion zsh > ~/.zfunc/_ulsam    # a folder of $fpath"""
FILES = ("MODEL", "FILE", "YAML", "IMAGE", "PATH", "BASE", "DATA", "ARCHIVE")
FOLDERS = ("DIR", "OUT", "RUN", "FOLDER")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh"), help="the shell that reads the script")


def run(args: argparse.Namespace) -> None:
    """Print the script."""
    with extra("completion", "ulsam completion needs"):
        import shtab

    whole = parser(COMMANDS)
    for verb in whole.verbs.values():
        for action in verb._actions:
            if action.metavar in (*FILES, *FOLDERS):
                action.complete = shtab.FILE if action.metavar in FILES else shtab.DIRECTORY  # type: ignore[attr-defined]
    print(shtab.complete(whole, args.shell))
