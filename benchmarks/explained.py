"""What a trained net looks at, in numbers: do its CAMs mean something, do its subspaces differ?

Deletion, insertion, average drop and increase in confidence of Grad-CAM++; entropy, agreement and spatial frequencies
of the subspaces; and, on the pictures of `ulsam birds`, the share of each map on the bird and its field marks. Numbers
alone are written, no picture.

    ulsam demo --out runs/demo
    python benchmarks/explained.py birds runs/demo/ulsam/model.safetensors runs/demo/birds/val \\
        --against runs/demo/base/model.safetensors     # results/explained_birds.json; a few minutes
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import guest
import torch

from ulsam.comparison.latency import processor
from ulsam.explanation.batches import measure
from ulsam.explanation.index import list_pictures
from ulsam.explanation.perturb import STEPS
from ulsam.explanation.table import table
from ulsam.files import check_writable, write_atomic
from ulsam.models import load
from ulsam.train.report import recipe_entry, versions


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the result: results/explained_NAME.json")
    parser.add_argument("model", help="model file")
    parser.add_argument("data", help="folder of pictures, in class folders")
    parser.add_argument("--against", help="model file of the base net")
    parser.add_argument("--pictures", type=int, default=1000, help="at most so many, spread evenly (default: 1000)")
    parser.add_argument("--out", help="default: results/explained_NAME.json")
    args = parser.parse_args(argv)

    out = Path(args.out or f"results/explained_{args.name}.json")
    check_writable(out)
    nets = {name: load(file) for name, file in (("this net", args.model), ("base", args.against)) if file}
    found = list_pictures([args.data], nets["this net"][1].classes)
    number = min(args.pictures, len(found))
    chosen = [found[step * len(found) // number] for step in range(number)]
    results, unreadable = measure(nets, chosen)
    told = {
        "what": "what nets look at: Grad-CAM++, subspaces and field marks in numbers, means over pictures",
        "command": f"python benchmarks/explained.py {args.name} MODEL FOLDER --pictures {args.pictures}"
        + (" --against BASE" if args.against else ""),
        "data": Path(args.data).name,
        "pictures": number - len(unreadable),
        "of": len(found),
        "steps": STEPS,
        "nets": {
            name: {"recipe": recipe_entry(recipe) | {"classes": len(recipe.classes)}, **results[name]}
            for name, (_, recipe) in nets.items()
        },
        "machine": {"processor": processor(), "threads": torch.get_num_threads()},
        "versions": versions(),
    }
    write_atomic(out, json.dumps(told, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    guest.run_script(main)
