"""`ulsam export MODEL --to FORMAT`: write a trained model for another engine."""

import argparse
from pathlib import Path

from ulsam.cli.common import add_model, beside, model_from, print_json

EXAMPLE = "ulsam export runs/mine/model.safetensors --to onnx --images images/test"
FORMATS = ("onnx", "openvino", "executorch")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_model(parser)
    parser.add_argument(
        "--to", choices=FORMATS, default="onnx", metavar="FORMAT", help="onnx (default), openvino or executorch"
    )
    parser.add_argument("--out", metavar="FILE", help="file to write (default: MODEL's name with the format's suffix)")
    parser.add_argument("--dynamic-size", action="store_true", help="leave height and width of the input open")
    parser.add_argument(
        "--no-preprocessing",
        dest="preprocessing",
        action="store_false",
        help="take normalized floats [batch, 3, H, W] in place of RGB bytes [batch, H, W, 3]",
    )
    parser.add_argument(
        "--images", nargs="+", metavar="PATH", help="compare on these, or on folders of them (default: generated ones)"
    )


def run(args: argparse.Namespace) -> None:
    """Export, and print how the result compares with the model."""
    from ulsam.deploy.export import SUFFIXES, export

    out = args.out or beside(args.model, SUFFIXES[args.to])
    parity = export(
        **model_from(args),
        out=out,
        to=args.to,
        dynamic_size=args.dynamic_size,
        preprocessing=args.preprocessing,
        images=args.images or (),
    )
    if args.json:
        print_json({"file": out, "format": args.to, "bytes": Path(out).stat().st_size, "parity": vars(parity)})
        return
    print(f"wrote     {out}, {Path(out).stat().st_size:,} bytes")
    print(f"compared  {parity}")
