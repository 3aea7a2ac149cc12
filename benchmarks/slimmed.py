"""Slim the trained base models of a comparison, seed by seed, with distillation; on wish into a model of the package.

1. The base model of the comparison's best try is slimmed at each of --rates, on the images on which that try was
   trained; the rate that does best on those on which it was measured is taken. A single rate is taken as it is.
2. The base model of each final run is slimmed at this rate, on all training images, and measured once on the images
   on which the comparison measured the base. Beside it the base model is trained on in the same way, with itself as the
   teacher and no block replaced, at a rate of its own, chosen likewise: what the further epochs bring without slimming.
   Several budgets share these runs.
3. With --package the slimmed model of the first seed becomes the package's, whichever seed is the best, with
   convolutions and classifier in half precision; it is measured once more. It is known by its name once there is a
   card, NAME.md, beside it.

The committed results of the groceries are of narrow inverted residuals, chosen by their damage alone, and of models
trained on at the rate that was chosen for the slimmed ones.

results/slimmed_NAME.json holds every figure, results/slimmed_NAME.jsonl.gz what was chosen with each seed and the
summaries of the runs. What is done is not done again.

    python benchmarks/slimmed.py runs/cub100 cub100_macs75 --macs 0.75 --rates 0.01 --seeds 3 --jobs 2
    python benchmarks/slimmed.py runs/grocery81 grocery81_macs75 --macs 0.75 --package mobilenetv2_100.grocery81_slim75
    python benchmarks/slimmed.py runs/grocery81 grocery81_paper13 --macs 0.88 --at 14,17 --jobs 2
"""

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import shutil
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import external_arm
import torch
from filelock import FileLock
from package import measured, pack

from ulsam.base.errors import UlsamError
from ulsam.base.files import make_folder, write_atomic
from ulsam.base.packed import SUFFIX, write_packed
from ulsam.base.provenance import command_line, processor, versions
from ulsam.cli.common import add_layer_options, layer_options
from ulsam.model.build import load, read_spec
from ulsam.study.comparison_folder import ComparisonFolder
from ulsam.study.grid import Failed, Grid, Run, Try, at_the_edge
from ulsam.study.latency import measure
from ulsam.study.launch import lock_of
from ulsam.study.paths import without_paths
from ulsam.study.slim import RESERVED_SETTINGS, fine_tuning, slim
from ulsam.study.statistics import difference
from ulsam.training.summary import spec_entry
from ulsam.training.train import train_or_resume

