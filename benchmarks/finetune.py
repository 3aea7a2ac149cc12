"""Fine-tune a base model, its ULSAM version and the same model with those blocks simply removed, each at its own best
rate.

For every arm the learning rate and the number of epochs are chosen on a part of the training images that is held
out (the base first, every arm with the same tries); then each arm is trained on all training images with several
seeds and measured once on the test images. Runs that are done are not repeated: start it again to go on.

    python benchmarks/finetune.py cub100 DATA --weights mobilenetv2_100_backbone.safetensors
"""

import argparse
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

from ulsam.training.config import TrainConfig
from ulsam.training.loop import resume, train

ARMS = {
    "base": [],
    "removed": ["remove 14,17"],
    "ulsam": ["replace 14,17 g=4"],
}
RATES = [0.005, 0.01, 0.02]
FIRST_EPOCHS, MORE_EPOCHS = 4, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the result, results/finetune_NAME.json")
    parser.add_argument("data", help="image folder with train/ and test/")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--runs", default="runs/finetune", help="folder of the runs")
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    results = Path("results") / f"finetune_{args.name}"
    fixed = {
        "data": args.data,
        "weights": args.weights,
        "size": args.size,
        "threads": args.threads,
        "workers": args.workers,
        "model": "mobilenetv2_100",
        "layout": "channels_last",  # no probe: all arms, and the runs of another day, take the same
        "amp": "none",
        "compile": "none",
    }

    def run(name: str, **settings: Any) -> dict[str, Any]:
        summary = results / f"{name}.json"
        if not summary.exists():
            folder = Path(args.runs) / args.name / name
            if (folder / "config.yaml").exists():
                resume(folder)
            elif not (folder / "summary.json").exists():
                train(TrainConfig.from_mapping({**fixed, **settings, "val_every": settings["epochs"]}), folder)
            publish(folder / "summary.json", summary)
            shutil.rmtree(folder)
        return json.loads(summary.read_text())

    def held_out(arm: str, rate: float, epochs: int) -> float:
        settings = {"edits": ARMS[arm], "lr": rate, "epochs": epochs, "val_fraction": 0.2}
        return run(f"choose-{arm}-{rate}-{epochs}", **settings)["scores"]["top1"]

    chosen, tries = {}, {}
    for arm in ARMS:
        scores = {(rate, FIRST_EPOCHS): held_out(arm, rate, FIRST_EPOCHS) for rate in RATES}
        best = max(RATES, key=lambda rate: scores[rate, FIRST_EPOCHS])
        scores[best, MORE_EPOCHS] = held_out(arm, best, MORE_EPOCHS)
        chosen[arm] = max(scores, key=lambda key: scores[key])
        tries[arm] = [{"lr": lr, "epochs": epochs, "held_out_top1": top1} for (lr, epochs), top1 in scores.items()]

    final: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for seed in range(args.seeds):
        for arm, edits in ARMS.items():
            rate, epochs = chosen[arm]
            final[arm].append(
                run(f"test-{arm}-seed{seed}", edits=edits, lr=rate, epochs=epochs, seed=seed, val_split="test")
            )
        report(args.name, chosen, tries, final)


def report(name: str, chosen: Any, tries: Any, final: dict[str, list[dict[str, Any]]]) -> None:
    """Write results/finetune_NAME.json and print it as a table."""
    arms = {}
    for arm, summaries in final.items():
        if not summaries:
            continue
        top1 = [summary["scores"]["top1"] for summary in summaries]
        base = [summary["scores"]["top1"] for summary in final["base"]]
        differences = [a - b for a, b in zip(top1, base, strict=False)]
        arms[arm] = {
            "edits": ARMS[arm],
            "lr": chosen[arm][0],
            "epochs": chosen[arm][1],
            "tries": tries[arm],
            "test_top1": top1,
            "test_top1_mean": statistics.mean(top1),
            "test_top1_sd": statistics.stdev(top1) if len(top1) > 1 else None,
            "minus_base_mean": statistics.mean(differences),
            "minus_base_sd": statistics.stdev(differences) if len(differences) > 1 else None,
            "interval_95_of_one_run": summaries[0]["scores"]["top1_interval_95"],
            "params": summaries[0]["cost"]["params"],
            "macs": summaries[0]["cost"]["macs"],
        }
    first = final["base"][0]
    result = {
        "what": "test top-1 of fine-tuned MobileNet-V2, each arm at its own learning rate and epochs",
        "command": f"python benchmarks/finetune.py {name} DATA --weights WEIGHTS",
        "images": first["images"],
        "arms": arms,
        "versions": first["versions"],
    }
    Path("results", f"finetune_{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    for arm, entry in arms.items():
        tested = ", ".join(f"{100 * value:.2f}" for value in entry["test_top1"])
        mean = 100 * entry["test_top1_mean"]
        print(f"{arm:8} lr {entry['lr']} epochs {entry['epochs']}  test top-1 {tested}  mean {mean:.2f}")


def publish(source: Path, target: Path) -> None:
    """Copy a summary, with paths shortened to their last part."""
    summary = json.loads(source.read_text())
    for key in ("data", "weights"):
        summary["config"][key] = Path(summary["config"][key]).name
    summary["command"] = "python benchmarks/finetune.py (settings under config)"
    for split, names in summary["unreadable"].items():
        summary["unreadable"][split] = [Path(name).name for name in names]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
