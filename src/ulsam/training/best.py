"""Which epoch was the best on the validation images: to keep its weights, and to stop where none is better for long.

The better epoch has the higher top-1, or mAP of several labels an image; where that is equal, the lower loss.
"""

import re
from collections.abc import Sequence

from torch import Tensor, nn

from ulsam.base.errors import UlsamError
from ulsam.training.config import TrainConfig
from ulsam.training.train_summary import EpochEntry, KeptEpoch

State = dict[str, Tensor]


def check_chosen_on(config: TrainConfig, split: str) -> None:
    """Raise where epochs would be chosen by their score on a test split.

    Args:
        config: with ``keep`` and ``patience``.
        split: what the images that are measured on are called.

    Raises:
        UlsamError: they are a test split.

    >>> check_chosen_on(TrainConfig("birds", keep="best"), "test")
    Traceback (most recent call last):
    ulsam.base.errors.UlsamError: keep=best would choose an epoch by its score on test images, which would then be no \
fair test: hold training images out with `val_fraction`, or name another split with `val_split`
    """
    if (config.keep == "best" or config.patience) and re.search(r"(?<![a-z])test", split.lower()):
        what = "keep=best" if config.keep == "best" else "patience"
        raise UlsamError(
            f"{what} would choose an epoch by its score on {split} images, which would then be no fair test: hold "
            "training images out with `val_fraction`, or name another split with `val_split`"
        )


def best_row(rows: Sequence[EpochEntry]) -> EpochEntry | None:
    """The row of the best epoch, of equal ones the first; None where no epoch was measured.

    >>> scores = [0.5, 0.7, None, 0.7]
    >>> best_row([{"epoch": n, "val_top1": top1, "val_loss": 1.0} for n, top1 in enumerate(scores, 1)])["epoch"]
    2
    """
    measured = [row for row in rows if _score(row) is not None]
    return max(measured, key=lambda row: (_score(row) or 0.0, -(row["val_loss"] or 0.0)), default=None)


def _score(row: EpochEntry) -> float | None:
    """None where the epoch was not measured, or no class had an image."""
    return row["val_map"] if "val_map" in row else row["val_top1"]


def is_over(rows: Sequence[EpochEntry], patience: int | None) -> bool:
    """Whether the last epoch was measured, and is ``patience`` epochs or more behind the best one.

    >>> rows = [{"epoch": n, "val_top1": 0.5, "val_loss": n} for n in (1, 2, 3)]
    >>> is_over(rows, 2), is_over(rows, 3), is_over(rows, None)
    (True, False, False)
    """
    best = best_row(rows)
    if patience is None or best is None or _score(rows[-1]) is None:
        return False
    return rows[-1]["epoch"] - best["epoch"] >= patience


def state_of(model: nn.Module) -> State:
    """A copy of a model's weights and buffers in the memory of the CPU."""
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def check_state(state: State | None, rows: Sequence[EpochEntry], model: nn.Module) -> None:
    """Raise ValueError unless a checkpoint holds the best epoch's weights of this model, where an epoch was measured.

    >>> check_state(None, [], nn.Linear(2, 2))
    """
    if best_row(rows) is None:
        return
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    if state is None or {name: value.shape for name, value in state.items()} != shapes:
        raise ValueError("it does not hold the weights of the best epoch")


def kept_entry(config: TrainConfig, rows: Sequence[EpochEntry], split: str) -> KeptEpoch:
    """Which epoch's weights are saved, as JSON.

    >>> rows = [{"epoch": n, "val_top1": 0.5, "val_loss": n} for n in (1, 2, 3)]
    >>> entry = kept_entry(TrainConfig("birds", keep="best", epochs=9, patience=2), rows, "validation")
    >>> entry["epoch"], entry["trained"], entry["chosen_on"]
    (1, 3, 'validation')
    """
    best = best_row(rows)
    last = rows[-1]["epoch"]
    several = sum(_score(row) is not None for row in rows) > 1
    chosen = several and (config.keep == "best" or last < config.epochs)
    return {
        "keep": config.keep,
        "epoch": best["epoch"] if best and config.keep == "best" else last,
        "trained": last,
        "best": best and best["epoch"],
        "chosen_on": split if chosen else None,
    }


def kept_lines(kept: KeptEpoch, epochs: int) -> list[str]:
    """What is to be said of :func:`kept_entry`; nothing where the scores decided nothing."""
    lines = []
    if kept["trained"] < epochs:
        lines.append(f"note    stopped after epoch {kept['trained']} of {epochs}: epoch {kept['best']} was the best")
    if kept["keep"] == "best" and kept["best"] is None:
        lines.append("note    no epoch could be scored, so none is the best: the weights are those of the last one")
    if kept["chosen_on"]:
        lines.append(
            f"note    the weights are those of epoch {kept['epoch']}, which was chosen on the {kept['chosen_on']} "
            "images: the score on them is optimistic, so measure the model on others"
        )
    return lines
