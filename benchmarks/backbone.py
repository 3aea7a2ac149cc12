"""A starting point for any data set: a MobileNet-V2 with ImageNet weights and ULSAM in the place of four blocks.

Layers 13, 14, 16 and 17 of the paper are replaced, which leaves three quarters of the multiply-adds, and the rest is
reconstructed without labels, first block by block and then jointly, on the images that `imagenet.py` reconstructs on.
The model goes into the package without a classifier, with the weights of its convolutions in half precision. How far
its features are from those of the whole model is measured on the other images.

results/packed_imagenet_ulsam75.json says what the model is.

    python benchmarks/backbone.py IMAGES WEIGHTS     # 1 hour of one core; WEIGHTS is a file without a classifier
"""

import random
import sys
from pathlib import Path

import torch
from imagenet import files, read, transforms_of
from package import pack
from torch import Tensor, nn

import ulsam
from ulsam.base.files import write_json
from ulsam.base.provenance import processor, versions

ROOT = Path(__file__).parents[1]
NAME, BASE, PLACES = "imagenet_ulsam75", "mobilenetv2_100", "13,14,16,17"
STEPS, VIEWS = 2000, 8  # a place, and then jointly; random crops of each image


def main(data: Path, weights: Path, root: Path = ROOT) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    whole = ulsam.build(ulsam.make_spec(BASE, ()), weights=weights)[0].eval()
    spec = ulsam.make_spec(BASE, (), [ulsam.Edit("replace", PLACES, groups=4)])
    model, _ = ulsam.build(spec, weights=weights)
    center, random_crop = transforms_of(whole)
    unlabeled = files(data / "reconstruct")
    random.Random(0).shuffle(unlabeled)  # a batch mixes classes
    batches = read(unlabeled, center) + read(unlabeled * VIEWS, random_crop)
    test = read(files(data / "test"), center)
    wanted = features(whole, test)
    stages = [{"scope": None, "error": error(features(model, test), wanted)}]
    for scope in ("block", "joint"):
        found = ulsam.reconstruct(model.eval(), batches, scope=scope, steps=STEPS)
        trained_on = [[one.name, one.before, one.after] for one in found]
        stages.append({"scope": scope, "trained_on": trained_on, "error": error(features(model, test), wanted)})
        print(stages[-1], flush=True)
    file = root / "src" / "ulsam" / "model" / "weights" / f"{BASE}.{NAME}.safetensors"
    pack(model, spec, file)
    costs = {"base": ulsam.cost(whole), "this": ulsam.cost(model)}
    result = {
        "what": "ImageNet weights, edited and reconstructed without labels, stored in half precision; relative squared "
        "error of the last feature map against the whole model's, on other images",
        "command": "python benchmarks/backbone.py IMAGES WEIGHTS",
        "steps": STEPS,
        "views": VIEWS,
        "images": {"reconstruct": len(unlabeled), "test": sum(map(len, test))},
        "macs": {name: cost.macs for name, cost in costs.items()},
        "params": {name: cost.params for name, cost in costs.items()},
        "stages": stages,
        "packed": error(features(ulsam.load(file)[0], test), wanted),
        "bytes": file.stat().st_size,
        "versions": versions(),
        "processor": processor(),
    }
    write_json(root / "results" / f"packed_{NAME}.json", result)


@torch.inference_mode()
def features(model: nn.Module, batches: list[Tensor]) -> Tensor:
    """The last feature maps [N, 1280, 7, 7]."""
    return torch.cat([model.eval().forward_features(batch) for batch in batches])


def error(found: Tensor, wanted: Tensor) -> float:
    """The sum of squared differences over the sum of squares; 0 is perfect."""
    return float((found - wanted).square().sum() / wanted.square().sum())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
