"""`ulsam info`: what a model file holds."""

import argparse
from collections import Counter

from ulsam.costs import cost
from ulsam.models import load, read_weights
from ulsam.trained import card, locate, names


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("file", metavar="FILE", help="a .safetensors model file, or a trained net of the package")


def run(args: argparse.Namespace) -> None:
    """Rebuild the net and print its recipe, size, number formats and cost."""
    model, recipe = load(args.file)
    found = cost(model, recipe.input_size)
    formats: Counter[str] = Counter()
    for value in read_weights(args.file).values():
        formats[str(value.dtype).removeprefix("torch.")] += value.numel()
    size = "x".join(map(str, found.input_size))
    print(recipe)
    print(f"parameters  {found.params:,}")
    print(f"numbers     {', '.join(f'{count:,} {name}' for name, count in formats.most_common())}")
    print(f"file        {locate(args.file).stat().st_size:,} bytes")
    print(f"cost        {found.macs:,} MACs, {found.activations:,} activations for one {size} picture")
    if args.file in names():
        print(f"\n{card(args.file)}", end="")
