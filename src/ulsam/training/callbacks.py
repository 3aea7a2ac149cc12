"""What a caller may hear of a run while it trains."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ulsam.training.train_summary import EpochEntry, TrainSummary


class Callback:
    """Called by `ulsam.train` in its first process, at the start, after each update and epoch, and at the end.

    Derive from it and override what is wanted. An error in a callback ends the run, which can be resumed.

    >>> import tempfile
    >>> import ulsam
    >>> from ulsam.data.birds import draw_birds
    >>> class Losses(Callback):
    ...     def start(self, run, settings, updates):
    ...         self.seen = []
    ...     def step(self, update, values):
    ...         self.seen.append(values["loss"])
    >>> folder = tempfile.mkdtemp()
    >>> birds = draw_birds(f"{folder}/birds", classes=2, train=8, val=4, size=32)
    >>> losses = Losses()
    >>> small = {"model": "test_efficientnet", "size": 32, "batch_size": 8, "epochs": 1, "workers": 0}
    >>> summary = ulsam.train(birds, f"{folder}/run", callbacks=[losses], **small)
    >>> len(losses.seen)
    2
    """

    def start(self, run: Path, settings: Mapping[str, Any], updates: int) -> None:
        """Training begins, or resumes.

        Args:
            run: its folder.
            settings: all fields of its `ulsam.TrainConfig`.
            updates: that were made before: 0 unless it resumes.
        """

    def step(self, update: int, values: Mapping[str, float]) -> None:
        """An update of the weights was made.

        Args:
            update: its number, from 1.
            values: ``loss``, the mean over its images, and ``lr``.
        """

    def epoch(self, row: EpochEntry, update: int) -> None:
        """An epoch has ended.

        Args:
            row: its line of ``metrics.csv``; None for what was not measured.
            update: the number of updates so far.
        """

    def end(self, summary: TrainSummary | None) -> None:
        """The run has ended: with its summary, or None if it was stopped or failed."""
