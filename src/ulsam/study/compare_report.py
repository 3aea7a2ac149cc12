"""What a comparison found, from the runs that are there."""

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ulsam.base.files import write_atomic
from ulsam.base.provenance import command_line
from ulsam.model.spec import ModelSpec
from ulsam.study import compare_plot as plot
from ulsam.study import compare_table as table
from ulsam.study import latency
from ulsam.study.arms import Arm
from ulsam.study.compare_result import ArmResult, CompareResult, DifferenceEntry, FailedRun, LatencyEntry
from ulsam.study.comparison_folder import ComparisonFolder
from ulsam.study.grid import Failed, Grid, Try, at_the_edge, close_call, longest_is_best
from ulsam.study.statistics import Difference, SeedVariance, check_paired, difference, pooled_seed_variance

Runs = dict[int, Mapping[str, Any]]  # summaries by seed


def summarize(grid: Grid, comparison: ComparisonFolder, margin: float, command: str | None = None) -> CompareResult:
    """Everything that a comparison found, as JSON; shares are 0..1, times in seconds.

    Args:
        grid: what was compared.
        comparison: where its runs lie; arms that another program trained there are part of the result.
        margin: share of top-1 that an arm may lose and still be non-inferior.
        command: that made the runs; by default the one that is running.

    Raises:
        UlsamError: a run has other settings than the grid says, or the runs were measured on different images.
    """
    planned, external = grid.arms, comparison.external_arms()
    grid = dataclasses.replace(grid, arms=(*grid.arms, *external))
    runs = {arm.name: _finals(grid, arm, comparison) for arm in grid.arms}
    measured = [summary for of_arm in runs.values() for summary in of_arm.values()]
    if measured:
        check_paired(measured)
    timed = comparison.read("latency.json")
    times = _latencies(timed, {arm.name: runs[arm.name] for arm in planned}) if timed else {}
    times |= _external_latencies(external, comparison)
    pooled = pooled_seed_variance(
        {seed: summary["scores"]["top1"] for seed, summary in of_arm.items()} for of_arm in runs.values()
    )
    differences = _differences(grid.arms, runs, pooled, margin)
    to_base = {entry["arm"]: entry for entry in differences if entry["minus"] == grid.arms[0].name}
    arms = [
        _arm_entry(grid, arm, comparison, runs[arm.name], times.get(arm.name), to_base.get(arm.name))
        for arm in grid.arms
    ]
    return {
        "what": "top-1 of models trained with the same settings, paired by seed and image",
        "command": command or command_line(),
        "margin": margin,
        "seeds": grid.seeds,
        "chosen_on": (grid.choose_split or "held-out") if grid.choosing else None,
        "split": measured[0]["split"] if measured else None,
        "images": measured[0]["scores"]["images"] if measured else None,
        "finished": not grid.due(comparison.outcome),
        "arms": arms,
        "seed_sd": math.sqrt(pooled.variance) if pooled else None,  # of a model's top-1, pooled over the arms
        "differences": differences,
        "notes": _notes(grid, arms, differences, measured),
        "versions": _versions(measured),
        "processor": timed["where"]["processor"] if timed else None,  # that latencies were measured on
        "threads": timed["where"]["threads"] if timed else None,  # of PyTorch, meanwhile
    }


def _differences(
    arms: Sequence[Arm], runs: Mapping[str, Runs], pooled: SeedVariance | None, margin: float
) -> list[DifferenceEntry]:
    """Every arm minus each one before it, where both have runs with the same seeds."""
    pairs = [(arm, other) for number, arm in enumerate(arms) for other in arms[:number]]
    measured = [(arm, other, difference(runs[arm.name], runs[other.name], pooled)) for arm, other in pairs]
    return [_difference_entry(arm, other, gap, margin) for arm, other, gap in measured if gap]


def _external_latencies(arms: Sequence[Arm], comparison: ComparisonFolder) -> dict[str, LatencyEntry]:
    """What other programs say of the time of their arms."""
    entries = {arm.name: comparison.read(f"arms/{arm.slug}/external_arm.json") for arm in arms}
    return {name: entry["latency"] for name, entry in entries.items() if "latency" in entry}


