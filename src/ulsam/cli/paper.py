"""`ulsam paper`: the paper's cost tables beside what this code counts."""

import argparse
from dataclasses import asdict

from ulsam.cli.common import print_json

EXAMPLE = "ulsam paper"


def configure(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(args: argparse.Namespace) -> None:
    """Count every row and print it."""
    from ulsam.model.paper import report, rows

    if args.json:
        for row in rows():
            print_json(asdict(row))
    else:
        print(report())
