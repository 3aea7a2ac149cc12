"""`ulsam paper`: the paper's cost tables beside what this code counts."""

import argparse
import json
from dataclasses import asdict

from ulsam.model.paper import report, rows


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("--json", action="store_true", help="print the rows as JSON, accuracies included")


def run(args: argparse.Namespace) -> None:
    """Count every row and print it."""
    print(json.dumps([asdict(row) for row in rows()], indent=1) if args.json else report())
