"""A line for each epoch of the runs of a comparison, with the time that all of them will take yet."""

import csv
import time
from collections.abc import Iterable
from pathlib import Path

from ulsam.base.logs import say
from ulsam.base.timing import duration
from ulsam.study.comparison_folder import ComparisonFolder
from ulsam.study.grid import Grid, Run


class EpochLines:
    """Says a line for every epoch that ends from now on; runs whose folder is not seen here have none.

    Args:
        grid: what is compared.
        comparison: its folder.
    """

    def __init__(self, grid: Grid, comparison: ComparisonFolder) -> None:
        self.grid, self.comparison, self.began = grid, comparison, time.monotonic()
        self.shown = {str(run): len(self._rows(run)) for run in grid.known(comparison.outcome)}
        self.ended = 0  # epochs, since then

    def look(self, runs: Iterable[Run]) -> None:
        """Say what is new of these runs."""
        for run in runs:
            rows = self._rows(run)
            for row in rows[self.shown.get(str(run), 0) :]:
                self.ended += 1
                top1 = f", top-1 {100 * float(row['val_top1']):.2f} %" if row["val_top1"] else ""
                say(
                    f"epoch   {run}: {row['epoch']}/{run.config.epochs}, training loss {float(row['train_loss']):.4f}"
                    f"{top1}; {self._left(run, int(row['epoch']))}"
                )
            self.shown[str(run)] = max(len(rows), self.shown.get(str(run), 0))

    def _left(self, now: Run, epoch: int) -> str:
        """The time until all runs have ended, at the pace so far."""
        known = self.grid.known(self.comparison.outcome)
        done = {str(run): self.shown.get(str(run), 0) for run in known} | {str(now): epoch}
        left = sum(max(0, run.config.epochs - done[str(run)]) for run in known if self.comparison.outcome(run) is None)
        left += max(0, self.grid.size - len(known)) * max(run.config.epochs for run in known)  # not decided yet
        seconds = left * (time.monotonic() - self.began) / self.ended
        return f"about {duration(seconds)} left" if left else "the last epoch"

    def _rows(self, run: Run) -> list[dict[str, str]]:
        path: Path = self.comparison.folder(run) / "metrics.csv"
        if not path.exists():
            return []
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
