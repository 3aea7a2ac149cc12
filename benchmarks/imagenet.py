"""The paper's ImageNet rows without a label: blocks taken out or replaced by ULSAM, and reconstructed on 500 images.

Published ImageNet weights, one image of each of 500 classes to reconstruct on, one of each of 500 others to measure on;
these are most likely training images, so that differences between models count, not scores. Each model is measured as
its edit leaves it and after each way of reconstruction. Intervals are over images: each way is run once. A finished
model is not made again.

    python benchmarks/imagenet.py IMAGES WEIGHTS     # results/imagenet.json; 3 hours of one core

IMAGES holds reconstruct/, test/ and labels.csv (path, class index); WEIGHTS holds NAME.safetensors of both models.
"""

import copy
import csv
import functools
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform
from torch import Tensor, nn
from torchvision import transforms

import ulsam
from ulsam.base.files import write_json
from ulsam.base.provenance import processor
from ulsam.study.statistics import crossed_interval

RESULT = Path("results/imagenet.json")
HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # arguments of timm's model, and of its transform
    "mobilenetv2_100": ({}, {}),
    "mobilenetv1_100": ({"pad_type": "same", "bn_eps": 1e-3}, HALF),
}
ROWS = [  # of the paper's tables 3 and 4; layers count from the stem convolution, 1
    ("mobilenetv2_100", "14,17"),
    ("mobilenetv2_100", "16,17"),
    ("mobilenetv2_100", "13,14,16,17"),
    ("mobilenetv1_100", "12"),
]
EDITS = {"remove": ulsam.remove, "ULSAM": functools.partial(ulsam.replace, groups=4)}
WAYS: dict[str, dict[str, Any]] = {  # views: random crops of each image beside the center one
    "no reconstruction": {},
    "500 steps a place": {"steps": 500},
    "2000 steps a place, 8 views of each image": {"steps": 2000, "views": 8},
    "500 steps, all places jointly": {"steps": 500, "scope": "joint"},
}


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.jpg"))


def read(files: list[Path], transform: Any) -> list[Tensor]:
    """Batches of 32."""
    images = [transform(Image.open(file).convert("RGB")) for file in files]
    return [torch.stack(images[at : at + 32]) for at in range(0, len(images), 32)]


@torch.inference_mode()
def predictions(model: nn.Module, batches: list[Tensor]) -> Tensor:
    return torch.cat([model.eval()(batch) for batch in batches])


def labels(data: Path) -> Tensor:
    """The classes of the images to measure on."""
    known = {row["path"]: int(row["class_index"]) for row in csv.DictReader((data / "labels.csv").open())}
    return torch.tensor([known[str(file.relative_to(data))] for file in files(data / "test")])


def measure(logits: Tensor, base: Tensor, truth: Tensor) -> dict[str, Any]:
    right, base_right = (out.argmax(1) == truth for out in (logits, base))
    mean, low, high = crossed_interval(np.array([(right.float() - base_right.float()).numpy()]))
    return {
        "top1": float(right.float().mean()),
        "minus_base": {"mean": mean, "low": low, "high": high},
        "agreement": float((logits.argmax(1) == base.argmax(1)).float().mean()),
        "loss": float(F.cross_entropy(logits, truth)),
    }


def transforms_of(model: nn.Module, **norm: Any) -> tuple[Any, Any]:
    """The center crop that the weights were made for, and a random one."""
    norm = {"mean": model.default_cfg["mean"], "std": model.default_cfg["std"], **norm}
    crop = [
        transforms.RandomResizedCrop(224, scale=(0.5, 1), interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(),
    ]
    both = [transforms.ToTensor(), transforms.Normalize(**norm)]
    center = create_transform((3, 224, 224), crop_pct=0.875, interpolation="bicubic", **norm)
    return center, transforms.Compose([*crop, *both])


def main(data: Path, weights: Path) -> None:
    torch.set_num_threads(1)
    found = json.loads(RESULT.read_text())["models"] if RESULT.exists() else []
    truth = labels(data)
    for way, options in WAYS.items():
        for name, places in ROWS:
            todo = [edit for edit in EDITS if (name, places, edit, way) not in map(key, found)]
            if not todo:
                continue
            arguments, norm = MODELS[name]
            whole = timm.create_model(name, **arguments)
            whole.load_state_dict(load_file(weights / f"{name}.safetensors"))
            center, random_crop = transforms_of(whole, **norm)
            test = read(files(data / "test"), center)
            base, macs = predictions(whole, test), ulsam.cost(whole).macs
            if (name, "", "base", "") not in map(key, found):
                found.append({"model": name, "places": "", "edit": "base", "way": "", **measure(base, base, truth)})
            unlabeled = files(data / "reconstruct")
            random.Random(0).shuffle(unlabeled)  # a batch mixes classes
            torch.manual_seed(0)
            batches = read(unlabeled, center) + read(unlabeled * options.get("views", 0), random_crop)
            for edit in todo:
                torch.manual_seed(0)
                model = EDITS[edit](copy.deepcopy(whole), [int(place) for place in places.split(",")])
                how = {name: value for name, value in options.items() if name != "views"}
                errors = ulsam.reconstruct(model, batches, **how) if how else []
                entry = {"model": name, "places": places, "edit": edit, "way": way}
                entry |= {"macs": ulsam.cost(model).macs / macs, **measure(predictions(model, test), base, truth)}
                entry["errors"] = [[one.name, one.before, one.after] for one in errors]
                print(entry, flush=True)
                found.append(entry)
                write_json(
                    RESULT,
                    {
                        "what": "published ImageNet weights, edited and reconstructed without labels on 500 images; "
                        "measured on 500 other images, shares; intervals over images",
                        "command": "python benchmarks/imagenet.py IMAGES WEIGHTS",
                        "images": len(truth),
                        "models": found,
                        "versions": {"torch": torch.__version__, "timm": timm.__version__},
                        "processor": processor(),
                    },
                )


def key(entry: dict[str, Any]) -> tuple[str, str, str, str]:
    return entry["model"], entry["places"], entry["edit"], entry["way"]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
