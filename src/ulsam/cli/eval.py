"""`ulsam eval MODEL DATA`: measure a trained model."""

import argparse
import json
from pathlib import Path

from ulsam.base.files import check_writable, write_atomic
from ulsam.base.processes import is_first_process
from ulsam.base.provenance import command_line, versions
from ulsam.deploy.evaluate import evaluate


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a model file, a trained model of the package, or NAME.onnx of ulsam export"
    )
    parser.add_argument("data", metavar="DATA", help="image folder, or a timm name such as torch/imagenet")
    parser.add_argument("--split", help="split to measure on (default: test, else val, else the whole folder)")
    parser.add_argument("--data-dir", metavar="DIR", help="where a named data set lies")
    parser.add_argument("--class-names", metavar="FILE", help="class names of a named data set, one a line")
    parser.add_argument(
        "--classes-by-number",
        action="store_true",
        help="take the data's classes for the model's by their position, whatever their names",
    )
    parser.add_argument("--batch-size", type=int, default=64, metavar="N")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes that read images")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", metavar="FILE", help="write all scores, every class's too, to this file")


def run(args: argparse.Namespace) -> None:
    """Measure, and print the scores; only the first of several processes prints."""
    if args.json:
        check_writable(args.json)
    found = evaluate(
        args.model,
        args.data,
        split=args.split,
        data_dir=args.data_dir,
        class_names=args.class_names,
        classes_by_number=args.classes_by_number,
        batch_size=args.batch_size,
        workers=args.workers,
        device=args.device,
    )
    if not is_first_process():
        return
    for _, reason in found.scores.unreadable:
        print(f"unreadable {reason}")
    print(found)
    if args.json:
        entry = {
            "command": command_line(),
            "model": Path(args.model).name,
            **found.entry(),
            "versions": versions(),
        }
        write_atomic(args.json, json.dumps(entry, indent=1, ensure_ascii=False) + "\n")
