"""How should a slimmed model learn from the original one? A screening of distillations on held-out images.

Of each seed, a MobileNet-V2 is trained on four fifths of the images, slimmed by `ulsam slim`, and fine-tuned in each of
the ways below from the same choice of blocks. All are measured on the fifth that was held out. Beside them the original
model is trained further, with itself as the teacher. Temperatures above 1 soften the targets; a teacher that was
trained with label smoothing, as this one, suits low ones (https://arxiv.org/abs/2206.14532); the same views for teacher
and student, mixup and many epochs are from https://arxiv.org/abs/2106.05237.

results/distillation.json holds every figure. What is done is not done again.

    python benchmarks/distillation.py cub100 mobilenetv2_100_backbone.safetensors --out runs/distillation
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ulsam
from ulsam.base.files import write_json
from ulsam.base.provenance import processor, versions
from ulsam.study.paths import without_paths
from ulsam.study.slim import fine_tuning
from ulsam.training.config import TrainConfig, read_config
from ulsam.training.train import train_or_resume
from ulsam.training.train_summary import TrainSummary

RESULT = Path(__file__).parents[1] / "results" / "distillation.json"
COMMON: dict[str, Any] = {
    **{"size": 112, "epochs": 8, "lr": 0.02, "val_every": 8, "val_fraction": 0.2},
    **{"layout": "channels_last", "amp": "none", "compile": "none", "workers": 0, "threads": 1},
}
MACS = 0.75
ALL = {"distill": 1.0, "distill_temperature": 1.0, "distill_features": 1.0, "mixup": 0.2}
LONG = {"epochs": 16, "val_every": 16}
WAYS: dict[str, dict[str, Any]] = {  # settings of the fine-tuning
    "no teacher": {"teacher": None, "distill": None, "distill_temperature": None, "distill_features": None},
    "T = 4, weight 0.5": {},
    "T = 4, weight 1": {"distill": 1.0},
    "T = 1, weight 0.5": {"distill_temperature": 1.0},
    "T = 1, weight 1": {"distill_temperature": 1.0, "distill": 1.0},
    "T = 4, weight 0.5, feature maps": {"distill_features": 1.0},
    "T = 4, weight 0.5, mixup": {"mixup": 0.2},
    "T = 1, weight 1, feature maps, mixup": ALL,
    "T = 4, weight 0.5, 16 epochs": LONG,
    "T = 1, weight 1, feature maps, mixup, 16 epochs": {**ALL, **LONG},
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="an image folder; its training images alone are used")
    parser.add_argument("weights", help="of mobilenetv2_100, to begin from")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    args = parser.parse_args(argv)
    runs: list[dict[str, Any]] = []
    for seed in args.seeds:
        folder = args.out / f"seed-{seed}"
        own = {**COMMON, "seed": seed, "split_seed": seed}
        config = TrainConfig(args.data, model="mobilenetv2_100", weights=args.weights, **own)
        base = train_or_resume(config, folder / "original")
        runs.append(entry(seed, "original", base))
        model = folder / "original" / "model.safetensors"
        settings = {name: value for name, value in own.items() if name not in ("val_fraction", "split_seed")}
        ulsam.slim(model, args.data, folder / "slim", macs=MACS, fine_tune=False, settings=settings)
        slimmed = TrainConfig.from_mapping(read_config(folder / "slim" / "train.yaml"))
        further = fine_tuning(model, ulsam.load(model)[1], args.data, settings)
        calls = {f"slimmed: {way}": (slimmed, values) for way, values in WAYS.items()}
        calls |= {f"trained further: {way}": (further, WAYS[way]) for way in ("T = 4, weight 0.5", "T = 1, weight 1")}
        for name, (config, values) in calls.items():
            place = folder / name.translate(str.maketrans(" ", "-", ":=,."))
            runs.append(entry(seed, name, train_or_resume(dataclasses.replace(config, **values), place)))
            result = {
                "what": "top-1 and cross-entropy on held-out images: a model, slimmed and fine-tuned in several ways",
                "macs": MACS,
                "runs": runs,
                "versions": versions(),
                "processor": processor(),
            }
            write_json(RESULT, without_paths(result))


def entry(seed: int, name: str, summary: TrainSummary) -> dict[str, Any]:
    scores = summary["scores"]
    print(seed, name, scores["top1"], flush=True)
    found = {"seed": seed, "model": name, "edits": summary["config"]["edits"], "macs": summary["cost"]["macs"]}
    return found | {key: scores[key] for key in ("top1", "loss", "images")}


if __name__ == "__main__":
    main()
