"""`ulsam export MODEL --to FORMAT`: write a trained model for another engine."""

import argparse
from pathlib import Path

from ulsam.cli.common import beside
from ulsam.deploy.export import SUFFIXES, export


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "model", metavar="MODEL", help="a .safetensors model file of ulsam train, or a trained model of the package"
    )
    parser.add_argument("--to", default="onnx", metavar="FORMAT", help="onnx (default), openvino or executorch")
    parser.add_argument("--out", metavar="FILE", help="file to write (default: MODEL's name with the format's suffix)")
    parser.add_argument("--dynamic-size", action="store_true", help="leave height and width of the input open")
    parser.add_argument(
        "--no-preprocessing",
        dest="preprocessing",
        action="store_false",
        help="take normalised floats [batch, 3, H, W] in place of RGB bytes [batch, H, W, 3]",
    )
    parser.add_argument(
        "--images", nargs="+", metavar="PATH", help="compare on these, or on folders of them (default: drawn birds)"
    )


def run(args: argparse.Namespace) -> None:
    """Export, and print how the result compares with the model."""
    out = args.out or beside(args.model, SUFFIXES.get(args.to, ""))
    parity = export(
        args.model,
        out,
        args.to,
        dynamic_size=args.dynamic_size,
        preprocessing=args.preprocessing,
        images=args.images or (),
    )
    print(f"wrote     {out}, {Path(out).stat().st_size:,} bytes")
    print(f"compared  {parity}")
