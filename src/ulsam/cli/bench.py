"""`ulsam bench MODEL...`: models side by side in the engines that run them."""

import argparse

from ulsam.cli.common import free_folder, numbers, only_json, print_json

EXAMPLE = "ulsam bench mobilenetv2_100 runs/mine/model.safetensors --batch 1,8 --threads 1,2"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="a timm name (random weights), hf-hub:USER/MODEL, a model file, a run's folder, or NAME.onnx of ulsam "
        "export or quantize; the others are compared with the first one",
    )
    parser.add_argument(
        "--backends",
        type=lambda text: tuple(text.split(",")),
        default=("eager", "onnxruntime"),
        metavar="NAME,...",
        help="of eager, compile, onnxruntime, openvino (default: eager,onnxruntime)",
    )
    parser.add_argument(
        "--batch",
        dest="batches",
        type=numbers(int),
        default=(1, 32),
        metavar="N,...",
        help="images a call (default: 1,32)",
    )
    parser.add_argument("--threads", type=numbers(int), default=(1,), metavar="N,...", help="CPU threads (default: 1)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=30.0,
        metavar="S",
        help="time for each batch size and number of threads, all models together (default: 30)",
    )
    parser.add_argument("--size", type=int, metavar="PIXELS", help="height and width (default: each model's own)")
    parser.add_argument(
        "--no-fold", dest="fold", action="store_false", help="run models as they were trained, by eager and compile"
    )
    parser.add_argument("--out", metavar="DIR", help="folder of the result (default: runs/bench-N)")


def run(args: argparse.Namespace) -> None:
    """Measure, and print the table."""
    from ulsam.deploy.bench import bench
    from ulsam.deploy.bench_report import text, to_json

    out = args.out or free_folder("bench")
    with only_json(args):
        rows = bench(
            args.models,
            out,
            backends=args.backends,
            batches=args.batches,
            threads=args.threads,
            seconds=args.seconds,
            size=args.size,
            fold=args.fold,
        )
    if args.json:
        for row in rows:
            print_json(to_json(row))
    else:
        print(f"\n{text(rows)}\n\nwrote   {out}/bench.csv, bench.png and bench.json")
