"""`ulsam info`: what a model file holds."""

import argparse
from collections import Counter

from ulsam.cli.common import print_json
from ulsam.model.trained import card, locate, names

EXAMPLE = "ulsam info runs/mine/model.safetensors"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "file",
        metavar="FILE",
        help="a model file, a run's folder, a trained model of the package, or a timm name with a tag",
    )


def run(args: argparse.Namespace) -> None:
    """Rebuild the model and print its spec, size, number formats and cost."""
    from ulsam.model.build import load, read_weights
    from ulsam.model.pretrained import is_pretrained_name
    from ulsam.surgery.cost import cost
    from ulsam.training.summary import cost_entry, spec_entry

    model, spec = load(args.file)
    model_cost = cost(model, spec.input_size)
    formats: Counter[str] = Counter()
    by_name = args.file not in names() and is_pretrained_name(args.file)
    size_on_disk = None if by_name else locate(args.file).stat().st_size
    for value in (model.state_dict() if by_name else read_weights(args.file)).values():
        formats[str(value.dtype).removeprefix("torch.")] += value.numel()
    if args.json:
        entry = {"spec": spec_entry(spec), "cost": cost_entry(model_cost), "numbers": formats, "bytes": size_on_disk}
        print_json(entry)
        return
    size = "x".join(map(str, model_cost.input_size))
    print(spec)
    print(f"parameters  {model_cost.params:,}")
    print(f"numbers     {', '.join(f'{count:,} {name}' for name, count in formats.most_common())}")
    if size_on_disk is not None:
        print(f"file        {size_on_disk:,} bytes")
    print(f"cost        {model_cost.macs:,} MACs, {model_cost.activations:,} activations for one {size} image")
    if args.file in names():
        print(f"\n{card(args.file)}", end="")
