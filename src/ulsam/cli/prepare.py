"""`ulsam prepare`: an official archive, or a table of paths and classes, as an image folder."""

import argparse
import sys

from ulsam.base.errors import UlsamError
from ulsam.cli.common import print_json
from ulsam.data.prepare import OFFICIAL, mismatch, prepare

EXAMPLE = "ulsam prepare food101 food-101.tar.gz data/food101"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("name", choices=(*OFFICIAL, "csv"), help="which data set, or csv")
    parser.add_argument(
        "archive",
        nargs="+",
        metavar="ARCHIVE",
        help="the official archives, or the folders they unpack to: "
        + "; ".join(f"{name}: {' '.join(official.archives)}" for name, official in OFFICIAL.items())
        + "; csv: a table with a column for the path and one for the class",
    )
    parser.add_argument("out", metavar="OUT", help="the folder to make: OUT/train/CLASS/FILE and OUT/test/CLASS/FILE")


def run(args: argparse.Namespace) -> None:
    """Write the image folder; print how many images it holds."""
    if args.name == "csv":
        _prepare_csv(args)
        return
    counts = prepare(args.name, args.archive, args.out)
    if args.json:
        print_json({"folder": args.out, **counts})
    else:
        print("{}: {train} train and {test} test images of {classes} classes".format(args.out, **counts))
    if warning := mismatch(args.name, counts):
        print(f"ulsam: warning: {warning}", file=sys.stderr)


def _prepare_csv(args: argparse.Namespace) -> None:
    from ulsam.data.prepare_table import prepare_table

    if len(args.archive) != 1:
        raise UlsamError(f"one table is made into a folder, not {len(args.archive)}")
    counts = prepare_table(args.archive[0], args.out)
    if args.json:
        print_json({"folder": args.out, **counts})
    else:
        print(f"{args.out}: {counts['images']} images of {counts['classes']} classes")
