"""`ulsam info`: what a model file holds."""

import argparse
from collections import Counter

from ulsam.model.build import load, read_weights
from ulsam.model.trained import card, locate, names
from ulsam.surgery.cost import cost


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("file", metavar="FILE", help="a .safetensors model file, or a trained model of the package")


def run(args: argparse.Namespace) -> None:
    """Rebuild the model and print its spec, size, number formats and cost."""
    model, spec = load(args.file)
    found = cost(model, spec.input_size)
    formats: Counter[str] = Counter()
    for value in read_weights(args.file).values():
        formats[str(value.dtype).removeprefix("torch.")] += value.numel()
    size = "x".join(map(str, found.input_size))
    print(spec)
    print(f"parameters  {found.params:,}")
    print(f"numbers     {', '.join(f'{count:,} {name}' for name, count in formats.most_common())}")
    print(f"file        {locate(args.file).stat().st_size:,} bytes")
    print(f"cost        {found.macs:,} MACs, {found.activations:,} activations for one {size} image")
    if args.file in names():
        print(f"\n{card(args.file)}", end="")
