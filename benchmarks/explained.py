"""What a trained model looks at, in numbers: do its CAMs mean something, do its subspaces differ?

Deletion, insertion, average drop and increase in confidence of Grad-CAM++; entropy, agreement and spatial frequencies
of the subspaces; and, on the images of `ulsam birds`, the share of each map on the bird and its field marks. Numbers
alone are written, no image.

    python benchmarks/explained.py birds runs/ulsam/model.safetensors birds/val \\
        --against runs/base/model.safetensors     # results/explained_birds.json; a few minutes

The committed result is of mobilenetv1_050 and its block 12 replaced with g=4, each trained from scratch for 9 epochs on
400 birds a class of broadbar and finebar, spotted and speckled, with short bills, at 96 pixels.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import external_arm
import torch

from ulsam.base.files import check_writable, write_atomic
from ulsam.base.provenance import processor, versions
from ulsam.explanation.explain_table import table
from ulsam.explanation.image_list import list_images
from ulsam.explanation.measured_batches import measure
from ulsam.explanation.perturb import STEPS
from ulsam.model.build import load
from ulsam.training.summary import spec_entry


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the result: results/explained_NAME.json")
    parser.add_argument("model", help="model file")
    parser.add_argument("data", help="folder of images, in class folders")
    parser.add_argument("--against", help="model file of the base model")
    parser.add_argument("--images", type=int, default=1000, help="at most this many, spread evenly (default: 1000)")
    parser.add_argument("--out", help="default: results/explained_NAME.json")
    args = parser.parse_args(argv)

    out = Path(args.out or f"results/explained_{args.name}.json")
    check_writable(out)
    models = {name: load(file) for name, file in (("this model", args.model), ("base", args.against)) if file}
    found = list_images([args.data], models["this model"][1].classes)
    number = min(args.images, len(found))
    chosen = [found[step * len(found) // number] for step in range(number)]
    results, unreadable = measure(models, chosen)
    result = {
        "what": "what models look at: Grad-CAM++, subspaces and field marks in numbers, means over images",
        "command": f"python benchmarks/explained.py {args.name} MODEL FOLDER --images {args.images}"
        + (" --against BASE" if args.against else ""),
        "data": Path(args.data).name,
        "images": number - len(unreadable),
        "of": len(found),
        "steps": STEPS,
        "models": {
            name: {"spec": spec_entry(spec) | {"classes": len(spec.classes)}, **results[name]}
            for name, (_, spec) in models.items()
        },
        "machine": {"processor": processor(), "threads": torch.get_num_threads()},
        "versions": versions(),
    }
    write_atomic(out, json.dumps(result, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    external_arm.run_script(main)
