"""`ulsam inspect MODEL PICTURES...`: what the attention layers of a trained net do on pictures."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ulsam.data.folder import picture_paths
from ulsam.errors import UlsamError, printable
from ulsam.evaluate import read_batch, recipe_transform
from ulsam.files import check_writable, write_atomic
from ulsam.inspection import INERT, LEGEND, inspect, table, warnings
from ulsam.models import load
from ulsam.train.report import command_line, versions

BATCH = 32


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("model", metavar="MODEL", help="a .safetensors model file of ulsam train")
    parser.add_argument("paths", nargs="+", metavar="PICTURE", help="picture files, or folders of them")
    parser.add_argument(
        "--pictures", type=int, default=256, metavar="N", help="at most so many, spread evenly (default: 256)"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the statistics to this file")


def run(args: argparse.Namespace) -> None:
    """Print a table with a line a map, what its columns mean, and a warning for each layer that does nothing."""
    if args.pictures < 1:
        raise UlsamError(f"--pictures must be 1 or more, not {args.pictures}")
    if args.json:
        check_writable(args.json)
    found = picture_paths(args.paths)
    number = min(args.pictures, len(found))
    paths = [found[n * len(found) // number] for n in range(number)]
    model, recipe = load(args.model)
    transform = recipe_transform(recipe)
    unreadable: dict[str, str] = {}

    def batches() -> Iterator[Tensor]:
        with tqdm(total=number, unit=" pictures", disable=None, leave=False) as bar:
            for first in range(0, number, BATCH):
                images, errors = read_batch(paths[first : first + BATCH], transform)
                unreadable.update(errors)
                for error in errors.values():
                    bar.write(f"unreadable {printable(error)}")
                if images:
                    yield transform.normalise(torch.stack(images))
                bar.update(len(images) + len(errors))

    layers = inspect(model, batches())
    print(table(layers))
    print(f"{layers[0].pictures} of {len(found)} pictures. {LEGEND}")
    for line in warnings(layers):
        print(f"warning {line}")
    if args.json:
        entry = {
            "command": command_line(),
            "model": Path(args.model).name,
            "layers": [{**asdict(layer), "inert": layer.inert} for layer in layers],
            "inert_below": INERT,
            "unreadable": unreadable,
            "recipe": json.loads(recipe.to_json()),
            "versions": versions(),
        }
        write_atomic(args.json, json.dumps(entry, indent=1, ensure_ascii=False) + "\n")
