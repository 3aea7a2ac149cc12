"""The tables of slimmed models: in docs/results.md, and on the card of the one that comes with the package."""

import dataclasses
import json
import math
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from ulsam.base.errors import UlsamError
from ulsam.base.packed import SUFFIX, read_packed
from ulsam.study import compare_table as table
from ulsam.study.statistics import difference

#: Slimmed models of whose runs no summaries were kept.
SUMMED_UP = ("grocery81_macs75",)


def slimmed_table(results: Path, name: str) -> str:
    """The base models of a comparison, the same trained on, and slimmed; then how the rate was chosen."""
    found = slimmed_results(results, name)
    further = found["longer"] if "lr" in found["longer"] else found  # older results: the slimmed model's rate
    rates = {"whole": found["whole"], "longer": further, "slimmed": found}
    titles = {"whole": "trained", "longer": "trained further, all blocks", "slimmed": "slimmed"}
    lines = [
        "| model | parameters | MACs | time of an image | lr, epochs | top-1 (seeds) | slimmed minus it |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for key, title in titles.items():
        entry, cost = found[key], found["slimmed"]["cost"] if key == "slimmed" else found["whole_cost"]
        time = found["latency"]["slimmed" if key == "slimmed" else "whole"]
        minus = found.get(f"minus_{key}")
        cells = [
            title,
            f"{cost['params'] / 1e6:.3f} M",
            f"{cost['macs'] / 1e6:.1f} M",
            f"{1e3 * time['seconds']:.1f} ms, x {time['ratio']:.2f}",
            f"{rates[key]['lr']:g}, {rates[key]['epochs']}",
            f"{100 * entry['top1_mean']:.2f} ± {100 * entry['top1_sd']:.2f} ({len(entry['seeds'])})",
            table.points(minus) if minus else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    tries = ", ".join(f"{100 * top1:.1f} at {rate}" for rate, top1 in found["tries"].items())
    chosen = Counter(", ".join(blocks) for blocks in found["blocks"])
    sets = "; ".join(f"{blocks} ({count} of {chosen.total()} seeds)" for blocks, count in chosen.most_common())
    notes = [f"Top-1 in %, on {found['images']} test images."]
    if tries:
        notes.append(f"Learning rate chosen by top-1 on {found['chosen_on']} images, {tries};")
        notes.append(f"the whole model has {100 * found['tried_whole']:.1f} there.")
    if found.get("tries_longer"):
        tries = ", ".join(f"{100 * top1:.1f} at {rate}" for rate, top1 in found["tries_longer"].items())
        notes.append(f"That of the models trained further likewise, {tries}.")
    notes.append(f"Blocks replaced: {sets}.")
    if places := found.get("places"):
        said = ", ".join(f"{place} of {of}" for place, of in places)
        notes.append(f"Place of the chosen set by its damage before reconstruction, among those reconstructed: {said}.")
    if ratios := found["latency"].get("slimmed_ratios"):
        shares = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        threads = "1 thread" if found["latency"]["threads"] == 1 else f"{found['latency']['threads']} threads"
        notes.append(f"Time of each seed's model, as a share: {shares} ({found['latency']['processor']}, {threads}).")
    return "\n".join([*lines, "", " ".join(notes)])


def slimmed_results(results: Path, name: str) -> dict[str, Any]:
    """What ``slimmed_NAME.json`` says, compared with the summaries in ``slimmed_NAME.jsonl.gz`` if these were kept.

    Raises:
        UlsamError: it says something else than the summaries, or they are missing.
    """
    found: dict[str, Any] = json.loads((results / f"slimmed_{name}.json").read_text())
    if name in SUMMED_UP:
        return found
    packed = read_packed(results / f"slimmed_{name}{SUFFIX}")
    runs: dict[str, dict[int, Any]] = {
        way: {seed: packed[f"seed-{seed}/{way}.json"] for seed in found[way]["seeds"]}
        for way in ("whole", "longer", "slimmed")
    }
    first, *_ = found["whole"]["seeds"]
    slimmed = runs["slimmed"]
    searches = [packed[f"seed-{seed}/slim.json"] for seed in slimmed]
    chosen = [search["chosen"] for search in searches]
    said = {
        "blocks": [entry["blocks"] for entry in chosen],
        "slimmed_costs": [run["cost"] for run in slimmed.values()],
        "whole_cost": runs["whole"][first]["cost"],
        "config": slimmed[first]["config"],
        "images": slimmed[first]["scores"]["images"],
        **{name: slimmed[first]["config"][name] for name in ("lr", "epochs")},
    }
    for way, ran in runs.items():
        tops = [run["scores"]["top1"] for run in ran.values()]
        scores = {"top1": tops, "top1_mean": statistics.mean(tops), "top1_sd": statistics.stdev(tops)}
        said[way] = {"seeds": list(ran), **scores}
    for way in ("whole", "longer") if "lr" in found["longer"] else ("whole",):
        said[way] |= {name: runs[way][first]["config"][name] for name in ("lr", "epochs")}
    said["slimmed"]["cost"] = slimmed[first]["cost"]
    for way in ("whole", "longer"):
        minus = difference(slimmed, runs[way])
        said[f"minus_{way}"] = json.loads(json.dumps(minus and dataclasses.asdict(minus)))
    for key, value in said.items():
        if not _same(value, found[key]):
            raise UlsamError(
                f"results/slimmed_{name}.json is not what its runs say, of {key}: benchmarks/slimmed.py makes it"
            )
    reconstructed = [search.get("measured_reconstructed", []) for search in searches]  # in the order of damage
    if all(reconstructed):
        places = [
            (1 + [entry["blocks"] for entry in sets].index(kept["blocks"]), len(sets))
            for sets, kept in zip(reconstructed, chosen, strict=True)
        ]
        return found | {"places": places}
    return found


def _same(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal, numbers up to how machines round."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)
    return bool(one == other)


def card_table(results: Path, name: str) -> str:
    """The figures of a trained model of the package, beside those of the model that it was made from."""
    found = slimmed_results(results, name)
    packed, slimmed, whole = found["packed"], found["slimmed"], found["whole"]
    seed = packed["seed"]
    before = whole["top1"][whole["seeds"].index(seed)]
    times = found["latency"]
    rows = [
        ("top-1 on the test images", f"{100 * packed['top1']:.2f} %", f"{100 * before:.2f} %"),
        (
            f"the same with {len(slimmed['seeds'])} seeds, mean ± sd",
            *(f"{100 * model['top1_mean']:.2f} ± {100 * model['top1_sd']:.2f} %" for model in (slimmed, whole)),
        ),
        *(
            (title, f"{slimmed['cost'][key] / 1e6:.2f} M", f"{found['whole_cost'][key] / 1e6:.2f} M")
            for title, key in (("parameters", "params"), ("MACs", "macs"))
        ),
        ("time of one image", *(f"{1e3 * times[key]['seconds']:.1f} ms" for key in ("slimmed", "whole"))),
    ]
    return "\n".join(
        [
            f"| {found['images']} test images; {times['processor']} | this model | the model it was made from |",
            "| --- | --- | --- |",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
            f"Seed {seed}, the first one, not the best; learning rate {found['lr']:g}, chosen of "
            f"{', '.join(found['tries'])} on the set's {found['chosen_on']} images; {found['epochs']} epochs after "
            f"the {whole['epochs']} of the model it was made from. Blocks replaced: {', '.join(found['blocks'][0])}. "
            f"Size of the file: {packed['bytes'] / 1e6:.2f} MB.",
        ]
    )


def distillation_table(results: Path) -> str:
    """A row for each way to train a slimmed model, and the original one beside it: top-1 and loss, means over seeds."""
    found = json.loads((results / "distillation.json").read_text())
    runs = found["runs"]
    seeds = sorted({run["seed"] for run in runs})
    heads = ["model: how it is trained", *(f"seed {seed}" for seed in seeds), "mean", "loss"]
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for name in dict.fromkeys(run["model"] for run in runs):
        mine = {run["seed"]: run for run in runs if run["model"] == name}
        means = [statistics.mean(run[key] for run in mine.values()) for key in ("top1", "loss")]
        tops = [f"{100 * mine[seed]['top1']:.1f}" if seed in mine else "" for seed in seeds]
        lines.append(f"| {name} | {' | '.join(tops)} | {100 * means[0]:.1f} | {means[1]:.3f} |")
    blocks = "; ".join(
        f"seed {seed}: {next(run['edits'][-1] for run in runs if run['seed'] == seed and run['edits'])}"
        for seed in seeds
        if any(run["seed"] == seed and run["edits"] for run in runs)
    )
    images = "/".join(sorted({str(run["images"]) for run in runs}))
    note = f"Top-1 in %, and cross-entropy, on {images} held-out images, others for each seed. Edits: {blocks}."
    return "\n".join([*lines, "", note])


def damage_table(results: Path, name: str) -> str:
    """How well two samples of images rank sets of blocks alike; one row a model."""
    found = json.loads((results / f"damage_{name}.json").read_text())
    lines = [
        "| model | top-1 on its training images | held-out | two held-out samples agree | training and held-out agree "
        "| set chosen by training images, its place on held-out ones | its loss there, the best one's |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, entry in found["models"].items():
        summary = entry["summary"]
        top1, agree = summary["whole_model"]["top1"], summary["rank_correlation"]
        chosen = summary["best_set_by"]
        ours, best = chosen["trained_on_1"], chosen[summary["judge"]]
        shares = [statistics.mean(top1[f"{kind}_{n}"] for n in (1, 2)) for kind in ("trained_on", "held_out")]
        mixed = [value for key, value in agree.items() if "trained_on" in key and "held_out" in key]
        cells = [
            model,
            *(f"{100 * share:.1f}" for share in shares),
            f"{agree['held_out_1_and_held_out_2']:.3f}",
            f"{min(mixed):.3f} to {max(mixed):.3f}",
            f"{ours['judged_rank']} of {summary['sets']}",
            f"{ours['judged_loss']:.3f}, {best['judged_loss']:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    versions = found["versions"]
    return "\n".join([*lines, "", f"{found['images']} images a sample; torch {versions['torch']}."])
