"""`ulsam demo`: train on drawn birds, make the model smaller, and restore its accuracy."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ulsam.base.errors import Interrupted
from ulsam.cli.common import free_folder, only_json, print_json

if TYPE_CHECKING:
    from ulsam.study.demo import DemoRow

EXAMPLE = "ulsam demo --out runs/demo"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="DIR", help="folder for everything, a new one (default: runs/demo-N)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the drawings and of all trainings (default: 0)"
    )


def run(args: argparse.Namespace) -> None:
    from dataclasses import asdict

    from ulsam.study.demo import run_demo
    from ulsam.training.machine import keep_freed_memory

    keep_freed_memory()

    out = args.out or free_folder("demo")
    try:
        with only_json(args):
            rows = run_demo(out, args.seed)
    except Interrupted as stop:
        raise KeyboardInterrupt(f"{stop.event}; the demonstration begins anew: run it with another --out") from None
    if args.json:
        for row in rows:
            print_json(asdict(row))
        return
    print(text(rows, args.seed, out))


def text(rows: Sequence["DemoRow"], seed: int, out: str | Path) -> str:
    """What the command prints of the models: the table, the seed with its caution, and where the files lie."""
    from ulsam.study.demo import CAUTION, table

    return (
        f"\n{table(rows)}\n\nSeed {seed}. {CAUTION}\n"
        f"Image: {out}/demo.png; the birds, the models and their runs lie beside it."
    )
