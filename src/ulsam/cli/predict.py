"""`ulsam predict MODEL PICTURES...`: name what is in pictures."""

import argparse
import json

from ulsam.data.folder import picture_paths
from ulsam.errors import UlsamError, printable
from ulsam.evaluate import predict
from ulsam.models import load


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a .safetensors model file of ulsam train")
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help="picture files, or folders of them")
    parser.add_argument("--top", type=int, default=3, metavar="N", help="classes to name for each picture (default: 3)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def run(args: argparse.Namespace) -> None:
    if args.top < 1:
        raise UlsamError(f"--top must be 1 or more, not {args.top}")
    paths = picture_paths(args.pictures)
    model, recipe = load(args.model)
    failed = 0
    for prediction in predict(model, recipe, paths, top=args.top):
        failed += prediction.error is not None
        if args.json:
            named = {name: round(share, 6) for name, share in prediction.classes}
            print(
                json.dumps({"path": prediction.path, "classes": named, "error": prediction.error}, ensure_ascii=False)
            )
        elif prediction.error:
            print(f"unreadable {prediction.error}")
        else:
            named_text = ", ".join(f"{name} {100 * share:.1f} %" for name, share in prediction.classes)
            print(printable(f"{prediction.path}: {named_text}"))
    if failed:
        raise UlsamError(f"{failed} of {len(paths)} pictures could not be read; they are named above")
