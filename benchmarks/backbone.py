"""A starting point for any data set: a MobileNet-V2 with ImageNet weights and ULSAM in the place of four blocks.

Layers 13, 14, 16 and 17 of the paper are replaced, which leaves three quarters of the multiply-adds, and the rest is
reconstructed without labels, first block by block and then jointly, on the images that `imagenet.py` reconstructs on.
The model goes into the package with the weights of convolutions and the classifier in half precision, and what it is
worth before any training is measured on the other images: see `imagenet.py` about them.

results/packed_imagenet_ulsam75.json says what the model is.

    python benchmarks/backbone.py IMAGES WEIGHTS     # 2 hours of one core
"""

import random
import sys
from pathlib import Path

import torch
from imagenet import files, labels, measure, predictions, read, transforms_of
from package import pack

import ulsam
from ulsam.base.files import write_json
from ulsam.base.provenance import processor, versions
from ulsam.model.pretrained import class_names

ROOT = Path(__file__).parents[1]
NAME, BASE, PLACES = "imagenet_ulsam75", "mobilenetv2_100", "13,14,16,17"
STEPS, VIEWS = 2000, 8  # a place, and then jointly; random crops of each image


def main(data: Path, weights: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    classes = class_names({"num_classes": 1000})
    whole = ulsam.build(ulsam.make_spec(BASE, classes), weights=weights / f"{BASE}.safetensors")[0].eval()
    spec = ulsam.make_spec(BASE, classes, [ulsam.Edit("replace", PLACES, groups=4)])
    model, _ = ulsam.build(spec, weights=weights / f"{BASE}.safetensors")
    center, random_crop = transforms_of(whole)
    unlabeled = files(data / "reconstruct")
    random.Random(0).shuffle(unlabeled)  # a batch mixes classes
    batches = read(unlabeled, center) + read(unlabeled * VIEWS, random_crop)
    test, truth = read(files(data / "test"), center), labels(data)
    base = predictions(whole, test)
    stages = []
    for scope in ("block", "joint"):
        found = ulsam.reconstruct(model.eval(), batches, scope=scope, steps=STEPS)
        errors = [[one.name, one.before, one.after] for one in found]
        stages.append({"scope": scope, "errors": errors, **measure(predictions(model, test), base, truth)})
        print(stages[-1], flush=True)
    file = ROOT / "src" / "ulsam" / "model" / "weights" / f"{BASE}.{NAME}.safetensors"
    pack(model, spec, file)
    result = {
        "what": "published ImageNet weights, edited and reconstructed without labels, stored in half precision",
        "command": "python benchmarks/backbone.py IMAGES WEIGHTS",
        "steps": STEPS,
        "views": VIEWS,
        "images": len(truth),
        "base": measure(base, base, truth),
        "stages": stages,
        "packed": measure(predictions(ulsam.load(file)[0], test), base, truth),
        "bytes": file.stat().st_size,
        "versions": versions(),
        "processor": processor(),
    }
    write_json(ROOT / "results" / f"packed_{NAME}.json", result)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
