"""`ulsam predict MODEL IMAGES...`: name what is in images."""

import argparse
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ulsam.base.errors import UlsamError, printable
from ulsam.cli.common import print_json
from ulsam.data.folder import image_paths

if TYPE_CHECKING:
    from ulsam.training.predict import Prediction

EXAMPLE = "ulsam predict runs/mine/model.safetensors images/test --top 1"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a model file, a trained model of the package, or NAME.onnx of ulsam export"
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument("--top", type=int, default=3, metavar="N", help="classes to name for each image (default: 3)")


def run(args: argparse.Namespace) -> None:
    if args.top < 1:
        raise UlsamError(f"--top must be 1 or more, not {args.top}")
    paths = image_paths(args.images)
    failed = 0
    for prediction in _predictions(args.model, paths, args.top):
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
        raise UlsamError(f"{failed} of {len(paths)} images could not be read; they are named above")


def _predictions(model: str, paths: Sequence[str], top: int) -> "Iterable[Prediction]":
    """By ONNX Runtime for an exported model, which needs no PyTorch: neither may be imported for the other."""
    if model.endswith(".onnx"):
        from ulsam import runtime

        return runtime.load(model).predict(paths, top=top)
    from ulsam.model.build import load
    from ulsam.training.evaluate import predict

    return predict(*load(model), paths, top=top)