def _versions(measured: list[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Every version of each package that the runs were made with."""
    return {name: _values(measured, name) for name in sorted({key for run in measured for key in run["versions"]})}


def _latencies(timed: Mapping[str, Any], runs: Mapping[str, Runs]) -> dict[str, Any]:
    """What was timed, by arm; an arm that was not timed has the time of one with the same model."""
    times = dict(timed["arms"])
    by_model = {timed["models"][name]: found for name, found in times.items()}
    for name, found in runs.items():
        if name not in times and found:
            spec = ModelSpec.from_json(json.dumps(next(iter(found.values()))["spec"]))
            if spec.to_json() in by_model:
                times[name] = by_model[spec.to_json()]
    return times


def measure_latency(grid: Grid, comparison: ComparisonFolder) -> None:
    """Time the arms' models beside each other, once: ``latency.json``; only arms that have a finished run."""
    specs = {}
    for arm in grid.arms:
        if found := _finals(grid, arm, comparison):
            entry = next(iter(found.values()))["spec"]
            specs[arm.name] = ModelSpec.from_json(json.dumps(entry))
    if len(specs) > 1 and grid.arms[0].name in specs:
        comparison.write("latency.json", latency.entry(specs, comparison.read("latency.json")))


def write_reports(comparison: ComparisonFolder, result: CompareResult) -> None:
    """Write ``compare.json``, ``.md``, ``.csv``, ``.png``, and ``rates.png`` where rates were tried."""
    comparison.write("compare.json", result)
    write_atomic(comparison.root / "compare.md", table.markdown(result))
    write_atomic(comparison.root / "compare.csv", table.csv_text(result))
    if any(arm["top1_mean"] is not None for arm in result["arms"]):
        write_atomic(comparison.root / "compare.png", plot.draw(result))
    if any(entry["top1"] is not None for arm in result["arms"] for entry in arm["tries"]):
        write_atomic(comparison.root / "rates.png", plot.draw_rates(result))


def written(out: str | Path) -> list[str]:
    """The paths of the reports in the folder of a comparison.

    >>> written("a folder that is not there")
    []
    """
    names = ("compare.md", "compare.csv", "compare.json", "compare.png", "rates.png")
    return [str(Path(out) / name) for name in names if (Path(out) / name).exists()]


def _finals(grid: Grid, arm: Arm, comparison: ComparisonFolder) -> Runs:
    found: Runs = {}
    for run in grid.finals(arm, comparison.outcome):
        summary = comparison.outcome(run)
        if summary is not None and not isinstance(summary, Failed):
            found[run.config.seed] = summary
    return found


def _arm_entry(
    grid: Grid,
    arm: Arm,
    comparison: ComparisonFolder,
    runs: Runs,
    times: LatencyEntry | None,
    minus_base: DifferenceEntry | None,
) -> ArmResult:
    top1 = [summary["scores"]["top1"] for summary in runs.values()]
    chosen = grid.chosen(arm, comparison.outcome)
    tries = grid.tried(arm, comparison.outcome)
    finals = grid.finals(arm, comparison.outcome)
    # a rate that fails is a result of its own, but without any that works the arm has failed
    counted = grid.tries(arm, comparison.outcome) if tries and all(entry.failed for entry in tries) else finals
    failed: list[FailedRun] = [
        {"run": run.name, "reason": found.reason}
        for run in counted
        if isinstance(found := comparison.outcome(run), Failed)
    ]
    return {
        "name": arm.name,
        "folder": arm.slug,
        "edits": list(arm.edits),
        "settings": dict(arm.settings),
        "lr": chosen[0] if chosen else None,
        "epochs": chosen[1] if chosen else None,
        "tries": [
            {
                "lr": entry.rate,
                "epochs": entry.epochs,
                "top1": entry.top1,
                "each": list(entry.each),
                "loss": entry.loss,
                "failed": entry.failed,
            }
            for entry in tries
        ],
        "seeds": list(runs),
        "top1": top1,
        "top1_mean": statistics.mean(top1) if top1 else None,
        "top1_sd": statistics.stdev(top1) if len(top1) > 1 else None,
        "cost": next(iter(runs.values()))["cost"] if runs else {},
        "latency": times,
        "failed": failed,
        "missing": grid.seeds - sum(comparison.outcome(run) is not None for run in finals),
        "minus_base": minus_base,
    }


def _difference_entry(arm: Arm, other: Arm, between: Difference, margin: float) -> DifferenceEntry:
    return {
        "arm": arm.name,
        "minus": other.name,
        "mean": between.mean,
        "low": between.low,
        "high": between.high,
        "over": between.over,
        "seeds": list(between.seeds),
        "of_seeds": list(between.of_seeds),
        "differ": between.differ,
        "verdict": list(between.words(margin)),
    }


def _notes(
    grid: Grid, arms: list[ArmResult], differences: list[DifferenceEntry], measured: list[Mapping[str, Any]]
) -> list[str]:
    longest = [entry["name"] for entry in arms if longest_is_best(_tries(entry))]
    notes = [note for entry in arms for note in _arm_notes(entry, arms[0])]
    if longest:
        whose = "every arm" if len(longest) == len(arms) else ", ".join(longest)
        notes.append(f"{whose}: of the tried numbers of epochs the largest is best; more may change the order")
    if not grid.choosing:
        notes.append(
            "learning rate and epochs were given, not chosen for each arm: a difference may be theirs: give "
            "several `rates` and `tried_epochs`"
        )
    if measured and measured[0]["split"] == "held-out":
        notes.append("measured on held-out training images: good for screening, not for a headline")
    over = {entry["over"] for entry in differences}
    if "images" in over:
        notes.append("one seed: these intervals are over images alone, and say nothing about other seeds")
    if "seeds" in over:
        notes.append("which images were right is not known of these runs: intervals are over seeds alone")
    for name in ("torch", "timm", "device", "ulsam"):
        used = _values(measured, name)
        if len(used) > 1:
            notes.append(f"the runs were not all made with the same {name}: {', '.join(used)}")
    return notes


def _arm_notes(entry: ArmResult, base: ArmResult) -> list[str]:
    """What failed in an arm, and where other tries or seeds may change its result."""
    notes = [
        f"{entry['name']}: rate {tried['lr']:g} ({tried['epochs']} epochs) failed: {tried['failed']}"
        for tried in entry["tries"]
        if tried["failed"]
    ]
    if entry["lr"] is not None:
        notes += [f"{entry['name']}, {bad['run']} failed: {bad['reason']}" for bad in entry["failed"]]
    if edge := at_the_edge(_tries(entry)):
        side = "larger" if edge == "largest" else "smaller"
        notes.append(f"{entry['name']}: of the tried learning rates the {edge} is best; try {side} ones by `rates`")
    if call := close_call(_tries(entry)):
        best, other = call
        notes.append(
            f"{entry['name']}: chance may have chosen {_settings(best)} over {_settings(other)}, whose loss is "
            "lower; raise `tried_seeds`"
        )
    minus = entry["minus_base"]
    if minus and not set(minus["seeds"]) == set(entry["seeds"]) == set(base["seeds"]):
        notes.append(f"{entry['name']} minus base: over {len(minus['seeds'])} common seeds")
    return notes


def _tries(entry: ArmResult) -> list[Try]:
    return [
        Try(tried["lr"], tried["epochs"], tried["top1"], tried["failed"], loss=tried["loss"])
        for tried in entry["tries"]
    ]


def _settings(tried: Try) -> str:
    top1, loss = 100 * (tried.top1 or 0), tried.loss or 0
    return f"{tried.rate:g}, {tried.epochs} epochs ({top1:.1f}, loss {loss:.3f})"


def _values(measured: list[Mapping[str, Any]], name: str) -> list[str]:
    """Every version of something that the runs were made with."""
    return sorted({run["versions"][name] for run in measured if name in run["versions"]})
