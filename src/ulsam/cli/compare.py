"""`ulsam compare DATA --arm base --arm EDITS ...`: train several models with the same settings, and compare them."""

import argparse
from typing import Any

from ulsam.base.errors import UlsamError, printable
from ulsam.cli.common import numbers, only_json, print_json
from ulsam.cli.output import in_flags
from ulsam.cli.settings import add_settings, given_settings
from ulsam.training.config import read_config

EXAMPLE = """\
ulsam compare images --arm base --arm "replace 14,17" --arm "remove 14,17" --pretrained --out runs/compared"""
#: What is handed to `ulsam.compare` where it is given; the defaults are those there.
PLAN = ("seeds", "rates", "tried_epochs", "tried_seeds", "choose_split", "jobs", "launcher", "ray_address")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="?", metavar="DATA", help="image folder, or a timm name such as torch/imagenet")
    parser.add_argument(
        "--arm",
        action="append",
        dest="arms",
        metavar="[NAME: ]ITEMS",
        help="a model to compare, repeatable: edits and setting=value with ; between them, as 'remove 14,17; size=96'; "
        "base: no change. The others are compared with the first one",
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="folder of the comparison; the same one resumes it")
    plan = parser.add_argument_group("runs")
    plan.add_argument("--seeds", type=int, metavar="N", help="runs of each arm, with seeds from --seed on (default: 5)")
    plan.add_argument("--rates", type=numbers(float), metavar="LR,...", help="learning rates to try")
    plan.add_argument("--tried-epochs", type=numbers(int), metavar="N,...", help="epochs to try")
    plan.add_argument("--tried-seeds", type=int, metavar="N", help="runs of each try, the mean counts (default: 1)")
    plan.add_argument(
        "--tried-within",
        type=float,
        metavar="POINTS",
        help="rates this near to the best at the first --tried-epochs are tried at the others too (default: 1)",
    )
    plan.add_argument(
        "--choose-split", metavar="NAME", help="choose on this split (default: on held-out training images)"
    )
    parser.add_argument(
        "-c", "--config", metavar="YAML", help="settings from a file; options on the command line come first"
    )
    plan.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: 1; with ray: as many as fit)")
    plan.add_argument("--launcher", choices=["local", "ray"], help="where runs are started (default: local)")
    plan.add_argument("--ray-address", metavar="ADDRESS", help="Ray cluster (default: RAY_ADDRESS, else this machine)")
    parser.add_argument(
        "--margin",
        type=float,
        metavar="POINTS",
        help="an arm is non-inferior if it loses less than this (default: 0.5)",
    )
    parser.add_argument("--report-only", action="store_true", help="train nothing: the tables of what is in --out")
    parser.add_argument(
        "--from", dest="start_from", metavar="FILE", help="published comparison whose runs are put into --out first"
    )
    parser.add_argument(
        "--publish", metavar="FILE", help="pack all summaries into this .jsonl.gz file, without machine paths"
    )
    add_settings(parser, but=("split_seed", "val_every", "keep", "patience"))


def run(args: argparse.Namespace) -> None:
    """Exits with status 1 if a run failed."""
    from ulsam.study.compare import compare, report
    from ulsam.study.compare_report import written
    from ulsam.study.compare_table import text
    from ulsam.training.machine import keep_freed_memory

    keep_freed_memory()

    margin = {} if args.margin is None else {"margin": args.margin / 100}
    plan = {name: value for name in PLAN if (value := getattr(args, name)) is not None}
    if args.tried_within is not None:
        plan["tried_within"] = args.tried_within / 100
    if args.report_only:
        if args.data or args.arms or args.config or plan or given_settings(args):
            raise UlsamError("--report-only trains nothing: leave all but --margin, --from and --publish out")
        result = report(args.out, start_from=args.start_from, publish=args.publish, **margin)
    else:
        with only_json(args):
            result = compare(
                arms=args.arms or (),
                out=args.out,
                start_from=args.start_from,
                publish=args.publish,
                **margin,
                **plan,
                **_data_and_settings(args),
            )
    if args.json:
        print_json(result)
    else:
        print(in_flags(text(result), args.parser))
        print(f"\nwritten to {printable(', '.join(written(args.out)))}")
    if any(arm["failed"] for arm in result["arms"]):
        raise SystemExit(1)


def _data_and_settings(args: argparse.Namespace) -> dict[str, Any]:
    settings = {**(read_config(args.config) if args.config else {}), **given_settings(args)}
    data = args.data or settings.pop("data", None)
    if data is None:
        raise UlsamError("no data given: name an image folder or a data set")
    return {"data": data, "settings": settings}
