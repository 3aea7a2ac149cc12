"""`ulsam profile`: what a model costs, block by block, before and after edits."""

import argparse
import dataclasses
from typing import TYPE_CHECKING

from ulsam.base.files import write_atomic
from ulsam.base.text_table import as_csv
from ulsam.cli.common import add_edit_options, add_model_arguments, edits_from, print_json, spec_from

if TYPE_CHECKING:
    from ulsam.surgery.cost import Cost

EXAMPLE = "ulsam profile mobilenetv2_100 --replace 14,17 --groups 8"
RULES = ("exact", "paper")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_model_arguments(parser)
    add_edit_options(parser)
    parser.add_argument(
        "--rule",
        choices=RULES,
        default="exact",
        metavar="NAME",
        help="exact (default), or paper: without BatchNorm's parameters",
    )
    parser.add_argument("--csv", metavar="FILE", help="also write the rows to this file")


def run(args: argparse.Namespace) -> None:
    """Print the table, with edits also base against edited."""
    from ulsam.model.build import meta_model
    from ulsam.surgery.cost import cost
    from ulsam.training.summary import cost_entry

    spec = spec_from(args)
    edits = edits_from(args, args.model)
    edited = dataclasses.replace(spec, edits=(*spec.edits, *edits))
    model_cost = cost(meta_model(edited), spec.input_size, args.rule)
    base = cost(meta_model(spec), spec.input_size, args.rule) if edits else None
    if args.json:
        blocks = [dataclasses.asdict(row) for row in model_cost.rows]
        print_json({**cost_entry(model_cost), "base": base and cost_entry(base), "blocks": blocks})
    else:
        print(model_cost)
    if base and not args.json:
        changes = [
            f"{name} {before:,} -> {after:,} ({(after - before) / before:+.2%})"
            for name, before, after in [
                ("parameters", base.params, model_cost.params),
                ("MACs", base.macs, model_cost.macs),
                ("activations", base.activations, model_cost.activations),
            ]
        ]
        print(f"{args.model}, {'; '.join(map(str, edits))}: {', '.join(changes)}")
    if args.csv:
        write_atomic(args.csv, _csv(model_cost))


def _csv(model_cost: "Cost") -> str:
    rows: list[list[object]] = [["block", "type", "channels", "height", "width", "params", "macs", "activations"]]
    for row in model_cost.rows:
        shape = row.output_shape[1:] if row.output_shape and len(row.output_shape) == 4 else ("", "", "")
        rows.append([row.name, row.type, *shape, row.params, row.macs, row.activations])
    return as_csv(rows)
