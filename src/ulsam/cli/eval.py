"""`ulsam eval MODEL DATA`: measure a trained model."""

import argparse
from pathlib import Path
from typing import Any

from ulsam.base.errors import UlsamError
from ulsam.base.extras import check_plots
from ulsam.base.files import write_atomic
from ulsam.base.processes import is_first_process
from ulsam.cli.common import add_device, add_model, model_from, print_json
from ulsam.cli.written_files import check_written

EXAMPLE = "ulsam eval runs/mine/model.safetensors images --split test"


def configure(parser: argparse.ArgumentParser) -> None:
    add_model(parser, exported=True)
    parser.add_argument(
        "data", metavar="DATA", help="image folder, a CSV of paths and labels, or a timm name such as torch/imagenet"
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--split", metavar="NAME", help="split to measure on (default: test, else val, else the whole folder)"
    )
    data.add_argument("--data-dir", metavar="DIR", help="where a named data set, or the images of a CSV, lie")
    data.add_argument("--class-names", metavar="FILE", help="class names of a named data set, one a line")
    data.add_argument(
        "--classes-by-number",
        action="store_true",
        help="take the data's classes for the model's by their position; a name that is a number is one, from 0 on",
    )
    written = parser.add_argument_group("files")
    written.add_argument("--csv", metavar="FILE", help="precision, recall, F1 and other scores of each class")
    written.add_argument("--confusion", metavar="FILE.png", help="the confusion matrix as an image")
    machine = parser.add_argument_group("machine")
    machine.add_argument("-b", "--batch-size", type=int, default=64, metavar="N", help="images a step (default: 64)")
    machine.add_argument(
        "-j", "--workers", type=int, default=2, metavar="N", help="processes that read images (default: 2)"
    )
    add_device(machine)


def run(args: argparse.Namespace) -> None:
    """Measure, and print the scores; only the first of several processes prints."""
    from ulsam.base.provenance import command_line, versions
    from ulsam.deploy.confusion_plot import confusion_png
    from ulsam.deploy.evaluate import Evaluation, evaluate
    from ulsam.deploy.evaluate_labels import LabelEvaluation, evaluate_labels, gives_several

    if args.confusion:
        check_plots("ulsam eval --confusion")
    check_written(args, [args.model, args.data, args.weights])
    model = model_from(args)
    how: dict[str, Any] = {
        name: getattr(args, name)
        for name in ("data", "split", "data_dir", "classes_by_number", "batch_size", "workers", "device")
    }
    evaluation: Evaluation | LabelEvaluation
    if gives_several(**model):
        if args.confusion or args.class_names:
            option = "--confusion" if args.confusion else "--class-names"
            raise UlsamError(f"{option} is for one class an image, and this model gives several labels")
        evaluation = evaluate_labels(**model, **how)
    else:
        evaluation = evaluate(**model, **how, class_names=args.class_names)
    if not is_first_process():
        return
    if args.csv:
        write_atomic(args.csv, evaluation.csv())
    if args.confusion and isinstance(evaluation, Evaluation):
        write_atomic(args.confusion, confusion_png(evaluation.by_class))
    unreadable = dict(evaluation.scores.unreadable)
    if args.json:
        about = {"command": command_line(), "model": Path(args.model).name, "versions": versions()}
        print_json({**about, **evaluation.entry(), "unreadable": unreadable})
        return
    for reason in unreadable.values():
        print(f"unreadable {reason}")
    print(evaluation)
