"""`ulsam compare DATA --arm base --arm EDITS ...`: train several models under one recipe, and compare them."""

import argparse
from typing import Any

from ulsam.base.errors import UlsamError
from ulsam.cli.common import numbers
from ulsam.cli.settings import add_settings, given_settings
from ulsam.study.compare import MARGIN, compare, report
from ulsam.study.compare_table import text
from ulsam.training.config import read_config
from ulsam.training.machine import keep_freed_memory

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
        "base: no change. The first one is what the others are held against",
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="folder of the comparison; go on with the same one")
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="runs of each arm, with seeds from --seed on (default: 5)"
    )
    parser.add_argument("--rates", type=numbers(float), metavar="LR,...", help="learning rates to try")
    parser.add_argument("--tried-epochs", type=numbers(int), metavar="N,...", help="epochs to try")
    parser.add_argument("--tried-seeds", type=int, metavar="N", help="runs of each try, the mean counts (default: 1)")
    parser.add_argument(
        "--choose-split", metavar="SPLIT", help="choose on this split (default: on held-out training images)"
    )
    parser.add_argument("--config", metavar="YAML", help="settings from a file; options on the command line come first")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: 1; with ray: as many as fit)")
    parser.add_argument("--launcher", choices=["local", "ray"], help="where runs are started (default: local)")
    parser.add_argument(
        "--ray-address", metavar="ADDRESS", help="Ray cluster (default: RAY_ADDRESS, else this machine)"
    )
    parser.add_argument(
        "--margin",
        type=float,
        default=100 * MARGIN,
        metavar="POINTS",
        help="an arm holds if it loses less than this (default: %(default)g)",
    )
    parser.add_argument("--report-only", action="store_true", help="train nothing: the tables of what is in --out")
    parser.add_argument(
        "--from", dest="start_from", metavar="FILE", help="published comparison whose runs are put into --out first"
    )
    parser.add_argument(
        "--publish", metavar="FILE", help="pack all summaries into this .jsonl.gz file, without machine paths"
    )
    add_settings(parser, but=("split_seed", "val_every"))


def run(args: argparse.Namespace) -> None:
    """Exits with status 1 if a run failed."""
    keep_freed_memory()
    margin = args.margin / 100
    plan = {name: value for name in PLAN if (value := getattr(args, name)) is not None}
    if args.report_only:
        if args.data or args.arms or args.config or plan or given_settings(args):
            raise UlsamError("--report-only trains nothing: leave all but --margin, --from and --publish out")
        result = report(args.out, margin=margin, start_from=args.start_from, publish=args.publish)
    else:
        result = compare(
            arms=args.arms or (),
            out=args.out,
            margin=margin,
            start_from=args.start_from,
            publish=args.publish,
            **plan,
            **_data_and_settings(args),
        )
    print(text(result))
    if any(arm["failed"] for arm in result["arms"]):
        raise SystemExit(1)


def _data_and_settings(args: argparse.Namespace) -> dict[str, Any]:
    settings = {**(read_config(args.config) if args.config else {}), **given_settings(args)}
    data = args.data or settings.pop("data", None)
    if data is None:
        raise UlsamError("no data given: name an image folder or a data set")
    return {"data": data, "settings": settings}
