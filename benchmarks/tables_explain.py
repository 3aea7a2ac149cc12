"""The tables of docs/explain.md, from results/explained_*.json, explain_speed.json and explored.json.

`tables.py` calls them with the folder of the results; of what was not measured they have no row.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SETS = {"birds": "drawn birds", "cub100": "CUB-200-2011, 100 of its classes"}
CAM = "Grad-CAM++"


def cam_table(results: Path) -> str:
    """One row a model: whether its CAMs find what it needs."""
    lines = [
        "| images | model | deletion | minus random | insertion | minus random | drop | increase |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for title, model, found in _models(results):
        cam = found["cam"]
        cells = [f"{cam['deletion']['mean']:.3f}", _mean(cam["deletion_minus_random"], "+.3f")]
        cells += [f"{cam['insertion']['mean']:.3f}", _mean(cam["insertion_minus_random"], "+.3f")]
        cells += [_percent(cam["average_drop"]), _percent(cam["increase_in_confidence"])]
        lines.append(f"| {title} | {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def subspace_table(results: Path) -> str:
    """One row a ULSAM layer: whether its subspaces differ, in where they look and in the frequencies they hold."""
    lines = [
        "| images | layer, maps | entropy of each map, % | of classes, least to most, % | peak of each map | r "
        "| JS, bits | cycles of each subspace | after | random groups |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for title, _, found in _models(results):
        for layer in found["layers"]:
            groups, height, width = layer["maps"]
            classes = [entry["mean"] for entry in layer["entropy_of_class"].values()]
            frequency = layer["frequency"]
            cells = [
                f"{layer['place'] or layer['name']}, {groups} of {height} × {width}",
                _list([100 * one["mean"] for one in layer["entropy_share"]], 1),
                f"{100 * min(classes):.1f} to {100 * max(classes):.1f}",
                _list([one["mean"] for one in layer["peak"]], 2),
                _mean(layer["correlation"], "+.2f"),
                _mean(layer["divergence_bits"], ".4f"),
                _list(frequency["before"]["cycles_per_width"], 2),
                _list(frequency["after"]["cycles_per_width"], 2),
                f"{100 * frequency['before']['random_groups_as_far_apart']:.1f} %",
            ]
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def mark_table(results: Path) -> str:
    """One row a map: its mass on each field mark of the drawn birds, in multiples of a uniform map's."""
    lines: list[str] = []
    for title, model, found in _models(results):
        marks = found["marks"]
        if marks is None:
            continue
        areas = {name: area["mean"] for name, area in marks["area"].items()}
        if not lines:
            lines = [f"| {title} | {' | '.join(areas).replace('_', ' ')} |", "|---" * (1 + len(areas)) + "|"]
            lines.append(f"| share of the image | {' | '.join(f'{100 * area:.1f} %' for area in areas.values())} |")
        maps = [whose for whose in marks if ", map " in whose]
        for whose in [CAM, *maps]:
            name = f"{CAM}, {model}" if whose == CAM else f"attention, map {whose.rpartition(' ')[2]}"
            shares = [marks[whose][mark] for mark in areas]
            cells = [
                f"{one['times_area']:.2f} ± {one['standard_error'] / area:.2f}"
                for one, area in zip(shares, areas.values(), strict=True)
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def class_table(results: Path) -> str:
    """One row a class of the drawn birds: how far from uniform the maps on its images are."""
    lines = []
    for title, _, found in _models(results):
        for layer in found["layers"] if found["marks"] else ():
            lines = [f"| {title} | entropy of the maps of layer {layer['place'] or layer['name']} |", "|---|---|"]
            lines += [f"| {name} | {_percent(entropy)} |" for name, entropy in layer["entropy_of_class"].items()]
    return "\n".join(lines)


def waiting_table(results: Path) -> str:
    """One row a thing to wait for: the report on a folder, and the page's answer to an image."""
    measured = [found for name in ("explain_speed", "explored") if (found := _read(results / f"{name}.json"))]
    if not measured:
        return "Not measured yet."
    machine, versions = measured[0]["machine"], measured[0]["versions"]
    lines = [
        f"Models of {measured[0]['size']} px, {machine['processor']}, {machine['threads']} threads, "
        f"torch {versions['torch']}:",
        "",
        "| command | images | measured |",
        "|---|---|---|",
    ]
    for result in measured:
        for case in result.get("cases", ()):
            rate = f"{case['images_per_second']:.1f} images a second"
            lines.append(f"| `ulsam explain`, {case['what']} | a folder of {case['images']} | {rate} |")
        for seconds in result.get("seconds", {}).values():
            times = f"{seconds['median']:.2f} s, the slowest of {seconds['times']}: {seconds['largest']:.2f} s"
            lines.append(f"| `ulsam explore`, two models | a JPEG of {seconds['megapixels']:g} Mpx | {times} |")
    return "\n".join(lines)


def _models(results: Path) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """What the images are called, what the model is, and its numbers; the title once for each set of images."""
    for name, title in SETS.items():
        result = _read(results / f"explained_{name}.json")
        heading = f"{title}, {result['images']}" if result else ""
        for model in (result or {}).get("models", {}).values():
            yield heading, ", ".join([model["spec"]["base"], *model["spec"]["edits"]]), model


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None  # type: ignore[no-any-return]


def _mean(value: Mapping[str, float | None] | None, form: str, unit: float = 1) -> str:
    """A mean and its standard error, which one image alone does not have; flat maps have no correlation."""
    if value is None:
        return "–"
    mean, error = ((each or 0) / unit for each in (value["mean"], value["standard_error"]))
    return f"{mean:{form}}" + ("" if value["standard_error"] is None else f" ± {error:{form.strip('+')}}")


def _percent(value: Mapping[str, float | None]) -> str:
    return _mean(value, ".1f", 0.01) + " %"


def _list(values: list[float], digits: int) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)
