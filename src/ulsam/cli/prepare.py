"""`ulsam prepare`: an official archive as an image folder."""

import argparse
import sys

from ulsam.cli.common import print_json
from ulsam.data.prepare import OFFICIAL, mismatch, prepare

EXAMPLE = "ulsam prepare food101 food-101.tar.gz data/food101"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("name", choices=tuple(OFFICIAL), help="which data set")
    parser.add_argument(
        "archive",
        nargs="+",
        metavar="ARCHIVE",
        help="the official archives, or the folders they unpack to: "
        + "; ".join(f"{name}: {' '.join(official.archives)}" for name, official in OFFICIAL.items()),
    )
    parser.add_argument("out", metavar="OUT", help="the folder to make: OUT/train/CLASS/FILE and OUT/test/CLASS/FILE")


def run(args: argparse.Namespace) -> None:
    """Write the image folder; print how many images it holds."""
    counts = prepare(args.name, args.archive, args.out)
    if args.json:
        print_json({"folder": args.out, **counts})
    else:
        print("{}: {train} train and {test} test images of {classes} classes".format(args.out, **counts))
    if warning := mismatch(args.name, counts):
        print(f"ulsam: warning: {warning}", file=sys.stderr)
