"""Which runs a comparison needs: tries that choose each arm's learning rate and epochs, then the runs that count."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ulsam.base.errors import UlsamError
from ulsam.study.arms import Arm
from ulsam.training.config import TrainConfig
from ulsam.training.parts import DIVERGED

HELD_OUT = 0.2  # of the training images, to choose on
TRIED_WITHIN = 0.01  # share of top-1: of a few hundred images, less is as likely chance
SPLIT_SEED = 0  # of what is held out: the same images for every arm; further seeds of the tries hold out others


@dataclass(frozen=True)
class Run:
    """One training run of a comparison."""

    arm: Arm
    # of its folder: choose-RATE-EPOCHS, with -seed-N for further seeds, then seed-N-RATE-EPOCHS; seed-N where nothing
    # is chosen
    name: str
    config: TrainConfig

    def __str__(self) -> str:
        return f"{self.arm.name}, {self.name}"

    @property
    def is_try(self) -> bool:
        """Whether it helps to choose; else its result counts."""
        return self.name.startswith("choose-")


@dataclass(frozen=True)
class Failed:
    """A run that ended without a result; the reason is the last line that it printed."""

    reason: str

    @property
    def diverged(self) -> bool:
        """Whether its loss was no longer finite; it would be so again."""
        return self.reason.startswith(DIVERGED)


#: What came of a run: its summary, a failure, or None where it has not ended yet.
OutcomeOf = Callable[[Run], Mapping[str, Any] | Failed | None]


@dataclass(frozen=True)
class Try:
    """A learning rate and a number of epochs, and what came of them on the images that are chosen on."""

    rate: float
    epochs: int
    top1: float | None  # share, the mean over seeds; None: a run failed, or has not ended
    failed: str | None = None  # why
    each: tuple[float, ...] = ()  # top-1 of each seed that has ended
    loss: float | None = None  # the mean cross-entropy of those seeds, nats

    @property
    def rank(self) -> tuple[float, float]:
        """The better try has the larger one: top-1, and where that is equal to the image, the lower loss."""
        return round(self.top1 or 0.0, 9), -math.inf if self.loss is None else -self.loss


@dataclass(frozen=True)
class Grid:
    """All arms, what they share, and what is tried.

    Each arm is tried with every rate at the first number of epochs, then with its best rate at the further numbers, and
    with those whose top-1 is ``tried_within`` of its own. Each try has ``tried_seeds`` seeds, which hold out other
    training images each, or are measured on ``choose_split``.
    The best mean top-1 is chosen; where two are equal, as happens on a few hundred images, the lower mean loss. With
    one rate and one number of epochs nothing is chosen.

    >>> grid = Grid((Arm.parse("base"), Arm.parse("remove 14")), TrainConfig("birds"), (0.01, 0.02), (4, 8), seeds=5)
    >>> grid.choosing, grid.size
    (True, 16)
    """

    arms: tuple[Arm, ...]
    shared: TrainConfig
    rates: tuple[float, ...] = ()  # none: that of the settings
    epochs: tuple[int, ...] = ()  # none: that of the settings
    seeds: int = 5
    tried_seeds: int = 1
    choose_split: str | None = None  # none: held-out training images
    tried_within: float = 0.0  # share of top-1 below the best rate

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise UlsamError(f"a comparison takes 1 seed or more, not {self.seeds}")
        if self.tried_seeds < 1:
            raise UlsamError(f"each rate is tried with 1 seed or more, not {self.tried_seeds}")
        if self.tried_seeds > 1 and not self.choosing:
            raise UlsamError("several seeds for each try, but nothing to try: give several learning rates or epochs")
        if self.choose_split is not None and not self.choosing:
            raise UlsamError(f"nothing to choose on {self.choose_split}: give several learning rates or epochs")
        if not 0 <= self.tried_within <= 1:
            raise UlsamError(f"`tried_within` must be 0 to 100 points of top-1, not {100 * self.tried_within:g}")
        for name, values in (("learning rate", self.rates), ("number of epochs", self.epochs)):
            if len(set(values)) < len(values):
                raise UlsamError(f"a {name} is given twice: {', '.join(f'{value:g}' for value in values)}")
        for arm in self.arms:
            for name, given in (("lr", self.rates), ("epochs", self.epochs)):
                if given and name in arm.settings:
                    raise UlsamError(f"the arm {arm.name!r} sets {name}, which is chosen for every arm: leave it out")
            for rate, epochs in self._combinations(arm):
                self._config(arm, rate, epochs)

    @property
    def choosing(self) -> bool:
        """Whether each arm has a learning rate and a number of epochs of its own, chosen among several."""
        return len(self.rates) > 1 or len(self.epochs) > 1

    @property
    def size(self) -> int:
        """The number of runs, without further epochs of rates that turn out close."""
        tries = max(1, len(self.rates)) + max(1, len(self.epochs)) - 1 if self.choosing else 0
        return len(self.arms) * (tries * self.tried_seeds + self.seeds)

    def due(self, outcome_of: OutcomeOf) -> list[Run]:
        """The runs that are known to be needed by now and have not ended; first those that choose, the base first."""
        return [run for run in self.known(outcome_of) if outcome_of(run) is None]

    def known(self, outcome_of: OutcomeOf) -> list[Run]:
        """All runs that are known to be needed by now, in the order in which they are to be done."""
        found = [run for arm in self.arms for run in self.tries(arm, outcome_of)]
        finals = [self.finals(arm, outcome_of) for arm in self.arms]
        return found + [runs[number] for number in range(self.seeds) for runs in finals if runs]

    def tries(self, arm: Arm, outcome_of: OutcomeOf) -> list[Run]:
        """The runs that choose, as far as they are known: the further ones need the results of the first ones."""
        return [run for runs in self._tries(arm, outcome_of) for run in runs]

    def tried(self, arm: Arm, outcome_of: OutcomeOf) -> list[Try]:
        """What came of the runs that choose, an entry for each rate and number of epochs."""
        return [_outcome(runs, outcome_of) for runs in self._tries(arm, outcome_of)]

    def chosen(self, arm: Arm, outcome_of: OutcomeOf) -> tuple[float, int] | None:
        """The learning rate and the epochs of the arm's final runs; None where they are not known, or no try succeeded.

        >>> grid = Grid((Arm.parse("base"), Arm.parse("lr=0.1")), TrainConfig("birds"))
        >>> [grid.chosen(arm, lambda run: None) for arm in grid.arms]
        [(0.01, 10), (0.1, 10)]
        """
        tried = self.tried(arm, outcome_of)
        if not tried:
            (rate,), (epochs,) = self._tried(arm)
            return rate, epochs
        best = _best(tried)
        return (best.rate, best.epochs) if best else None

    def finals(self, arm: Arm, outcome_of: OutcomeOf) -> list[Run]:
        """The arm's runs on all training images, one for each seed; empty where :meth:`chosen` is None."""
        chosen = self.chosen(arm, outcome_of)
        if chosen is None:
            return []
        rate, epochs = chosen
        runs = []
        for seed in range(self.shared.seed, self.shared.seed + self.seeds):
            name = f"seed-{seed}-{rate:g}-{epochs}" if self.choosing else f"seed-{seed}"  # another choice, another run
            runs.append(Run(arm, name, self._config(arm, rate, epochs, seed=seed)))
        return runs

    def to_json(self) -> dict[str, Any]:
        """As JSON; :meth:`from_json` reads it back.

        >>> grid = Grid((Arm.parse("base"), Arm.parse("remove 14")), TrainConfig("birds"), (0.01, 0.02))
        >>> Grid.from_json(grid.to_json()) == grid
        True
        """
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Grid":
        """Read :meth:`to_json`; settings that a later version added take their defaults.

        Raises:
            UlsamError: it is not that of a grid, or names a setting as an earlier version did.
        """
        if "close" in values:
            raise UlsamError(
                "the plan of a comparison of an earlier version: scripts/migrate_results.py renames its keys"
            )
        try:
            return cls(
                arms=tuple(Arm(arm["name"], tuple(arm["edits"]), arm["settings"]) for arm in values["arms"]),
                shared=TrainConfig.from_mapping(values["shared"]),
                rates=tuple(values["rates"]),
                epochs=tuple(values["epochs"]),
                seeds=values["seeds"],
                tried_seeds=values.get("tried_seeds", 1),
                choose_split=values.get("choose_split"),
                tried_within=values.get("tried_within", 0.0),
            )
        except (KeyError, TypeError) as error:
            raise UlsamError(f"not the plan of a comparison: {type(error).__name__} {error}") from error

    def _tried(self, arm: Arm) -> tuple[Sequence[float], Sequence[int]]:
        own = arm.config(self.shared)
        return self.rates or (own.lr,), self.epochs or (own.epochs,)

    def _combinations(self, arm: Arm) -> Iterator[tuple[float, int]]:
        own = {**dataclasses.asdict(self.shared), **arm.settings}
        for rate in self.rates or (own["lr"],):
            for epochs in self.epochs or (own["epochs"],):
                yield rate, epochs

    def _tries(self, arm: Arm, outcome_of: OutcomeOf) -> list[list[Run]]:
        """A list for each rate and number of epochs, with a run for each seed."""
        if not self.choosing:
            return []
        rates, epochs = self._tried(arm)
        first = [self._try(arm, rate, epochs[0]) for rate in rates]
        found = [_outcome(runs, outcome_of) for runs in first]
        best = _best(found)
        near = [entry.rate for entry in found if best and (entry is best or _behind(entry, best) < self.tried_within)]
        return first + [self._try(arm, rate, more) for more in epochs[1:] for rate in near]

    def _try(self, arm: Arm, rate: float, epochs: int) -> list[Run]:
        runs = []
        for number in range(self.tried_seeds):
            seed = self.shared.seed + number
            name = f"choose-{rate:g}-{epochs}" + (f"-seed-{seed}" if number else "")
            on: dict[str, Any] = {"val_split": self.choose_split}
            if self.choose_split is None:
                on |= {"val_fraction": HELD_OUT, "split_seed": SPLIT_SEED + number}
            runs.append(Run(arm, name, self._config(arm, rate, epochs, seed=seed, **on)))
        return runs

    def _config(self, arm: Arm, rate: float, epochs: int, **decided: Any) -> TrainConfig:
        usual = {"val_every": epochs, "split_seed": SPLIT_SEED}
        return arm.config(self.shared, lr=rate, epochs=epochs, **{**usual, **decided})


