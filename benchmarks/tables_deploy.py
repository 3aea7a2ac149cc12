"""The tables of docs/deploy.md: exported and quantized models, and the HTTP service."""

import json
import statistics
from pathlib import Path
from typing import Any

from ulsam.deploy.bench_report import threads_text
from ulsam.study import compare_table as table


def exported_table(results: Path) -> str:
    """One row an edit and form of the layer: what each layer adds to exported MobileNet-V2, with quartiles."""
    result = json.loads((results / "exported.json").read_text())
    cases: dict[tuple[str, str], dict[str, str]] = {}
    for row in result["cases"]:
        low, _, high = (100 * share for share in statistics.quantiles(row["of_rounds"], n=4))
        shown = f"{100 * row['added_by_each_layer']:+.2f} % ({low:+.2f} to {high:+.2f})"
        place = f"{row['pixels']} px, batch {row['batch']}"
        cases.setdefault((row["edit"], row["form"]), {})[place] = shown
    places = next(iter(cases.values()))
    lines = [
        f"{result['machine']['processor']}, ONNX Runtime {result['versions']['onnxruntime']}, one thread:",
        "",
        f"| each layer adds | {' | '.join(places)} |",
        "|---" * (1 + len(places)) + "|",
    ]
    for (edit, form), shown in cases.items():
        lines.append(f"| {edit}, {form} | {' | '.join(shown[place] for place in places)} |")
    return "\n".join(lines)


def deployed_table(results: Path, name: str) -> str:
    """Two rows an arm, float32 and int8.

    Before it is measured, the command that does so.
    """
    file = results / f"deployed_{name}.json"
    if not file.exists():
        return f"Not measured yet: `python benchmarks/deployed.py runs/{name} {name}` does."
    result = json.loads(file.read_text())
    places = [f"batch {case['batch']}, {threads_text(case['threads'])}" for case in result["times"]]
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


def _deployed_time(models: dict[str, Any], precision: str) -> str:
    """Of float32 the ratio to the first model, of int8 how many times it is faster than the same model in float32."""
    found = models[precision]
    against = f"{models['times_faster']:.2f} x faster" if precision == "int8" else f"x {found['ratio']:.2f}"
    return f"{1e3 * found['seconds']:.1f} ms, {against}"


def served_table(results: Path, name: str) -> str:
    """One row a figure of the service under load."""
    result = json.loads((results / f"served_{name}.json").read_text())
    served, stopped = result["served"], result["served"]["stopped"]
    low, high = (bytes_ / 2**20 for bytes_ in served["memory_bytes"])
    sent, got = stopped["answered_by_the_service"], stopped["answers_that_clients_got"]
    rows = {
        "the same work in a loop": f"{result['loop']['images_per_second']:.0f} images a second",
        "the service": f"{served['images_per_second']:.0f} images a second, "
        f"{result['share_of_the_loop']:.0%} of that; {served['images_per_batch']:.1f} a batch",
        "a request": f"median {1e3 * served['seconds_median']:.0f} ms, 99 % within "
        f"{1e3 * served['seconds_p99']:.0f} ms, {served['p99_over_median']:.1f} times the median",
        "processor time": f"{served['service_cpu_seconds']:.0f} s of the service, "
        f"{served['client_cpu_seconds']:.0f} s of the clients, in {result['seconds']:.0f} s",
        "memory": f"{low:.0f} MiB at the start, {high:.0f} MiB at the end",
        "stopped under load": f"{sent} requests answered, {got} answers got, "
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


def quantized_table(results: Path) -> str:
    """A row for each model and way to int8: top-1 against float32, size, and time against float32 in ONNX Runtime."""
    result = json.loads((results / "quantized.json").read_text())
    versions = result["versions"]
    lines = [
        f"{result['machine']['processor']}, NNCF {versions['nncf']}, OpenVINO {versions['openvino']}, "
        f"ONNX Runtime {versions['onnxruntime']}, processor time of one image:",
        "",
        "| model | way | files | top-1 | minus float32 | time |",
        "|---|---|---|---|---|---|",
    ]
    for name, model in result["models"].items():
        for way, found in model["ways"].items():
            first = found["ratio_interval"] is None
            low, high = found["ratio_interval"] or (1.0, 1.0)
            cells = [
                f"{name}, {model['images']} images" if first else "",
                way,
                f"{found['bytes'] / 1e6:.2f} MB",
                f"{100 * found['top1']:.2f}",
                "" if first else table.points(found["minus_float32"]),
                f"{1e3 * found['seconds']:.1f} ms, x {found['ratio']:.2f}"
                + ("" if first else f" [{low:.2f}, {high:.2f}]"),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