ROOT = Path(__file__).parents[1]
BUDGETS = ("macs", "params", "latency")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compared", help="folder of a comparison whose base model is finished")
    parser.add_argument("name", help="of the results")
    budget = parser.add_mutually_exclusive_group(required=True)
    for name in BUDGETS:
        budget.add_argument(f"--{name}", type=float, metavar="SHARE")
    parser.add_argument("--at", help="blocks to choose from (default: all that can be replaced)")
    add_layer_options(parser)
    parser.add_argument("--reconstruct-sets", type=int, default=4, metavar="N", help="as of ulsam slim (default: 4)")
    parser.add_argument("--max-sets", type=int, default=100, metavar="N", help="as of ulsam slim (default: 100)")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.005, 0.01, 0.02], metavar="LR")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, help="slim only this many of the base model's final runs (default: all)")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--package", metavar="NAME", help="put the first seed's model there, as ARCHITECTURE.DATA_WHAT")
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout to write results to (default: this one)")
    args = parser.parse_args(argv)

    comparison = ComparisonFolder(args.compared)
    grid = comparison.grid()
    whole, finals = base_runs(grid, comparison, args.seeds)
    wanted = {name: share for name in BUDGETS if (share := getattr(args, name)) is not None}
    asked = {
        **wanted,
        "at": args.at,
        "layer": layer_options(args),
        "max_sets": args.max_sets,
        "reconstruct_sets": args.reconstruct_sets,
    }
    asked["data"] = grid.shared.data
    root = Path(args.compared) / "slimmed"
    place = root / args.name

    def job(run: Run, lr: float, folder: Path, **changes: Any) -> dict[str, Any]:
        given = dataclasses.asdict(run.config)  # all but what slimming decides is as in the run of the whole model
        settings = {name: value for name, value in given.items() if name not in RESERVED_SETTINGS and value is not None}
        settings |= {"lr": lr, "epochs": args.epochs, "val_every": args.epochs, **changes}
        return {"model": comparison.folder(run) / "model.safetensors", "out": folder, "settings": settings}

    best = further = args.rates[0]
    tries, tries_further = {}, {}
    if len(args.rates) > 1:
        jobs = [job(whole, lr, place / f"choose-{lr:g}", reconstruct=True) | asked for lr in args.rates]
        _decide(jobs)
        on = [job(whole, lr, root / "trained-on" / f"choose-{lr:g}-{args.epochs}") for lr in args.rates]
        calls = [(slim, each) for each in jobs] + [(_train_on, each | {"data": grid.shared.data}) for each in on]
        found = _in_processes(calls, args.jobs)[: len(jobs)]
        tries = {lr: each["result"] for lr, each in zip(args.rates, found, strict=True)}
        tries_further = {lr: _summary(each["out"])["scores"] for lr, each in zip(args.rates, on, strict=True)}
        best = _best_rate({lr: result["slimmed"] for lr, result in tries.items()}, args.epochs, "slimmed")
        further = _best_rate(tries_further, args.epochs, "trained on")
    seeds = [run.config.seed for run in finals]
    jobs = [job(run, best, place / f"seed-{run.config.seed}", reconstruct=True) | asked for run in finals]
    if "latency" in wanted:  # nothing else may run while blocks are timed
        _in_processes([(slim, {**each, "fine_tune": False}) for each in jobs], 1)
    on = [
        job(run, further, root / "trained-on" / f"seed-{run.config.seed}-{further:g}-{args.epochs}") for run in finals
    ]
    calls = [(slim, each) for each in jobs] + [(_train_on, each | {"data": grid.shared.data}) for each in on]
    done = _in_processes(calls, args.jobs)[: len(jobs)]

    folders = {
        "whole": [comparison.folder(run) for run in finals],
        "slimmed": [each["out"] / "run" for each in jobs],
        "longer": [each["out"] for each in on],
    }
    runs = {name: dict(zip(seeds, map(_summary, found), strict=True)) for name, found in folders.items()}
    kept = {f"seed-{seed}/slim.json": chosen for seed, chosen in zip(seeds, done, strict=True)}
    kept |= {f"seed-{seed}/{name}.json": found[seed] for name, found in runs.items() for seed in seeds}
    write_packed(args.root / "results" / f"slimmed_{args.name}{SUFFIX}", without_paths(kept))
    before, after, longer = runs["whole"], runs["slimmed"], runs["longer"]
    compared = {"minus_whole": difference(after, before), "minus_longer": difference(after, longer)}
    models = [load(folder / "model.safetensors") for folder in (folders["whole"][0], *folders["slimmed"])]
    torch.set_num_threads(finals[0].config.threads or torch.get_num_threads())
    names = ["whole", *(f"seed {seed}" for seed in seeds)]
    times = measure({name: (model, spec.input_size) for name, (model, spec) in zip(names, models, strict=True)})
    first, (model, spec) = seeds[0], models[1]
    result = {
        "what": "base models of a comparison, slimmed with distillation and, beside it, trained on",
        "command": command_line(),
        "wanted": wanted,
        "at": args.at,
        "spec": spec_entry(spec) | {"classes": len(spec.classes)},
        "blocks": [found["chosen"]["blocks"] for found in done],
        "chosen_on": grid.choose_split or "held-out",
        "tries": {f"{lr:g}": result["slimmed"]["top1"] for lr, result in tries.items()},
        "tried_whole": next((result["original"]["top1"] for result in tries.values()), None),
        "lr": best,
        "epochs": args.epochs,
        "whole": {"lr": finals[0].config.lr, "epochs": finals[0].config.epochs, **_scores(before)},
        "slimmed": {**_scores(after), "cost": after[first]["cost"]},
        "slimmed_costs": [run["cost"] for run in after.values()],
        "whole_cost": before[first]["cost"],
        "longer": {"lr": further, "epochs": args.epochs, **_scores(longer)},
        "tries_longer": {f"{lr:g}": scores["top1"] for lr, scores in tries_further.items()},
        **{name: dataclasses.asdict(found) for name, found in compared.items() if found},
        "latency": {
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "whole": times["whole"].to_json(),
            "slimmed": times[f"seed {first}"].to_json(),
            "slimmed_ratios": [times[name].ratio for name in names[1:]],
        },
        "images": after[first]["scores"]["images"],
        "config": after[first]["config"],
        "versions": versions(),
    }
    if args.package:
        file = args.root / "src" / "ulsam" / "model" / "weights" / f"{args.package}.safetensors"
        pack(model, spec, file)
        packed = {"name": args.package, "seed": first, "top1": measured(load(file)[0], finals[0])}
        result["packed"] = {**packed, "bytes": file.stat().st_size}
    text = json.dumps(without_paths(result), indent=1) + "\n"
    write_atomic(args.root / "results" / f"slimmed_{args.name}.json", text)
    print(text)


