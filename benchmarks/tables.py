"""Write the tables of measured results into the pages, from the JSON files under results/.

python benchmarks/tables.py           # rewrite README.md and pages under docs/
python benchmarks/tables.py --check   # exit 1 if a page and the results disagree; also make results

Tables of comparisons are computed from the summaries of their runs, and their compare.json must say the same.
"""

import dataclasses
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import explained_tables

from ulsam.base.errors import UlsamError
from ulsam.study import compare_table as table
from ulsam.study.compare_report import summarise
from ulsam.study.paths import without_paths
from ulsam.study.run_store import Store
from ulsam.study.statistics import difference

ROOT = Path(__file__).parents[1]
#: Slimmed models of whose runs no summaries were kept.
SUMMED_UP = ("cub100_macs75", "grocery81_macs75")
#: the comparisons of the headline table, and what they compare
HEADLINES = {
    "compare_cub100": "CUB-200-2011, 100 of its classes",
    "compare_grocery81": "Grocery Store, 81 classes",
}


#: the rows of the README's table: the larger budget, on the birds
README_ARMS = (
    "base",
    "remove 13,14,16,17",
    "ULSAM 13,14,16,17",
    "ULSAM + inverted residual 32 13,14,16,17",
    "pruned-uniform-macs-0.758",
)


def readme_table() -> str:
    """The few rows of :func:`headline_table` that say most, for the README."""
    wanted = tuple(f"| {called(name)} |" for name in README_ARMS)
    first_set = headline_table().partition(f"**{HEADLINES['compare_grocery81']}")[0]
    lines = first_set.splitlines()
    return "\n".join(lines[:2] + [line for line in lines if line.startswith(wanted)])


