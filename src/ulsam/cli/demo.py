"""`ulsam demo`: draw birds, train a model without and with ULSAM, show both."""

import argparse

from ulsam.cli.common import free_folder
from ulsam.cli.train import resumable
from ulsam.study.demo import CAUTION, run_demo, table
from ulsam.training.machine import keep_freed_memory


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="DIR", help="folder for everything, a new one (default: runs/demo-N)")
    parser.add_argument("--seed", type=int, default=0, help="of the drawings and of both trainings (default: 0)")


def run(args: argparse.Namespace) -> None:
    keep_freed_memory()
    out = args.out or free_folder("demo")
    with resumable():
        summaries = run_demo(out, args.seed)
    print(f"\n{table(summaries)}\n\nSeed {args.seed}. {CAUTION}")
    print(f"Image: {out}/comparison.png; the birds and both runs lie beside it.")
