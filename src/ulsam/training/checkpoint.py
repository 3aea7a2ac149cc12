"""What a run leaves on disk to resume from: one checkpoint file, replaced whole."""

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ulsam.base.errors import UlsamError
from ulsam.base.files import check_readable, write_atomic
from ulsam.training.train_summary import EpochEntry

CHECKPOINT = "checkpoint.pt"
VERSION = 3


@dataclass
class Position:
    """How far a run has come: with the weights, their average and the optimizer this is its whole state."""

    epoch: int = 0  # epochs that are finished
    batch: int = 0  # batches that each process did in the current one
    updates: int = 0  # of the weights, in all
    loss_sum: float = 0.0  # over the images of the current epoch
    images: int = 0
    seconds: float = 0.0
    rows: list[EpochEntry] = field(default_factory=list)  # of metrics.csv


def write_checkpoint(run: Path, state: dict[str, Any]) -> None:
    """Replace the run's checkpoint; the old one stays whole until the new one is on disk.

    Raises:
        UlsamError: the disk is full or cannot be written; the old checkpoint is intact.
    """
    buffer = io.BytesIO()
    torch.save({"version": VERSION, **state}, buffer)
    write_atomic(run / CHECKPOINT, buffer.getvalue())


def read_checkpoint(run: Path) -> dict[str, Any] | None:
    """The run's checkpoint, None if it has none yet; read with ``weights_only``, so nothing in it is ever run.

    Raises:
        UlsamError: the file is no checkpoint, or from another version of this package.
    """
    path = run / CHECKPOINT
    if not path.exists():
        return None
    check_readable(path, "checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes torch raise
        reason = "it is cut off, damaged, or holds more than tensors and plain values"
        raise UlsamError(f"{path} is no checkpoint that can be read safely: {reason}") from error
    if not isinstance(state, dict) or state.get("version") != VERSION:
        raise UlsamError(f"{path} is no checkpoint of this version of ulsam")
    return state
