"""`ulsam predict MODEL IMAGES...`: name what is in images."""

import argparse

from ulsam.base.errors import UlsamError, printable
from ulsam.cli.common import add_model, model_from, print_json

EXAMPLE = "ulsam predict runs/mine/model.safetensors images/test --top 1"


def configure(parser: argparse.ArgumentParser) -> None:
    add_model(parser, exported=True)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument("--top", type=int, default=3, metavar="N", help="classes to name for each image (default: 3)")


def run(args: argparse.Namespace) -> None:
    """Print a line an image; fails in the end if one of them cannot be read."""
    from ulsam.deploy.predict import predict

    failed = total = 0
    for prediction in predict(**model_from(args), images=args.images, top=args.top):
        total += 1
        failed += prediction.error is not None
        if args.json:
            named = {name: round(share, 6) for name, share in prediction.classes}
            print_json({"path": prediction.path, "classes": named, "error": prediction.error})
        elif prediction.error:
            print(f"unreadable {prediction.error}")
        else:
            named_text = ", ".join(f"{name} {100 * share:.1f} %" for name, share in prediction.classes)
            print(printable(f"{prediction.path}: {named_text}"))
    if failed:
        raise UlsamError(f"{failed} of {total} images could not be read; they are named above")
