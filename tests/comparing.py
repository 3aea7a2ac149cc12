"""Comparisons whose runs are trained in the process of the test."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiny import SETTINGS
from ulsam.base.errors import UlsamError
from ulsam.study.arms import parse_arms
from ulsam.study.compare import _reported
from ulsam.study.compare_report import measure_latency
from ulsam.study.comparison_folder import ComparisonFolder
from ulsam.study.grid import Grid, Run
from ulsam.study.identity import data_digest
from ulsam.study.launch import EndedRun, run_all
from ulsam.training.config import TrainConfig
from ulsam.training.train import train

RESOLVED = {**SETTINGS, "epochs": 1, "layout": "contiguous", "amp": "none", "compile": "none"}
ARMS = ("base", "slim: insert blocks.2 g=4; size=24")


class Here:
    """Runs one after the other in this process, which is fast; notes which ones it started."""

    def __init__(self, comparison: ComparisonFolder) -> None:
        self.comparison = comparison
        self.started: list[str] = []
        self.over: list[EndedRun] = []

    def start(self, run: Run) -> bool:
        self.comparison.check(run)
        self.started.append(str(run))
        try:
            train(run.config, self.comparison.folder(run))
            self.over.append(EndedRun(run))
        except UlsamError as error:
            self.over.append(EndedRun(run, str(error)))
        return True

    def room(self) -> bool:
        return not self.over

    def running(self) -> Sequence[Run]:
        return [ended.run for ended in self.over]

    def ended(self) -> list[EndedRun]:
        over, self.over = self.over, []
        return over

    def stop(self) -> None:
        pass


def run_here(
    out: Path, data: Path, arms: Sequence[str], *, settings: dict[str, Any] | None = None, **given: Any
) -> tuple[dict[str, Any], list[str]]:
    """As `ulsam.compare`, with :class:`Here`; what it returns, and the runs that it started."""
    shared = TrainConfig.from_mapping({**RESOLVED, "data": str(data), **(settings or {})})
    grid, comparison = Grid(parse_arms(arms), shared, **given), ComparisonFolder(out)
    with comparison.locked():
        comparison.begin(grid, f"ulsam compare {data}", data_digest(shared, grid.choose_split), {})
    launcher = Here(comparison)
    run_all(grid, comparison, launcher, "ulsam compare")
    measure_latency(grid, comparison)
    return _reported(grid, comparison, 0.005, f"ulsam compare {data}"), launcher.started


def summaries(out: Path, arm: str, pattern: str = "seed-*") -> list[dict[str, Any]]:
    found = sorted(out.glob(f"arms/{arm}/{pattern}/summary.json"))
    return [json.loads(path.read_text()) for path in found]
