"""`ulsam eval MODEL DATA`: measure a trained model."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ulsam.base.errors import UlsamError, printable
from ulsam.cli.common import print_json
from ulsam.data.folder import find_splits

if TYPE_CHECKING:
    from torch import nn

    from ulsam.data.augment import EvalTransform
    from ulsam.model.spec import ModelSpec

EXAMPLE = "ulsam eval runs/mine/model.safetensors images --split test"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a model file, a trained model of the package, or NAME.onnx of ulsam export"
    )
    parser.add_argument("data", metavar="DATA", help="image folder, or a timm name such as torch/imagenet")
    data = parser.add_argument_group("data")
    data.add_argument("--split", help="split to measure on (default: test, else val, else the whole folder)")
    data.add_argument("--data-dir", metavar="DIR", help="where a named data set lies")
    data.add_argument("--class-names", metavar="FILE", help="class names of a named data set, one a line")
    data.add_argument(
        "--classes-by-number",
        action="store_true",
        help="take the data's classes for the model's by their position, whatever their names",
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument("-b", "--batch-size", type=int, default=64, metavar="N", help="images a step (default: 64)")
    machine.add_argument(
        "-j", "--workers", type=int, default=2, metavar="N", help="processes that read images (default: 2)"
    )
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")


def run(args: argparse.Namespace) -> None:
    from ulsam.base.distributed import start
    from ulsam.base.provenance import command_line, versions
    from ulsam.data.loading import eval_loader
    from ulsam.data.opening import open_split
    from ulsam.deploy.exported_module import load_exported
    from ulsam.model.build import sketch
    from ulsam.surgery.cost import cost
    from ulsam.training.evaluate import evaluate
    from ulsam.training.summary import cost_entry, score_entry

    if args.batch_size < 1 or args.workers < 0:
        name, least, value = ("batch-size", 1, args.batch_size) if args.batch_size < 1 else ("workers", 0, args.workers)
        raise UlsamError(f"--{name} must be {least} or more, not {value}")
    split = args.split or _default_split(args.data)
    exported = args.model.endswith(".onnx")
    if exported and args.device not in ("auto", "cpu"):
        raise UlsamError(f"--device {args.device}: an exported model runs on the CPU here")
    with start("cpu" if exported else args.device) as world:
        model, spec, transform = load_exported(args.model) if exported else _load(args.model)
        images = open_split(
            args.data,
            split,
            spec.classes,
            data_dir=args.data_dir,
            class_names=args.class_names,
            by_number=args.classes_by_number,
        )
        batches = eval_loader(
            images,
            transform,
            batch_size=args.batch_size,
            workers=args.workers,
            rank=world.rank,
            world=world.size,
            device=world.device,
        )
        progress = split if world.writes else None
        scores = evaluate(
            model.to(world.device),
            batches,
            len(spec.classes),
            world=world,
            channels_last=not exported,
            progress=progress,
        )
    if not world.writes:
        return
    if args.json:
        print_json(
            {
                "command": command_line(),
                "model": Path(args.model).name,
                "split": split,
                "scores": score_entry(scores, spec.classes),
                "unreadable": dict(scores.unreadable),
                "cost": cost_entry(cost(sketch(spec) if exported else model, spec.input_size)),
                "spec": json.loads(spec.to_json()),
                "versions": versions(),
            }
        )
        return
    for _, reason in scores.unreadable:
        print(f"unreadable {reason}")
    worst = sorted(
        (
            (entry["top1"], name, entry["images"])
            for name, entry in scores.per_class(spec.classes).items()
            if entry["images"]
        )
    )[:5]
    low, high = scores.interval
    print(f"top-1   {100 * scores.top1:.2f} % (95 % interval {100 * low:.1f} to {100 * high:.1f})")
    print(f"top-5   {100 * scores.top5:.2f} %")
    print(f"loss    {scores.loss:.4f}")
    print(f"on      {scores.images} images, split {split}" + _left_out(len(scores.unreadable)))
    print("lowest  " + "; ".join(f"{printable(name)} {100 * top1:.0f} % of {n}" for top1, name, n in worst))
    if split == "all":
        print(
            "note    measured on all images of the folder, those trained on included: a fair score is that on the"
            " held-out ones in the summary.json of the run, or on a folder of other images"
        )


def _load(model: str) -> "tuple[nn.Module, ModelSpec, EvalTransform]":
    from ulsam.model.build import load
    from ulsam.training.evaluate import spec_transform

    loaded, spec = load(model)
    return loaded, spec, spec_transform(spec)


def _default_split(data: str) -> str:
    """test, else val, of an image folder; timm's "validation" of a named data set."""
    from ulsam.data.opening import is_named

    if is_named(data):
        return "validation"
    splits = find_splits(data)
    return next((name for name in ("test", "val") if name in splits), "all")


def _left_out(count: int) -> str:
    return f"; {count} unreadable ones left out" if count else ""