def base_runs(grid: Grid, comparison: ComparisonFolder, most: int | None = None) -> tuple[Run, list[Run]]:
    """The comparison's best try of its base model, and the final runs, the first ``most`` seeds.

    Raises:
        UlsamError: one of them is not finished, or left no model file.
    """
    arm = grid.arms[0]
    chosen = grid.chosen(arm, comparison.outcome) if grid.choosing else None
    if chosen is None:
        raise UlsamError(
            f"{comparison.root} has not chosen a learning rate for its base model: continue with ulsam compare"
        )
    runs = [run for run in grid.tries(arm, comparison.outcome) if (run.config.lr, run.config.epochs) == chosen][:1]
    runs += grid.finals(arm, comparison.outcome)[:most]
    for run in runs:
        summary = comparison.outcome(run)
        if (
            summary is None
            or isinstance(summary, Failed)
            or not (comparison.folder(run) / "model.safetensors").exists()
        ):
            raise UlsamError(f"{run} is not finished: continue with ulsam compare")
    return runs[0], runs[1:]


def _best_rate(scores: dict[float, Any], epochs: int, what: str) -> float:
    """The learning rate with the best scores, as a comparison chooses."""
    ranked = [Try(lr, epochs, score["top1"], loss=score["loss"]) for lr, score in scores.items()]
    if edge := at_the_edge(ranked):
        print(f"note: the best rate of the models {what} is the {edge} of those tried: give more --rates")
    return max(ranked, key=lambda entry: entry.rank).rate


def _decide(jobs: Sequence[dict[str, Any]]) -> None:
    """Choose the blocks once for jobs that differ in what follows."""
    decided = jobs[0]["out"].parent / "choose"
    _in_processes([(slim, {**jobs[0], "out": decided, "fine_tune": False})], 1)
    for job in jobs:
        if not (job["out"] / "slim.json").exists():
            job["out"].mkdir(exist_ok=True)
            shutil.copy(decided / "slim.json", job["out"])


def _train_on(model: Path, data: str, out: Path, settings: dict[str, Any]) -> None:
    """Train the whole model as its slimmed one is, or resume it, or wait for another process that does.

    Raises:
        UlsamError: it was begun with other settings.
    """
    config = fine_tuning(model, read_spec(model), data, settings)
    make_folder(out.parent)
    with FileLock(lock_of(out)):
        train_or_resume(config, out)


def _in_processes(calls: Sequence[tuple[Callable[..., Any], dict[str, Any]]], most: int) -> list[Any]:
    """The results of these calls, so many at a time, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(most, mp_context=context) as pool:
        return [found.result() for found in [pool.submit(do, **keywords) for do, keywords in calls]]


def _summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return found


def _scores(runs: dict[int, dict[str, Any]]) -> dict[str, Any]:
    tops = [run["scores"]["top1"] for run in runs.values()]
    return {
        "seeds": list(runs),
        "top1": tops,
        "top1_mean": statistics.mean(tops),
        "top1_sd": statistics.stdev(tops) if len(tops) > 1 else None,
    }


if __name__ == "__main__":
    external_arm.run_script(main)
