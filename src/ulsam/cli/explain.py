"""`ulsam explain MODEL IMAGES...`: show what a model looks at, image by image."""

import argparse

from ulsam.base.errors import UlsamError, printable
from ulsam.cli.common import add_model, free_folder, model_from, print_json

EXAMPLE = "ulsam explain runs/mine/model.safetensors images/test --out runs/explained"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_model(parser)
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="image files, or folders; class folders give the true classes"
    )
    parser.add_argument("--against", metavar="BASE", help="a model to compare with, likewise")
    parser.add_argument("--out", metavar="DIR", help="folder for the report, a new one (default: runs/explain-N)")
    parser.add_argument(
        "--numbers", action="store_true", help="also measure CAMs and subspaces, which takes about ten times as long"
    )


def run(args: argparse.Namespace) -> None:
    """Write the report, and say where it is."""
    from ulsam.explanation.explain_images import explain_images

    out = args.out or free_folder("explain")
    report = explain_images(**model_from(args), images=args.images, out=out, against=args.against, numbers=args.numbers)
    if args.json:
        print_json({**vars(report), "numbers": f"{out}/numbers.json" if report.numbers else None})
    else:
        for line in report.unreadable:
            print(f"unreadable {printable(line)}")
        if report.note:
            print(f"note {printable(report.note)}")
        if report.numbers:
            print(f"{report.numbers}\n")
        wrong = f", {report.wrong} of {report.known} with a known class wrong" if report.known else ""
        print(f"{report.images} image{'' if report.images == 1 else 's'}{wrong}: {printable(str(report.page))}")
    if report.unreadable:
        total = report.images + len(report.unreadable)
        raise UlsamError(f"{len(report.unreadable)} of {total} images could not be read; they are named above")
