"""`ulsam inspect MODEL IMAGES...`: what the attention layers of a trained model do on images."""

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ulsam.base.errors import UlsamError, printable
from ulsam.cli.common import add_model, model_from, only_json, print_json

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = "ulsam inspect runs/mine/model.safetensors images/test --images 64"
BATCH = 32


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_model(parser)
    parser.add_argument("paths", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument(
        "--images", type=int, default=256, metavar="N", help="at most this many, spread evenly (default: 256)"
    )


def run(args: argparse.Namespace) -> None:
    """Print a table with a line a map, what its columns mean, and a warning for each layer that does nothing."""
    import torch

    from ulsam.base.logs import progress
    from ulsam.base.provenance import command_line, versions
    from ulsam.data.folder import image_paths
    from ulsam.explanation.inspect_maps import LEGEND, inspect, table, warnings
    from ulsam.explanation.measures import INERT
    from ulsam.model.given import model_and_spec
    from ulsam.training.evaluate import read_batch, spec_transform
    from ulsam.training.summary import spec_entry
    from ulsam.training.trained_on import note_trained_on

    if args.images < 1:
        raise UlsamError(f"--images must be 1 or more, not {args.images}")
    files = image_paths(args.paths)
    number = min(args.images, len(files))
    paths = [files[n * len(files) // number] for n in range(number)]
    model, spec = model_and_spec(**model_from(args), classes=False)
    transform = spec_transform(spec)
    unreadable: dict[str, str] = {}

    def batches() -> "Iterator[Tensor]":
        with progress(total=number, unit=" images") as bar:
            for first in range(0, number, BATCH):
                images, errors = read_batch(paths[first : first + BATCH], transform)
                unreadable.update(errors)
                for error in errors.values():
                    bar.write(f"unreadable {printable(error)}")
                if images:
                    yield transform.normalize(torch.stack(images))
                bar.update(len(images) + len(errors))

    with only_json(args):
        layers = inspect(model, batches())
    note_trained_on(args.model, paths, args.paths)
    if args.json:
        print_json(
            {
                "command": command_line(),
                "model": Path(args.model).name,
                "layers": [{**asdict(layer), "inert": layer.inert} for layer in layers],
                "inert_below": INERT,
                "unreadable": unreadable,
                "spec": spec_entry(spec),
                "versions": versions(),
            }
        )
        return
    print(table(layers))
    print(f"{layers[0].images} of {len(files)} images. {LEGEND}")
    for line in warnings(layers):
        print(f"warning {line}")
