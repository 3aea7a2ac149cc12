"""`ulsam slim MODEL DATA`: replace blocks of a trained model to fit a budget, and restore its accuracy."""

import argparse
from pathlib import Path

from ulsam.base.errors import printable
from ulsam.cli.common import add_layer_options, add_model, free_folder, layer_options, model_from, only_json, print_json
from ulsam.cli.settings import add_settings, given_settings

EXAMPLE = "ulsam slim runs/mine/model.safetensors images --macs 0.75 --epochs 30 --out runs/slimmer"
ENGINES = ("eager", "onnxruntime")
#: The settings of training that slimming decides itself.
RESERVED_SETTINGS = ("model", "model_args", "pretrained", "weights", "teacher", "in_chans", "keep", "patience")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_model(parser, "model_file")
    parser.add_argument("data", metavar="DATA", help="image folder, or a timm name, with the classes of the model")
    parser.add_argument(
        "--out", metavar="DIR", help="folder of the result; the same one resumes (default: runs/slim-N)"
    )
    parser.add_argument(
        "--no-train", dest="fine_tune", action="store_false", help="stop after the choice, and print how to train"
    )
    budget = parser.add_argument_group(
        "budget, exactly one", "The share of the model's own cost to keep, such as 0.75."
    )
    for name, text in [("macs", "of the MACs"), ("params", "of the parameters"), ("latency", "of the time here")]:
        budget.add_argument(f"--{name}", type=float, metavar="SHARE", help=text)
    choice = parser.add_argument_group("choice")
    choice.add_argument("--at", help="blocks to choose from: names, globs or layer numbers (default: all that can be)")
    add_layer_options(choice, none=True)
    choice.add_argument(
        "--images", type=int, default=400, metavar="N", help="training images to measure damage on (default: 400)"
    )
    choice.add_argument(
        "--max-sets", type=int, default=200, metavar="N", help="sets to measure after the greedy search (default: 200)"
    )
    choice.add_argument(
        "--reconstruct-sets",
        type=int,
        default=4,
        metavar="N",
        help="sets of least damage to reconstruct; the best of them is chosen (default: 4; 0: the one of least damage)",
    )
    time = parser.add_argument_group("timing, for --latency")
    time.add_argument(
        "--engine", choices=ENGINES, default="eager", metavar="NAME", help="eager (default) or onnxruntime"
    )
    time.add_argument("--latency-batch", type=int, default=1, metavar="N", help="images at once (default: 1)")
    time.add_argument("--latency-threads", type=int, metavar="N", help="CPU threads (default: PyTorch's, one a core)")
    time.add_argument(
        "--latency-seconds",
        type=float,
        default=20.0,
        metavar="S",
        help="time of measuring all blocks in turn, and of each set (default: 20)",
    )
    add_settings(parser, but=RESERVED_SETTINGS)


def run(args: argparse.Namespace) -> None:
    """Slim, and print the slimmed model beside the original one."""
    from ulsam.study.slim import slim
    from ulsam.study.slim_report import result_lines
    from ulsam.training.machine import keep_freed_memory

    keep_freed_memory()
    out = args.out or free_folder("slim")
    with only_json(args):
        result = slim(
            **model_from(args, "model_file"),
            data=args.data,
            out=out,
            fine_tune=args.fine_tune,
            settings={name: value for name, value in given_settings(args).items() if name not in RESERVED_SETTINGS},
            macs=args.macs,
            params=args.params,
            latency=args.latency,
            layer=layer_options(args),
            at=args.at,
            images=args.images,
            max_sets=args.max_sets,
            reconstruct_sets=args.reconstruct_sets,
            engine=args.engine,
            latency_batch=args.latency_batch,
            latency_threads=args.latency_threads,
            latency_seconds=args.latency_seconds,
        )
    if args.json:
        print_json(result)
    else:
        print(*map(printable, result_lines(result, Path(out))), sep="\n")