def at_the_edge(tries: Sequence[Try]) -> str | None:
    """``smallest`` or ``largest`` if that of the tried rates was the best one, so that others may be better still.

    None while a try has not ended.

    >>> at_the_edge([Try(0.01, 4, 0.5), Try(0.02, 4, 0.6), Try(0.02, 8, 0.7)])
    'largest'
    >>> at_the_edge([Try(0.01, 4, 0.5), Try(0.02, 4, 0.6), Try(0.04, 4, 0.3)])
    """
    rates = [entry.rate for entry in tries]
    ended = [entry for entry in tries if entry.top1 is not None]
    waiting = any(entry.top1 is None and entry.failed is None for entry in tries)
    if waiting or len(set(rates)) < 2 or not ended:
        return None
    best = max(ended, key=lambda entry: entry.rank).rate
    return "largest" if best == max(rates) else "smallest" if best == min(rates) else None


def close_call(tries: Sequence[Try]) -> tuple[Try, Try] | None:
    """A try that was chosen, and one with less loss and less than a point less top-1: chance may have chosen.

    Those of one number of epochs are compared: at the best one, where the last choice is made, or at a smaller one,
    where a rate was dropped. None while a try has not ended.

    >>> best, other = close_call([Try(0.01, 4, 0.595, loss=1.4), Try(0.02, 4, 0.6, loss=1.5)])
    >>> best.rate, other.rate
    (0.02, 0.01)
    >>> close_call([Try(0.01, 4, 0.595, loss=1.6), Try(0.02, 4, 0.6, loss=1.5)])
    >>> dropped = [Try(0.01, 4, 0.595, loss=1.4), Try(0.02, 4, 0.6, loss=1.5)]
    >>> [entry.rate for entry in close_call([*dropped, Try(0.02, 8, 0.7, loss=1.2)])]
    [0.02, 0.01]
    """
    best = _best(tries)
    if best is None:
        return None
    tried = {entry.rate for entry in tries if entry.epochs == best.epochs}
    found = []
    for epochs in {entry.epochs for entry in tries}:
        level = [entry for entry in tries if entry.epochs == epochs]
        first = _best(level)
        if first is None or first.loss is None:
            continue
        found += [
            (first, entry)
            for entry in level
            if entry.loss is not None and entry.loss < first.loss and _behind(entry, first) < TRIED_WITHIN
            if epochs == best.epochs or entry.rate not in tried
        ]
    return min(found, key=lambda pair: (-pair[0].epochs, pair[1].loss), default=None)


