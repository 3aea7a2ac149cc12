"""The tables of docs/performance.md: the layer, the models around it, and training."""

import json
import statistics
from pathlib import Path

PRECISIONS = {"none": "float32", "bf16": "bf16"}
#: what is measured, and its name in the summary of results/layer.json
LAYER = [
    ("inference against a loop over the groups, times faster, geometric mean", "inference_speedup_mean"),
    ("the same, least of all cases", "inference_speedup_min"),
    ("forward and backward, times faster, geometric mean", "training_speedup_mean"),
    ("the same, least", "training_speedup_min"),
    (
        "time over that of a copy, tensors of 256 KiB or more, channels_last, geometric mean",
        "over_copy_channels_last_mean",
    ),
    ("the same, most", "over_copy_channels_last_max"),
    ("the same, contiguous, geometric mean", "over_copy_contiguous_mean"),
    ("the same, contiguous, most", "over_copy_contiguous_max"),
    ("microseconds a call, smaller tensors, most", "small_microseconds_max"),
    ("memory beyond x, y and their gradients in forward and backward, of x, g = 4, most", "extra_memory_g4_max"),
    ("the same, g = 16", "extra_memory_g16_max"),
    ("error against float64, most", "error_max"),
]
#: the same of results/layer_compile.json
COMPILED = [
    ("torch.compile of the definition over the kernels, geometric mean", "compile_over_ours_mean"),
    ("the same, least", "compile_over_ours_min"),
]
#: the parts of a call in results/inside.json, and where it is made
CALL_PARTS = {"output_memory": "memory for the output", "kernels": "kernels", "python": "Python", "total": "in all"}
CALLED = {"in_the_model": "in the model", "by_itself": "by itself"}
#: the ways of training in results/training.json
TRAINING = {
    "ulsam_train": "ulsam train",
    "timm_loop_defaults": "timm loop, defaults",
    "timm_loop_channels_last_bf16": "timm loop, channels_last and bf16",
    "timm_script_defaults": "timm script, defaults",
    "timm_script_best_flags": "timm script, best flags",
}
#: the steps of the input pipeline in results/pipeline.json, and the ways to take them
STEPS = {
    "decode": "decode",
    "crop_and_resize_bilinear": "crop and resize, bilinear",
    "crop_and_resize_bicubic": "crop and resize, bicubic",
    "normalize": "normalize",
    "seed": "seed",
    "color_jitter": "color jitter",
}
WAYS = {
    **{"pillow": "Pillow", "torchvision": "torchvision", "simplejpeg": "simplejpeg", "pytorch_uint8": "PyTorch, uint8"},
    **{"each_image_torchvision": "each image, torchvision", "a_batch_at_once": "a batch at once"},
    **{"three_generators": "three generators", "one_generator": "one generator"},
    **{"torchvision_on_pillow": "torchvision, on Pillow's", "ours": "ours"},
}


def layer_table(results: Path) -> str:
    """One row a figure: both forms of the layer, in float32 with either instruction set, and in bfloat16."""
    results = {
        name: json.loads((results / f"layer{name}.json").read_text()) for name in ("", "_avx2", "_bf16", "_compile")
    }
    compiled = results.pop("_compile")
    assert [results[name]["instructions"] for name in ("", "_avx2")] == ["AVX-512", "AVX2"]
    columns = [result["summary"][form] for result in results.values() for form in ("equations", "released")]
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
        lines.append(_figures(title, [summary[key] for summary in columns]))
    for title, key in COMPILED:
        lines.append(_figures(title, [compiled["summary"][form][key] for form in ("equations", "released")]))
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
    lines = [f"| microseconds | {' | '.join(CALL_PARTS.values())} |", "|---" * 5 + "|"]
    for place, title in CALLED.items():
        lines.append(f"| {title} | {' | '.join(f'{1e6 * places[place][part]:.0f}' for part in CALL_PARTS)} |")
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
    if rates := result["loops"]["images_per_second"]:
        ours = rates["ulsam_train"]
        lines += ["", "| training, reading included | images a second | `ulsam train` over it |", "|---|---|---|"]
        for name, title in TRAINING.items():
            rate = rates[name]
            lines.append(f"| {title} | {rate:.1f} | {ours / rate:.2f} |" if rate else f"| {title} | not measured | |")
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
        back, kept = (f"{1e3 * statistics.median(case['seconds'][way]):.0f} ms" for way in ("handed_back", "kept"))
        each = ", ".join(f"{ratio:.2f}" for ratio in case["times_faster_of_each_round"])
        more = case["peak_bytes"]["kept"] / case["peak_bytes"]["handed_back"] - 1
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


def reconstruction_table(results: Path) -> str:
    """One row a size and edit: the seconds in float32 and under autocast."""
    result = json.loads((results / "reconstruct_speed.json").read_text())
    machine, cases = result["machine"], result["cases"]
    found = {(case["size"], case["edit"], case["dtype"]): case["seconds"] for case in cases}
    lines = [
        f"{machine['processor']}, {machine['threads']} threads, torch {result['versions']['torch']}:",
        "",
        "| input | blocks 13, 14, 16 and 17 | float32 | bfloat16, autocast |",
        "|---|---|---|---|",
    ]
    for size, edit in dict.fromkeys((case["size"], case["edit"]) for case in cases):
        what = "removed" if edit == "remove" else "replaced by ULSAM"
        times = (f"{found[size, edit, dtype]:.0f} s" for dtype in ("float32", "bfloat16"))
        lines.append(f"| {size} px | {what} | {' | '.join(times)} |")
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
        better = min(seconds["timm"], seconds["timm_prefetcher"])
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
    lines = ["| step | microseconds an image |", "|---|---|"]
    for step, title in STEPS.items():
        lines.append(
            f"| {title} | {' -> '.join(f'{WAYS[way]} {1e6 * took:.0f}' for way, took in steps[step].items())} |"
        )
    return "\n".join(lines)
