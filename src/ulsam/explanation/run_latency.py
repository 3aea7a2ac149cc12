"""How long the runs' models take for one image on this machine, each beside its base model."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ulsam.explanation.trained_runs import TrainedRun
from ulsam.model.spec import ModelSpec
from ulsam.study import latency


@dataclass(frozen=True)
class Times:
    """Latencies by the runs' keys, as of `ulsam.study.latency`; ratios are to the base model of each run."""

    runs: Mapping[str, Mapping[str, Any]]
    bases: Mapping[str, Mapping[str, Any]]
    processor: str


def time_runs(runs: Sequence[TrainedRun]) -> Times | None:
    """Time the models of all finished runs that a spec builds; None where there is none.

    Models of one base are timed in turn with it and with each other, equal ones once.
    """
    groups: dict[str, dict[str, ModelSpec]] = {}  # models without edits -> the models to time beside them, as JSON
    models: dict[str, tuple[str, str]] = {}
    for run in runs:
        if run.result and not run.result.prepared:
            edited = run.result.spec
            plain = dataclasses.replace(edited, edits=())
            base, own = plain.to_json(), edited.to_json()
            groups.setdefault(base, {base: plain})[own] = edited
            models[run.key] = base, own
    if not models:
        return None
    found = {base: latency.entry(group, None) for base, group in groups.items()}
    return Times(
        {key: found[base]["arms"][own] for key, (base, own) in models.items()},
        {key: found[base]["arms"][base] for key, (base, _) in models.items()},
        next(iter(found.values()))["where"]["processor"],
    )
