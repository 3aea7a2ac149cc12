"""Does bfloat16 cost accuracy? One recipe in float32 and in bfloat16, several seeds of each.

By default on drawn birds (`ulsam birds`) with the small net of the demonstration; or on an image folder. Final top-1 of
every run, its spread over the seeds, and the differences of the pairs, a seed each.

    python benchmarks/precision.py               # results/precision.json; 8 minutes on two cores
    python benchmarks/precision.py cub100 --weights mobilenetv2_100.safetensors --model mobilenetv2_100 --size 112
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from layer import processor

from ulsam.data.birds import draw_birds
from ulsam.demo import BIRDS, EDIT, RECIPE
from ulsam.train.config import TrainConfig
from ulsam.train.loop import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", help="image folder (default: birds are drawn)")
    parser.add_argument("--model", default=RECIPE["model"])
    parser.add_argument("--weights")
    parser.add_argument("--size", type=int, default=RECIPE["size"])
    parser.add_argument("--edits", nargs="*", default=[EDIT])
    parser.add_argument("--epochs", type=int, default=RECIPE["epochs"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", default="results/precision.json")
    args = parser.parse_args()
    recipe: dict[str, Any] = {**RECIPE, "val_every": args.epochs}
    recipe |= {name: getattr(args, name) for name in ("model", "weights", "size", "edits", "epochs")}
    top1: dict[str, list[float]] = {"none": [], "bf16": []}
    loss: dict[str, list[float]] = {"none": [], "bf16": []}
    summary: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = args.data or str(draw_birds(Path(folder) / "birds", **BIRDS))
        for seed in range(args.seeds):
            for amp in top1:
                config = TrainConfig.from_mapping({**recipe, "data": data, "amp": amp, "seed": seed})
                summary = train(config, Path(folder) / f"{amp}-{seed}")
                top1[amp].append(summary["scores"]["top1"])
                loss[amp].append(summary["epochs"][-1]["train_loss"])
    differences = [half - full for full, half in zip(top1["none"], top1["bf16"], strict=True)]
    result = {
        "what": "final top-1 of one recipe in float32 and in bfloat16, a value a seed",
        "command": "python benchmarks/precision.py" + (" DATA" if args.data else ""),
        "data": Path(args.data).name if args.data else f"ulsam birds {BIRDS}",
        "recipe": {**recipe, "weights": args.weights and Path(args.weights).name},
        "pictures": summary["pictures"],
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
