"""`ulsam candidates`: the blocks of a model that ULSAM can replace, and what that saves."""

import argparse

from ulsam.base.errors import UlsamError
from ulsam.base.text_table import text_table
from ulsam.cli.common import add_model_arguments, print_json, spec_from

EXAMPLE = "ulsam candidates mobilenetv2_100 --size 160"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_model_arguments(parser)
    parser.add_argument("--leaves", action="store_true", help="also single layers: convolutions, norms")


def run(args: argparse.Namespace) -> None:
    """Print one line a candidate, outermost first."""
    from ulsam.model.build import meta_model
    from ulsam.surgery.cost import cost
    from ulsam.surgery.find import candidates
    from ulsam.surgery.places import layer_names

    spec = spec_from(args)
    model = meta_model(spec)
    blocks = candidates(model, spec.input_size, leaves=args.leaves)
    if not blocks:
        raise UlsamError(f"{args.model} has no block that takes and outputs the same feature map [B, C, H, W]")
    total = cost(model, spec.input_size)
    numbers = {name: number for number, name in layer_names(model).items()}
    if args.json:
        for block in blocks:
            print_json(
                {
                    "layer": numbers.get(block.name),
                    "name": block.name,
                    "type": block.type,
                    "shape": block.shape,
                    "params_saved": block.params,
                    "macs_saved": block.macs,
                    "groups": block.groups,
                }
            )
        return
    cells = [["layer", "name", "type", "output", "params saved", "", "MACs saved", "", "groups"]]
    for block in blocks:
        shape = "x".join(map(str, block.shape))
        params = [f"{block.params:,}", f"{block.params / total.params:.2%}"]
        macs = [f"{block.macs:,}", f"{block.macs / total.macs:.2%}"]
        groups = ",".join(map(str, block.groups))
        cells.append([str(numbers.get(block.name, "")), block.name, block.type, shape, *params, *macs, groups])
    print("\n".join(text_table(cells, right=(0, 3, 4, 5, 6, 7))))
    size = "x".join(map(str, spec.input_size))
    print(f"One {size} image; per cent of the whole model's {total.params:,} parameters and {total.macs:,} MACs.")
    if not numbers:
        print("The paper's layer numbers exist for MobileNet-V1 and V2 alone: name blocks of this model.")
