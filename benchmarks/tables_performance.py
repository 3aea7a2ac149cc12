"""The tables of docs/performance.md: the layer, the models around it, and training."""

import json
import statistics
from pathlib import Path

PRECISIONS = {"none": "float32", "bf16": "bf16"}
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


def layer_table(results: Path) -> str:
    """One row a figure: both forms of the layer, in float32 with either instruction set, and in bfloat16."""
    results = {
        name: json.loads((results / f"layer{name}.json").read_text()) for name in ("", "_avx2", "_bf16", "_compile")
    }
    compiled = results.pop("_compile")
    assert [results[name]["instructions"] for name in ("", "_avx2")] == ["AVX-512", "AVX2"]
    columns = [(result["summary"], form) for result in results.values() for form in ("equations", "released")]
    machine, other = (results[name]["machine"] for name in ("", "_avx2"))
    names = [f"{form}, {kind}" for kind in ("AVX-512", "AVX2", "bf16") for form in ("equations", "released, folded")]
    lines = [
        f"{machine['processor']}, {machine['threads']} threads, torch {results['']['versions']['torch']}; "
        f"AVX2: another {other['processor']}, which has no AVX-512, {other['threads']} threads:",
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


def network_table(results: Path, name: str = "network") -> str:
    """One row an edit of MobileNet-V2."""
    lines = [
        "| edit | batch | each layer adds, of the base model's time (95 %) | time / base | blocks taken out / base |",
        "|---|---|---|---|---|",
    ]
    for row in json.loads((results / f"{name}.json").read_text())["cases"]:
        low, high = (100 * value for value in row["added_interval_95"])
        lines.append(
            f"| {row['edit']} | {row['batch']} | {100 * row['added_by_each_layer']:+.2f} % ({low:+.2f} to {high:+.2f}) "
            f"| {row['seconds'] / row['base_seconds']:.3f} | {row['seconds_without'] / row['base_seconds']:.3f} |"
        )
    return "\n".join(lines)


def inside_table(results: Path) -> str:
    """One column a part of a call: in a model, and by itself."""
    places = json.loads((results / "inside.json").read_text())["seconds"]
    lines = [f"| microseconds | {' | '.join(places['in the model'])} |", "|---" * 5 + "|"]
    for place, parts in places.items():
        lines.append(f"| {place} | {' | '.join(f'{1e6 * seconds:.0f}' for seconds in parts.values())} |")
    return "\n".join(lines)


def training_table(results: Path) -> str:
    """One row a model: the training step over the base model's, in each layout and precision; then images a second."""
    result = json.loads((results / "training.json").read_text())
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


def allocation_table(results: Path) -> str:
    """One row a precision and form of the training step: freed memory kept against handed back."""
    result = json.loads((results / "allocation.json").read_text())
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


def precision_table(results: Path) -> str:
    """One row a precision: top-1 of every seed."""
    result = json.loads((results / "precision.json").read_text())
    lines = ["| precision | top-1 of each seed | mean ± sd |", "|---|---|---|"]
    for name, arm in result["arms"].items():
        tops = ", ".join(f"{100 * value:.1f}" for value in arm["top1"])
        lines.append(f"| {name} | {tops} | {100 * arm['mean']:.1f} ± {100 * arm['sd']:.1f} |")
    return "\n".join(lines)


def pipeline_table(results: Path) -> str:
    """One row a kind of images and augmentations, then the training from disk and from memory."""
    result = json.loads((results / "pipeline.json").read_text())
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


def steps_table(results: Path) -> str:
    """One row a step of the input pipeline: what it took before and takes now."""
    steps = json.loads((results / "pipeline.json").read_text())["steps"]
    found: dict[str, list[str]] = {}
    for name, seconds in steps.items():
        step, _, way = name.partition(": ")
        found.setdefault(step, []).append(f"{way} {1e6 * seconds:.0f}")
    lines = ["| step | microseconds an image |", "|---|---|"]
    return "\n".join([*lines, *(f"| {step} | {' -> '.join(ways)} |" for step, ways in found.items())])
