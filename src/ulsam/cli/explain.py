"""`ulsam explain MODEL PICTURES...`: show what a net looks at, picture by picture."""

import argparse

from ulsam.cli.common import free_folder
from ulsam.errors import UlsamError, printable
from ulsam.explanation.run import explain_pictures


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "model", metavar="MODEL", help="a .safetensors model file of ulsam train, or a trained net of the package"
    )
    parser.add_argument(
        "pictures", nargs="+", metavar="PICTURE", help="picture files, or folders; class folders tell the true classes"
    )
    parser.add_argument("--against", metavar="BASE", help="model file of a net to compare with")
    parser.add_argument("--out", metavar="DIR", help="folder for the report, a new one (default: runs/explain-N)")
    parser.add_argument(
        "--numbers", action="store_true", help="also measure CAMs and subspaces, which takes about ten times as long"
    )


def run(args: argparse.Namespace) -> None:
    """Write the report, and say where it is."""
    out = args.out or free_folder("explain")
    report = explain_pictures(args.model, args.pictures, out, against=args.against, numbers=args.numbers)
    for line in report.unreadable:
        print(f"unreadable {printable(line)}")
    if report.note:
        print(f"note {printable(report.note)}")
    if report.numbers:
        print(f"{report.numbers}\n")
    wrong = f", {report.wrong} of {report.known} with a known class wrong" if report.known else ""
    print(f"{report.pictures} picture{'' if report.pictures == 1 else 's'}{wrong}: {printable(str(report.page))}")
    if report.unreadable:
        total = report.pictures + len(report.unreadable)
        raise UlsamError(f"{len(report.unreadable)} of {total} pictures could not be read; they are named above")