def longest_is_best(tries: Sequence[Try]) -> bool:
    """Whether, of several numbers of epochs, the largest was the best one, so that more may be better still.

    False while a try has not ended.

    >>> longest_is_best([Try(0.01, 4, 0.5), Try(0.02, 4, 0.6), Try(0.02, 8, 0.7)])
    True
    >>> longest_is_best([Try(0.01, 4, 0.5), Try(0.02, 4, 0.6)])
    False
    """
    epochs = {entry.epochs for entry in tries}
    best = _best(tries)
    return len(epochs) > 1 and best is not None and best.epochs == max(epochs)


def _outcome(runs: Sequence[Run], outcome_of: OutcomeOf) -> Try:
    """What came of the seeds of one rate and number of epochs."""
    config = runs[0].config
    found = [outcome_of(run) for run in runs]
    ended = [end["scores"] for end in found if end is not None and not isinstance(end, Failed)]
    each = tuple(float(scores["top1"]) for scores in ended)
    loss = statistics.fmean(scores["loss"] for scores in ended) if ended else None
    bad = next(((run, end.reason) for run, end in zip(runs, found, strict=True) if isinstance(end, Failed)), None)
    failed = bad and (f"seed {bad[0].config.seed}: {bad[1]}" if len(runs) > 1 else bad[1])
    mean = statistics.fmean(each) if len(each) == len(runs) else None
    return Try(config.lr, config.epochs, mean, failed, each, loss)


def _behind(entry: Try, best: Try) -> float:
    """How much top-1 the try has less than the best one; infinite where a run failed."""
    return math.inf if entry.top1 is None else round(best.rank[0] - entry.rank[0], 9)


def _best(tries: Sequence[Try]) -> Try | None:
    """The try with the highest rank; None where one has not ended, or all failed."""
    if any(entry.top1 is None and entry.failed is None for entry in tries):
        return None
    return max((entry for entry in tries if entry.top1 is not None), key=lambda entry: entry.rank, default=None)
