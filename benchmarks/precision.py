"""Does bfloat16 cost accuracy? One recipe in float32 and in bfloat16, several seeds of each.

MobileNet-V2 with ULSAM in place of layers 14 and 17 is fine-tuned on an image folder from a weight file. Final top-1 of
every run, its spread over the seeds, and the differences of the pairs, a seed each.

    python benchmarks/precision.py cub100 mobilenetv2_100.safetensors    # results/precision.json; 5 minutes
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from ulsam.base.provenance import processor
from ulsam.training.config import TrainConfig
from ulsam.training.train import train

RECIPE: dict[str, Any] = {  # all else as `ulsam train` sets it
    "model": "mobilenetv2_100",
    "size": 96,
    "edits": ["replace 14,17 g=4"],
    "epochs": 2,
    "val_every": 2,
    "layout": "channels_last",
    "compile": "none",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="image folder")
    parser.add_argument("weights", help="of MobileNet-V2, to fine-tune from")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", default="results/precision.json")
    args = parser.parse_args()
    recipe = {**RECIPE, "weights": args.weights}
    top1: dict[str, list[float]] = {"none": [], "bf16": []}
    loss: dict[str, list[float]] = {"none": [], "bf16": []}
    summary: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            for amp in top1:
                config = TrainConfig.from_mapping({**recipe, "data": args.data, "amp": amp, "seed": seed})
                summary = train(config, Path(folder) / f"{amp}-{seed}")
                top1[amp].append(summary["scores"]["top1"])
                loss[amp].append(summary["epochs"][-1]["train_loss"])
    differences = [half - full for full, half in zip(top1["none"], top1["bf16"], strict=True)]
    result = {
        "what": "final top-1 of one recipe in float32 and in bfloat16, a value a seed",
        "command": "python benchmarks/precision.py FOLDER WEIGHTS",
        "data": Path(args.data).name,
        "recipe": {**recipe, "weights": Path(args.weights).name},
        "images": summary["images"],
        "arms": {
            name: {"top1": values, "mean": statistics.mean(values), "sd": _spread(values), "train_loss": loss[amp]}
            for name, (amp, values) in zip(("float32", "bf16"), top1.items(), strict=True)
        },
        "bf16_minus_float32": {"each": differences, "mean": statistics.mean(differences), "sd": _spread(differences)},
        "machine": {"processor": processor(), "threads": torch.get_num_threads()},
        "versions": summary["versions"],
    }
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    for name, arm in result["arms"].items():
        print(
            f"{name:8} top-1 {', '.join(f'{100 * value:.1f}' for value in arm['top1'])}; mean {100 * arm['mean']:.2f}"
        )
    print(f"bf16 - float32: {100 * result['bf16_minus_float32']['mean']:+.2f} points")


def _spread(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


if __name__ == "__main__":
    main()
