"""Does the damage on images that a model was trained on rank sets of blocks as that on held-out images does?

`ulsam slim` chooses by the former, as most models leave it nothing else. Here each model has a run that held images
out. Its narrow inverted residuals are fitted as `ulsam slim` fits them; then every block by itself, and sets drawn from
those that meet the budget and need each of their blocks, are measured on two samples of the images that it was trained
on, and on two of those that were held out: how well two samples of one kind agree is the most that two of different
kinds can.

results/damage_NAME.json holds every figure.

    python benchmarks/damage.py runs/held/seed-0 runs/held/seed-1 --name cub100
"""

import argparse
import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import external_arm
import torch
from scipy.stats import spearmanr

from ulsam.base.errors import UlsamError
from ulsam.base.files import write_atomic
from ulsam.base.provenance import versions
from ulsam.model.build import load
from ulsam.study.paths import without_paths
from ulsam.study.slim import fine_tuning
from ulsam.study.slim_blocks import Block, find_blocks
from ulsam.study.slim_damage import score
from ulsam.study.slim_search import minimal_sets
from ulsam.surgery.cost import cost
from ulsam.training import parts
from ulsam.training.config import TrainConfig, read_config
from ulsam.training.evaluate import ALONE
from ulsam.training.sample import draw_sample

ROOT = Path(__file__).parents[1]
FITTED = 512  # images, as `ulsam slim` takes by default
SAMPLES = ("trained_on_1", "trained_on_2", "held_out_1", "held_out_2")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs of one model that held images out")
    parser.add_argument("--name", required=True, help="of the results")
    parser.add_argument("--macs", type=float, default=0.75, metavar="SHARE")
    parser.add_argument("--sets", type=int, default=40)
    parser.add_argument("--images", type=int, default=300, help="of each sample")
    args = parser.parse_args(argv)
    target = ROOT / "results" / f"damage_{args.name}.json"
    models: dict[str, Any] = {}
    for run in args.runs:
        kept = run / "damage.json"
        if not kept.exists():
            write_atomic(kept, json.dumps(damages(run, args.macs, args.sets, args.images), indent=1) + "\n")
        models[run.name] = json.loads(kept.read_text(encoding="utf-8"))
    result = {
        "what": "damage of replacing sets of blocks, on images that the model was trained on and on held-out ones",
        "macs": args.macs,
        "images": args.images,
        "models": {name: {**found, "summary": summary(found)} for name, found in models.items()},
        "versions": versions(),
    }
    write_atomic(target, json.dumps(without_paths(result), indent=1) + "\n")
    for name, model in result["models"].items():
        print(name, json.dumps(model["summary"], indent=1))


def damages(run: Path, macs: float, number: int, images: int) -> dict[str, Any]:
    """The mean cross-entropy and top-1 of the model of this run with each set replaced, on each sample."""
    model = run / "model.safetensors"
    original, spec = load(model)
    trained = TrainConfig.from_mapping(read_config(run / "config.yaml"))
    config = fine_tuning(model, spec, trained.data, {})
    seen_images, others, _ = parts.open_images(config)
    if others.split != "held-out" or len(others) < 2 * images:
        raise UlsamError(f"{run} held out fewer than {2 * images} images: give fewer --images")
    seen = parts.spec_of_run(config, spec.classes)
    blocks, switched, _ = find_blocks(original, seen.input_size, {"layer": "inverted_residual", "width": 32})
    switched.reconstruct(draw_sample(seen_images, seen, FITTED, ALONE, apart_from=2 * images).images)
    samples = dict(
        zip(
            SAMPLES,
            [
                draw_sample(kind, seen, images, ALONE, apart_from=apart)
                for kind, apart in itertools.product((seen_images, others), (0, images))
            ],
            strict=True,
        )
    )
    sets = [(), *((block,) for block in blocks), *drawn(blocks, cost(original, seen.input_size).macs, macs, number)]
    found = []
    for chosen in sets:
        with switched.replaced([block.name for block in chosen]) as model:
            scores = {name: score(model, sample, spec.classes, ALONE) for name, sample in samples.items()}
        found.append(
            {
                "blocks": [block.place for block in chosen],
                "loss": {name: entry.loss for name, entry in scores.items()},
                "top1": {name: entry.top1 for name, entry in scores.items()},
            }
        )
        print(f"{run}: {len(found)} of {len(sets)} sets", flush=True)
    return {"spec": str(spec.base), "images_trained_on": len(seen_images), "sets": found}


def drawn(blocks: Sequence[Block], whole: int, macs: float, number: int) -> list[tuple[Block, ...]]:
    """So many of the sets that meet the budget and need each of their blocks, always the same."""
    least = (1 - macs) * whole
    found = sorted(map(sorted, minimal_sets([block.macs for block in blocks], least)), key=lambda one: (len(one), one))
    return [tuple(blocks[place] for place in one) for one in random.Random(0).sample(found, min(number, len(found)))]


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Rank correlations between the samples over the sets, and what a choice by each sample loses on the last one."""
    whole, rest = found["sets"][0], found["sets"][1:]
    sets = [entry for entry in rest if len(entry["blocks"]) > 1]
    agree = {
        f"{first}_and_{second}": float(
            spearmanr([entry["loss"][first] for entry in sets], [entry["loss"][second] for entry in sets]).statistic
        )
        for first, second in itertools.combinations(SAMPLES, 2)
    }
    judge = SAMPLES[-1]
    ranked = sorted(entry["loss"][judge] for entry in sets)
    chosen = {}
    for name in SAMPLES:
        best = min(sets, key=lambda entry: entry["loss"][name])
        chosen[name] = {
            "blocks": best["blocks"],
            "judged_loss": best["loss"][judge],
            "judged_top1": best["top1"][judge],
            "judged_rank": 1 + ranked.index(best["loss"][judge]),
        }
    return {
        "sets": len(sets),
        "whole_model": {"loss": whole["loss"], "top1": whole["top1"]},
        "rank_correlation": agree,
        "judge": judge,
        "best_set_by": chosen,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    external_arm.run_script(main)
