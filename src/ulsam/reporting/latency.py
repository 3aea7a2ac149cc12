"""How long the runs' nets take for one picture on this machine, each beside its base net."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ulsam.comparison import latency
from ulsam.recipe import Recipe
from ulsam.reporting.runs import TrainedRun


@dataclass(frozen=True)
class Times:
    """Latencies by the runs' keys, as of `ulsam.comparison.latency`; ratios are to the base net of each run."""

    runs: Mapping[str, Mapping[str, Any]]
    bases: Mapping[str, Mapping[str, Any]]
    processor: str


def time_runs(runs: Sequence[TrainedRun]) -> Times | None:
    """Time the nets of all finished runs that a recipe builds; None where there is none.

    Nets of one base are timed in turn with it and with each other, equal ones once.
    """
    groups: dict[str, dict[str, Recipe]] = {}  # nets without edits -> the nets to time beside them, as JSON
    nets: dict[str, tuple[str, str]] = {}
    for run in runs:
        if run.result and not run.result.prepared:
            edited = run.result.recipe
            plain = dataclasses.replace(edited, edits=())
            base, own = plain.to_json(), edited.to_json()
            groups.setdefault(base, {base: plain})[own] = edited
            nets[run.key] = base, own
    if not nets:
        return None
    found = {base: latency.entry(group, None) for base, group in groups.items()}
    return Times(
        {key: found[base]["arms"][own] for key, (base, own) in nets.items()},
        {key: found[base]["arms"][base] for key, (base, _) in nets.items()},
        next(iter(found.values()))["where"]["processor"],
    )