def headline_table() -> str:
    """One row an arm that has results; the arms of a comparison are called as in :func:`comparison_table`."""
    lines = [
        "| model | parameters | MACs | time of an image | test top-1, mean ± sd (seeds) | minus base | minus removal "
        "| minus pruning |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, title in HEADLINES.items():
        found = comparison(name)
        arms = [arm for arm in found["arms"] if arm["seeds"] or arm["failed"]]
        lines.append(f"| **{title}, {found['images']} {found['split']} images** | | | | | | | |")
        lines += [_headline(arm, found["arms"][0], arms, _both_ways(found["differences"])) for arm in arms]
    return "\n".join(lines)


def _headline(
    arm: dict[str, Any],
    base: dict[str, Any],
    arms: list[dict[str, Any]],
    pairs: dict[tuple[str, str], dict[str, Any]],
) -> str:
    name = arm["name"]
    if not arm["seeds"]:
        return f"| {called(name)} | | | | failed | | | |"
    shares = [f"{arm['cost'][key] / base['cost'][key] - 1:+.1%}" for key in ("params", "macs")]
    time = arm["latency"] and f"{arm['latency']['ratio'] - 1:+.0%}"
    if arm is base:
        shares = [f"{base['cost'][key] / 1e6:.2f} M" for key in ("params", "macs")]
        time = base["latency"] and f"{1e3 * base['latency']['seconds']:.1f} ms"
    spread = "" if arm["top1_sd"] is None else f" ± {100 * arm['top1_sd']:.2f}"
    trained = [other for other in arms if is_pruned(other["name"]) and other["seeds"]]
    pruned = [other["name"] for other in trained if alike(arm, other, "macs")]
    rivals = [base["name"], f"remove {name.split()[-1]}", *([] if is_pruned(name) else pruned[:1])]
    minus = [table.points(pairs[name, rival]) if (name, rival) in pairs else "" for rival in rivals]
    cells = [
        called(name),
        *shares,
        time or "",
        f"{100 * arm['top1_mean']:.2f}{spread} ({len(arm['seeds'])})",
        *minus,
        *[""] * (3 - len(minus)),
    ]
    return f"| {' | '.join(cells)} |"


def called(name: str) -> str:
    """An arm's name for a reader: "remove 14,17" as "remove 14, 17", a pruned model by who pruned it, and to what.

    >>> called("pruned-uniform-params-0.82")
    'Torch-Pruning, 82.0 % of the parameters'
    """
    if not is_pruned(name):
        return name.replace(",", ", ")
    measure, share = name.split("-")[-2:]
    return f"Torch-Pruning, {100 * float(share):.1f} % of the {({'macs': 'MACs', 'params': 'parameters'})[measure]}"


def is_pruned(name: str) -> bool:
    """Whether the arm is one of benchmarks/pruning.py."""
    return name.startswith("pruned-")


def alike(arm: dict[str, Any], other: dict[str, Any], measure: str) -> bool:
    """Whether two arms cost the same, to 2 %: as a block does that is replaced in several ways."""
    return bool(abs(arm["cost"][measure] / other["cost"][measure] - 1) <= 0.02)


def _both_ways(differences: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """Each difference by its two arms, and the same the other way round."""
    found = {}
    for pair in differences:
        found[pair["arm"], pair["minus"]] = pair
        low, high = (None if end is None else -end for end in (pair["high"], pair["low"]))
        found[pair["minus"], pair["arm"]] = {**pair, "mean": -pair["mean"], "low": low, "high": high}
    return found


SETS = {"cub100": "CUB-200-2011, 100 of its classes", "grocery81": "Grocery Store, 81 classes"}
ARMS = {
    "base": "MobileNet-V2",
    "removed": "layers 14, 17 removed",
    "ulsam": "layers 14, 17 replaced by ULSAM, g = 4",
}


def finetune_table() -> str:
    """One row an arm for each data set that was measured."""
    lines = [
        "| data set (train / test images) | model | parameters | MACs | lr, epochs chosen "
        "| test top-1, mean ± sd (seeds) | minus base |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, title in SETS.items():
        path = ROOT / "results" / f"finetune_{name}.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        for arm, model in ARMS.items():
            if arm in result["arms"]:
                lines.append(_row(title if arm == "base" else "", model, result["arms"][arm], result["images"]))
    return "\n".join(lines)


def _row(title: str, model: str, arm: dict[str, Any], images: dict[str, int]) -> str:
    first = f"{title} ({images['train']} / {images['val']})" if title else ""
    tops = arm["test_top1"]
    spread = f" ± {100 * arm['test_top1_sd']:.2f}" if arm["test_top1_sd"] is not None else ""
    minus = f"{100 * arm['minus_base_mean']:+.2f}" if title == "" else ""
    if minus and arm["minus_base_sd"] is not None:
        minus += f" ± {100 * arm['minus_base_sd']:.2f}"
    return (
        f"| {first} | {model} | {arm['params'] / 1e6:.2f} M | {arm['macs'] / 1e6:.1f} M "
        f"| {arm['lr']:g}, {arm['epochs']} | {100 * arm['test_top1_mean']:.2f}{spread} ({len(tops)}) | {minus} |"
    )


#: what is measured, and its name in the summary of results/layer.json
LAYER = [
    (
        "inference against a loop over the groups, times faster, geometric mean",
        "loop / ours, inference, geometric mean",
    ),
    ("the same, least of all cases", "loop / ours, inference, least"),
    ("forward and backward, times faster, geometric mean", "loop / ours, forward and backward, geometric mean"),
    ("the same, least", "loop / ours, forward and backward, least"),
    (
        "time over that of a copy, tensors of 256 KiB or more, channels_last, geometric mean",
        "ours / copy of 256 KiB or more, channels_last, geometric mean",
    ),
    ("the same, most", "ours / copy of 256 KiB or more, channels_last, most"),
    ("the same, contiguous, geometric mean", "ours / copy of 256 KiB or more, contiguous, geometric mean"),
    ("the same, contiguous, most", "ours / copy of 256 KiB or more, contiguous, most"),
    ("microseconds a call, smaller tensors, most", "microseconds a call below 256 KiB, most"),
    (
        "memory beyond x, y and their gradients in forward and backward, of x, g = 4, most",
        "memory beyond x, y and their gradients over x, g = 4, most",
    ),
    ("the same, g = 16", "memory beyond x, y and their gradients over x, g = 16, most"),
    ("error against float64, most", "error against float64, most"),
]
#: the same of results/layer_compile.json
COMPILED = [
    ("torch.compile of the definition over the kernels, geometric mean", "torch.compile / ours, geometric mean"),
    ("the same, least", "torch.compile / ours, least"),
]


def layer_table() -> str:
    """One row a figure: both forms of the layer, in float32 with either instruction set, and in bfloat16."""
    results = {
        name: json.loads((ROOT / "results" / f"layer{name}.json").read_text())
        for name in ("", "_avx2", "_bf16", "_compile")
    }
    compiled = results.pop("_compile")
    columns = [(result["summary"], form) for result in results.values() for form in ("equations", "released")]
    machine, told = results[""]["machine"], results["_avx2"]["told"]
    names = [f"{form}, {kind}" for kind in ("AVX-512", "AVX2", "bf16") for form in ("equations", "released, folded")]
    lines = [
        f"{machine['processor']}, {machine['threads']} threads, torch {results['']['versions']['torch']}; "
        f"AVX2 is the same processor with `{' '.join(f'{name}={value}' for name, value in told.items())}`:",
        "",
        f"| | {' | '.join(names)} |",
        "|---" * 7 + "|",
    ]
    for title, key in LAYER:
        lines.append(_figures(title, [summary[f"{form}: {key}"] for summary, form in columns]))
    for title, key in COMPILED:
        lines.append(_figures(title, [compiled["summary"][f"{form}: {key}"] for form in ("equations", "released")]))
    return "\n".join(lines)


def _figures(title: str, values: list[float]) -> str:
    cells = [f"{value:.1e}" if value < 0.01 else f"{value:.2f}" if value < 1 else f"{value:.1f}" for value in values]
    return f"| {title} | {' | '.join(cells + [''] * (6 - len(cells)))} |"


def network_table(name: str = "network") -> str:
    """One row an edit of MobileNet-V2."""
    lines = [
        "| edit | batch | each layer adds, of the base model's time (95 %) | time / base | blocks taken out / base |",
        "|---|---|---|---|---|",
    ]
    for row in json.loads((ROOT / "results" / f"{name}.json").read_text())["cases"]:
        low, high = (100 * value for value in row["added_interval_95"])
        lines.append(
            f"| {row['edit']} | {row['batch']} | {100 * row['added_by_each_layer']:+.2f} % ({low:+.2f} to {high:+.2f}) "
            f"| {row['seconds'] / row['base_seconds']:.3f} | {row['seconds_without'] / row['base_seconds']:.3f} |"
        )
    return "\n".join(lines)


def exported_table() -> str:
    """One row an edit and form of the layer: what each layer adds to exported MobileNet-V2, with quartiles."""
    result = json.loads((ROOT / "results" / "exported.json").read_text())
    cases: dict[tuple[str, str], dict[str, str]] = {}
    for row in result["cases"]:
        low, _, high = (100 * share for share in statistics.quantiles(row["of_rounds"], n=4))
        told = f"{100 * row['added_by_each_layer']:+.2f} % ({low:+.2f} to {high:+.2f})"
        place = f"{row['pixels']} px, batch {row['batch']}"
        cases.setdefault((row["edit"], row["form"]), {})[place] = told
    places = next(iter(cases.values()))
    lines = [
        f"{result['machine']['processor']}, ONNX Runtime {result['versions']['onnxruntime']}, one thread:",
        "",
        f"| each layer adds | {' | '.join(places)} |",
        "|---" * (1 + len(places)) + "|",
    ]
    for (edit, form), told in cases.items():
        lines.append(f"| {edit}, {form} | {' | '.join(told[place] for place in places)} |")
    return "\n".join(lines)


def precision_table() -> str:
    """One row a precision: top-1 of every seed."""
    result = json.loads((ROOT / "results" / "precision.json").read_text())
    lines = ["| precision | top-1 of each seed | mean ± sd |", "|---|---|---|"]
    for name, arm in result["arms"].items():
        tops = ", ".join(f"{100 * value:.1f}" for value in arm["top1"])
        lines.append(f"| {name} | {tops} | {100 * arm['mean']:.1f} ± {100 * arm['sd']:.1f} |")
    return "\n".join(lines)


def inside_table() -> str:
    """One column a part of a call: in a model, and by itself."""
    places = json.loads((ROOT / "results" / "inside.json").read_text())["seconds"]
    lines = [f"| microseconds | {' | '.join(places['in the model'])} |", "|---" * 5 + "|"]
    for place, parts in places.items():
        lines.append(f"| {place} | {' | '.join(f'{1e6 * seconds:.0f}' for seconds in parts.values())} |")
    return "\n".join(lines)


def pipeline_table() -> str:
    """One row a kind of images and augmentations, then the training from disk and from memory."""
    result = json.loads((ROOT / "results" / "pipeline.json").read_text())
    versions, rates = result["versions"], result["training_images_per_second"]
    lines = [
        f"{result['machine']['processor']}, one thread, torch {versions['torch']}, timm {versions['timm']}, "
        f"{result['data']}, input {result['input']} px:",
        "",
        "| images | augmentations | images a second and core | over timm's | over its better form "
        "| the same from memory |",
        "|---|---|---|---|---|---|",
    ]
    for case in result["loaders"]:
        seconds = case["seconds"]
        better = min(seconds["timm"], seconds["timm, prefetcher"])
        lines.append(
            f"| {case['images']} | {case['augmentations']} | {1 / seconds['disk']:.0f} "
            f"| {seconds['timm'] / seconds['disk']:.2f} | {better / seconds['disk']:.2f} "
            f"| {better / seconds['memory']:.2f} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            f"Training from disk over training from memory, images a second, in turn: {rates['ratio']:.3f} "
            f"(95 %: {rates['ratio_low']:.3f} to {rates['ratio_high']:.3f}).",
        ]
    )


def steps_table() -> str:
    """One row a step of the input pipeline: what it took before and takes now."""
    steps = json.loads((ROOT / "results" / "pipeline.json").read_text())["steps"]
    found: dict[str, list[str]] = {}
    for name, seconds in steps.items():
        step, _, way = name.partition(": ")
        found.setdefault(step, []).append(f"{way} {1e6 * seconds:.0f}")
    lines = ["| step | microseconds an image |", "|---|---|"]
    return "\n".join([*lines, *(f"| {step} | {' -> '.join(ways)} |" for step, ways in found.items())])


PRECISIONS = {"none": "float32", "bf16": "bf16"}


def training_table() -> str:
    """One row a model: the training step over the base model's, in each layout and precision; then images a second."""
    result = json.loads((ROOT / "results" / "training.json").read_text())
    cells: dict[str, dict[str, str]] = {}
    for row in result["steps"]:
        setup = f"{row['layout']}, {PRECISIONS[row['amp']]}"
        low, high = row["over_base_95"]
        ratio = f"{row['over_base']:.3f} ({low:.3f} to {high:.3f})"
        base = row["model"] == "base"
        cells.setdefault(row["model"], {})[setup] = f"{1e3 * row['seconds']:.0f} ms" if base else ratio
    machine = result["machine"]
    lines = [
        f"{machine['processor']}, {machine['threads']} threads, torch {result['versions']['torch']}:",
        "",
        f"| model | {' | '.join(cells['base'])} |",
        "|---" * (1 + len(cells["base"])) + "|",
        *(f"| {model} | {' | '.join(found.values())} |" for model, found in cells.items()),
    ]
    rates = result["loops"]["images a second"]
    if isinstance(rates, dict):
        ours = rates["ulsam train"]
        lines += ["", "| training, reading included | images a second | `ulsam train` over it |", "|---|---|---|"]
        for name, rate in rates.items():
            measured = isinstance(rate, float)
            lines.append(f"| {name} | {rate:.1f} | {ours / rate:.2f} |" if measured else f"| {name} | {rate} | |")
    return "\n".join(lines)


def _same(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal, numbers up to how machines round."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)
    return bool(one == other)


def comparison(name: str) -> dict[str, Any]:
    """A published comparison, computed again from its runs.

    Raises:
        UlsamError: its compare.json says something else.
    """
    store = Store(ROOT / "results" / name)
    told = store.read("compare.json")
    if told is None:
        raise UlsamError(f"results/{name} is not a published comparison: it lacks compare.json")
    found = without_paths(summarise(store.grid(), store, told["margin"], told["command"]))
    if not _same(json.loads(json.dumps(found)), told):
        raise UlsamError(f"results/{name}/compare.json is not what its runs say: ulsam compare --report-only makes it")
    return found


def comparison_table(name: str, against: Sequence[str] = ()) -> str:
    """The tables of a comparison, with its notes and command; of the differences those at equal cost.

    Equal: MACs or parameters differ by 2 % at most, as those of a block replaced in several ways. Where arms are many,
    only the differences to the arms named in ``against``.
    """
    found = comparison(name)
    arms = {arm["name"]: arm for arm in found["arms"]}
    matched = []
    for pair in found["differences"]:
        ours, other = arms[pair["arm"]], arms[pair["minus"]]
        if against and other["name"] not in against:
            continue
        if alike(ours, other, "macs") or alike(ours, other, "params"):
            matched.append(pair)
    told = [table.markdown({**found, "differences": matched}).strip()]
    store, out = Store(ROOT / "results" / name), found["command"].rpartition("--out ")[2]
    guests = [store.read(f"arms/{arm.slug}/external_arm.json") for arm in store.external_arms()]
    told += [f"`{guest_command(guest, out)}`" for guest in guests]
    return "\n\n".join(told)


def guest_command(guest: dict[str, Any], out: str) -> str:
    """The command that trained an arm which joined a comparison.

    >>> guest_command({"name": "pruned-uniform-macs-0.758", "wanted": {"macs": 0.758}}, "runs/cub100")
    'python benchmarks/pruning.py runs/cub100 --uniform --macs 0.758'
    >>> guest_command({"name": "gated 14,17", "kind": "gated", "at": "14,17", "groups": 4}, "runs/cub100")
    'python benchmarks/variants.py runs/cub100 gated 14,17'
    """
    if is_pruned(guest["name"]):
        ((measure, share),) = guest["wanted"].items()
        uniform = "--uniform " if "-uniform-" in guest["name"] else ""
        return f"python benchmarks/pruning.py {out} {uniform}--{measure} {share:g}"
    groups = f" --groups {guest['groups']}" if guest["groups"] != 4 else ""
    return f"python benchmarks/variants.py {out} {guest['kind']} {guest['at']}{groups}"


def damage_table(name: str) -> str:
    """How well two samples of images rank sets of blocks alike; one row a model."""
    found = json.loads((ROOT / "results" / f"damage_{name}.json").read_text())
    lines = [
        "| model | top-1 on its training images | held-out | two held-out samples agree | training and held-out agree "
        "| set chosen by training images, its place on held-out ones | its loss there, the best one's |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, entry in found["models"].items():
        summary = entry["summary"]
        top1, agree = summary["whole model"]["top1"], summary["rank correlation"]
        chosen = summary["the best set by each"]
        ours, best = chosen["trained on, 1"], chosen[summary["judge"]]
        shares = [statistics.mean(top1[f"{kind}, {n}"] for n in (1, 2)) for kind in ("trained on", "held out")]
        mixed = [value for key, value in agree.items() if "trained on" in key and "held out" in key]
        cells = [
            model,
            *(f"{100 * share:.1f}" for share in shares),
            f"{agree['held out, 1 / held out, 2']:.3f}",
            f"{min(mixed):.3f} to {max(mixed):.3f}",
            f"{ours['place among the sets there']} of {summary['sets']}",
            f"{ours['loss there']:.3f}, {best['loss there']:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    versions = found["versions"]
    return "\n".join([*lines, "", f"{found['images']} images a sample; torch {versions['torch']}."])


def slimmed_table(name: str) -> str:
    """The base models of a comparison, the same trained on, and slimmed; then how the rate was chosen."""
    found = slimmed_results(name)
    rates = {"whole": found["whole"], "longer": found, "slimmed": found}
    titles = {"whole": "trained", "longer": "trained on, all blocks", "slimmed": "slimmed"}
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
    told = [f"Top-1 in %, on {found['images']} test images."]
    if tries:
        told.append(f"Learning rate chosen by top-1 on {found['chosen_on']} images, {tries};")
        told.append(f"the whole model has {100 * found['tried_whole']:.1f} there.")
    told.append(f"Blocks replaced: {sets}.")
    if ratios := found["latency"].get("slimmed_ratios"):
        shares = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        told.append(f"Time of each seed's model, as a share: {shares} ({_threads(found['latency']['threads'])}).")
    return "\n".join([*lines, "", " ".join(told)])


def slimmed_results(name: str) -> dict[str, Any]:
    """What ``results/slimmed_NAME.json`` holds, held against the runs' summaries where these were kept.

    Raises:
        UlsamError: it says something else than the summaries, or they are gone.
    """
    found: dict[str, Any] = json.loads((ROOT / "results" / f"slimmed_{name}.json").read_text())
    folder = ROOT / "results" / f"slimmed_{name}"
    if name in SUMMED_UP:
        return found
    if not folder.is_dir():
        raise UlsamError(f"{folder} is gone: the summaries of what results/slimmed_{name}.json says")
    runs: dict[str, dict[int, Any]] = {
        way: {seed: json.loads((folder / f"seed-{seed}" / f"{way}.json").read_text()) for seed in found[way]["seeds"]}
        for way in ("whole", "longer", "slimmed")
    }
    first, *_ = found["whole"]["seeds"]
    slimmed = runs["slimmed"]
    chosen = [json.loads((folder / f"seed-{seed}" / "slim.json").read_text())["chosen"] for seed in slimmed]
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
    said["whole"] |= {name: runs["whole"][first]["config"][name] for name in ("lr", "epochs")}
    said["slimmed"]["cost"] = slimmed[first]["cost"]
    for way in ("whole", "longer"):
        told = difference(slimmed, runs[way])
        said[f"minus_{way}"] = json.loads(json.dumps(told and dataclasses.asdict(told)))
    for key, value in said.items():
        if not _same(value, found[key]):
            raise UlsamError(
                f"results/slimmed_{name}.json is not what its runs say, of {key}: benchmarks/slimmed.py makes it"
            )
    return found


def card_table(name: str) -> str:
    """The figures of a trained model of the package, beside those of the model that it was made from."""
    found = slimmed_results(name)
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
            for title, key in (("parameters", "params"), ("multiply-adds", "macs"))
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


def allocation_table() -> str:
    """One row a precision and form of the training step: freed memory kept against handed back."""
    result = json.loads((ROOT / "results" / "allocation.json").read_text())
    lines = [
        f"{result['processor']}, {result['versions']['libc']}, torch {result['versions']['torch']}:",
        "",
        "| step | handed back | kept | times faster (each round) | peak memory |",
        "|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        back, kept = (f"{1e3 * statistics.median(case['seconds'][way]):.0f} ms" for way in ("handed back", "kept"))
        each = ", ".join(f"{ratio:.2f}" for ratio in case["times_faster_of_each_round"])
        more = case["peak_bytes"]["kept"] / case["peak_bytes"]["handed back"] - 1
        form = "eager" if case["compile"] == "none" else "compiled"
        lines.append(
            f"| {PRECISIONS[case['amp']]}, {form} | {back} | {kept} | {case['times_faster']:.2f} ({each}) "
            f"| {100 * more:+.0f} % |"
        )
    return "\n".join(lines)


def deployed_table(name: str) -> str:
    """Two rows an arm, float32 and int8.

    Before it is measured, the command that does so.
    """
    file = ROOT / "results" / f"deployed_{name}.json"
    if not file.exists():
        return f"Not measured yet: `python benchmarks/deployed.py runs/{name} {name}` does."
    result = json.loads(file.read_text())
    places = [f"batch {case['batch']}, {_threads(case['threads'])}" for case in result["times"]]
    first = next(iter(result["arms"].values()))["float32"]
    lines = [
        f"{result['machine']['processor']}, ONNX Runtime {result['versions']['onnxruntime']}, "
        f"{first['images']} test images:",
        "",
        f"| model | file | top-1, mean ± sd (seeds) | int8 minus float32 | {' | '.join(places)} |",
        "|---" * (4 + len(places)) + "|",
    ]
    for arm, models in result["arms"].items():
        for precision, model in models.items():
            tops = [100 * value for value in model["top1"]]
            spread = f" ± {statistics.stdev(tops):.2f}" if len(tops) > 1 else ""
            int8 = precision == "int8"
            share = f" ({model['bytes'] / models['float32']['bytes']:.0%})" if int8 else ""
            cells = [
                f"{arm}, {precision}" if int8 else arm,
                f"{model['bytes'] / 1e6:.2f} MB{share}",
                f"{statistics.mean(tops):.2f}{spread} ({len(tops)})",
                table.points(model["minus_float32"]) if int8 else "",
                *(_deployed_time(case["models"][arm], precision) for case in result["times"]),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def served_table(name: str) -> str:
    """One row a figure of the service under load."""
    result = json.loads((ROOT / "results" / f"served_{name}.json").read_text())
    served, stopped = result["served"], result["served"]["stopped"]
    low, high = (bytes_ / 2**20 for bytes_ in served["memory_bytes"])
    told, got = stopped["answered_by_the_service"], stopped["answers_that_clients_got"]
    rows = {
        "the same work in a loop": f"{result['loop']['images_per_second']:.0f} images a second",
        "the service": f"{served['images_per_second']:.0f} images a second, "
        f"{result['share_of_the_loop']:.0%} of that; {served['images_per_batch']:.1f} a batch",
        "a request": f"median {1e3 * served['seconds_median']:.0f} ms, 99 % within "
        f"{1e3 * served['seconds_p99']:.0f} ms, {served['p99_over_median']:.1f} times the median",
        "processor time": f"{served['service_cpu_seconds']:.0f} s of the service, "
        f"{served['client_cpu_seconds']:.0f} s of the clients, in {result['seconds']:.0f} s",
        "memory": f"{low:.0f} MiB at the start, {high:.0f} MiB at the end",
        "told to stop under load": f"{told} requests answered, {got} answers got, "
        f"{stopped['broken']} cut off, exit status {stopped['exit_status']}",
    }
    machine = result["machine"]
    return "\n".join(
        [
            f"{machine['processor']}, {machine['cores']} cores, {served['clients']} clients on the same machine:",
            "",
            "| | |",
            "|---|---|",
            *(f"| {what} | {found} |" for what, found in rows.items()),
        ]
    )


def _deployed_time(models: dict[str, Any], precision: str) -> str:
    """Of float32 the ratio to the first model, of int8 how many times it is faster than the same model in float32."""
    found = models[precision]
    against = f"{models['times_faster']:.2f} x faster" if precision == "int8" else f"x {found['ratio']:.2f}"
    return f"{1e3 * found['seconds']:.1f} ms, {against}"


def _threads(number: int) -> str:
    return "1 thread" if number == 1 else f"{number} threads"


TABLES = {
    "README.md": {"headline": readme_table},
    "docs/results.md": {
        "headline": headline_table,
        "cub100": lambda: comparison_table("compare_cub100"),
        "more_cub100": lambda: comparison_table("more_cub100"),
        "grocery81": lambda: comparison_table("compare_grocery81"),
        "v1_cub100": lambda: comparison_table("compare_v1_cub100"),
        "slimmed_cub100": lambda: slimmed_table("cub100_macs75"),
        "slimmed_grocery81": lambda: slimmed_table("grocery81_macs75"),
        "slimmed_grocery81_latency": lambda: slimmed_table("grocery81_latency85"),
        "damage_cub100": lambda: damage_table("cub100"),
        "forms_cub100": lambda: comparison_table("forms_cub100"),
        "layer_cub100": lambda: comparison_table("layer_cub100", against=("remove 14,17", "remove 4,7")),
        "layer_cub100_lr02": lambda: comparison_table("layer_cub100_lr02", against=("remove 14,17",)),
        "finetune": finetune_table,
    },
    "src/ulsam/model/weights/mobilenetv2_100.grocery81_slim75.md": {"card": lambda: card_table("grocery81_macs75")},
    "docs/deploy.md": {
        "exported": exported_table,
        "deployed_cub100": lambda: deployed_table("cub100"),
        "deployed_grocery81": lambda: deployed_table("grocery81"),
        "served_cub100": lambda: served_table("cub100"),
    },
    "docs/explain.md": {
        "cams": lambda: explained_tables.cam_table(ROOT / "results"),
        "subspaces": lambda: explained_tables.subspace_table(ROOT / "results"),
        "marks": lambda: explained_tables.mark_table(ROOT / "results"),
        "classes": lambda: explained_tables.class_table(ROOT / "results"),
        "waiting": lambda: explained_tables.waiting_table(ROOT / "results"),
    },
    "docs/performance.md": {
        "layer": layer_table,
        "network": network_table,
        "network_compile": lambda: network_table("network_compile"),
        "inside": inside_table,
        "training": training_table,
        "allocation": allocation_table,
        "precision": precision_table,
        "pipeline": pipeline_table,
        "steps": steps_table,
    },
}


def main() -> int:
    wrong = 0
    for name, tables in TABLES.items():
        page = ROOT / name
        old = new = page.read_text()
        for mark, write in tables.items():
            before, found, rest = new.partition(f"<!-- {mark} -->\n")
            if not found:
                raise UlsamError(f"{name} lacks the line <!-- {mark} -->")
            after = rest.partition(f"<!-- /{mark} -->")[2]
            new = f"{before}<!-- {mark} -->\n{write()}\n<!-- /{mark} -->{after}"
        if "--check" not in sys.argv:
            page.write_text(new)
        elif new != old:
            print(f"{name} and results/ disagree: run python benchmarks/tables.py")
            wrong = 1
    return wrong


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UlsamError as error:
        sys.exit(str(error))
