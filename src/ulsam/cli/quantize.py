"""`ulsam quantize MODEL DATA`: write a trained model in 8-bit integers, and say what that costs."""

import argparse

from ulsam.cli.common import add_model, beside, model_from, print_json

EXAMPLE = "ulsam quantize runs/mine/model.safetensors images --calibrate 256"

_PROCESSORS = {7: "every processor, also x86 without VNNI", 8: "x86 with VNNI, and ARM; elsewhere sums saturate"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_model(parser, exported=True)
    parser.add_argument("data", metavar="DATA", help="image folder, or a timm name, with the classes of the model")
    parser.add_argument("--out", metavar="FILE", help="file to write (default: MODEL's name with -int8.onnx)")
    parser.add_argument(
        "--calibrate", type=int, default=256, metavar="N", help="training images to take ranges from (default: 256)"
    )
    parser.add_argument(
        "--measure", type=int, default=1000, metavar="N", help="other images to measure on, at most (default: 1000)"
    )
    parser.add_argument("--data-dir", metavar="DIR", help="where the paths of a table count from")
    parser.add_argument(
        "--for",
        dest="target",
        choices=("this", "avx2", "vnni", "arm"),
        default="this",
        metavar="PROCESSOR",
        help="this machine's (default), avx2 (x86 without VNNI, runs everywhere), vnni or arm",
    )


def run(args: argparse.Namespace) -> None:
    """Quantize, and print how the result compares with the model."""
    from ulsam.deploy.quantize import quantize

    model = model_from(args)
    out = args.out or beside(args.model, "-int8.onnx")
    quantized = quantize(
        **model,
        data=args.data,
        out=out,
        data_dir=args.data_dir,
        calibrate=args.calibrate,
        measure=args.measure,
        target=args.target,
    )
    if args.json:
        print_json({"file": out, **vars(quantized)})
        return
    print(
        f"wrote     {out}, {quantized.bytes:,} bytes, {100 * quantized.bytes / quantized.bytes_before:.0f} % of float32"
    )
    print(f"measured  {quantized}")
    if quantized.time_ratio is not None:
        slower = ": no faster here, ship the model in float32 to such machines" if quantized.time_ratio >= 1 else ""
        print(f"time      of an image x {quantized.time_ratio:.2f}{slower}")
    print(f"weights   {quantized.weight_bits} bits, for {_PROCESSORS[quantized.weight_bits]}")
