"""`ulsam export MODEL --to FORMAT`: write a trained net for another engine."""

import argparse
from pathlib import Path

from ulsam.cli.common import beside
from ulsam.data.folder import picture_paths
from ulsam.exporting import SUFFIXES, export
from ulsam.models import load


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "model", metavar="MODEL", help="a .safetensors model file of ulsam train, or a trained net of the package"
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
        "--pictures", nargs="+", metavar="PATH", help="compare on these, or on folders of them (default: drawn birds)"
    )


def run(args: argparse.Namespace) -> None:
    """Export, and print how the result compares with the net."""
    pictures = picture_paths(args.pictures or [])
    model, recipe = load(args.model)
    out = args.out or beside(args.model, SUFFIXES.get(args.to, ""))
    parity = export(
        model,
        recipe,
        out,
        args.to,
        dynamic_size=args.dynamic_size,
        preprocessing=args.preprocessing,
        pictures=pictures,
    )
    print(f"wrote     {out}, {Path(out).stat().st_size:,} bytes")
    print(f"compared  {parity}")
