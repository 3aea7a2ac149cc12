"""`ulsam export MODEL --to FORMAT`: write a trained model for another engine."""

import argparse
from pathlib import Path

from ulsam.cli.common import add_model, beside, model_from, print_json

EXAMPLE = """\
ulsam export runs/mine/model.safetensors --to onnx --images images/test
ulsam export runs/mine/model.safetensors --to coreml --half"""
FORMATS = ("onnx", "openvino", "executorch", "coreml", "tflite")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_model(parser)
    parser.add_argument(
        "--to",
        choices=FORMATS,
        metavar="FORMAT",
        help=f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]} (default: what the suffix of --out means, else onnx)",
    )
    parser.add_argument("--out", metavar="FILE", help="file to write (default: MODEL's name with the format's suffix)")
    parser.add_argument("--half", action="store_true", help="float16 in the place of float32: half the size")
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
    from ulsam.deploy.export import SUFFIXES, export, format_of

    to = args.to or (format_of(args.out) if args.out else "onnx")
    out = args.out or beside(args.model, "-fp16" * args.half + SUFFIXES[to])
    parity = export(
        **model_from(args),
        out=out,
        to=to,
        half=args.half,
        dynamic_size=args.dynamic_size,
        preprocessing=args.preprocessing,
        images=args.images or (),
    )
    path = Path(out)
    files = [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path, *path.rglob("*")]
    size = sum(file.stat().st_size for file in files if file.is_file())
    if args.json:
        found = {"parity": None, "not_compared": parity.why_not} if parity.why_not else {"parity": vars(parity)}
        print_json({"file": out, "format": to, "bytes": size, **found})
        return
    print(f"wrote     {out}, {size:,} bytes")
    print(f"compared  {parity}" if not parity.why_not else f"not compared: {parity.why_not}")
