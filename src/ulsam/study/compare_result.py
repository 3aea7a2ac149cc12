"""The types of what a comparison returns and ``compare.json`` holds: plain dicts of JSON values, with known keys."""

from typing import Any, TypedDict

from ulsam.study.statistics import Over, Word


class TryEntry(TypedDict):
    """A learning rate and a number of epochs that were tried for an arm.

    Attributes:
        lr: the learning rate.
        epochs: how many.
        top1: share 0..1, the mean over seeds; None where a run failed or has not ended.
        each: top-1 of each seed that has ended.
        loss: mean cross-entropy of those seeds in nats; None where none has ended.
        failed: why; None if it did not fail.
    """

    lr: float
    epochs: int
    top1: float | None
    each: list[float]
    loss: float | None
    failed: str | None


class LatencyEntry(TypedDict):
    """The time of one image.

    Attributes:
        seconds: the median.
        ratio: to the first arm's time, the median over turns.
        ratio_quartiles: the lower and the upper one.
        turns: how often it was timed.
    """

    seconds: float
    ratio: float
    ratio_quartiles: list[float]
    turns: int


class DifferenceEntry(TypedDict):
    """The top-1 of one arm minus that of another, as shares: 0.01 is one point.

    Attributes:
        arm, minus: names of the two arms.
        mean: over common seeds and images.
        low, high: the ends of the 95 % interval; None where there is nothing to take it over.
        over: what the interval is over.
        seeds: that both arms have.
        of_seeds: the difference with each of them.
        differ: images that one model got right and the other wrong, with any seed; None where this is not known.
        verdict: in words, such as "gain" or "inconclusive".
    """

    arm: str
    minus: str
    mean: float
    low: float | None
    high: float | None
    over: Over
    seeds: list[int]
    of_seeds: list[float]
    differ: int | None
    verdict: list[Word]


class ArmCost(TypedDict, total=False):
    """The cost of an arm's model, as `ulsam.training.train_summary.CostEntry`; empty without a finished run."""

    params: int
    macs: int
    activations: int
    input_size: list[int]
    rule: str


class FailedRun(TypedDict):
    """The name of a run that failed, and the last line that it printed."""

    run: str
    reason: str


class ArmResult(TypedDict):
    """One arm.

    Attributes:
        name: of the arm.
        folder: where its runs are, in ``arms``.
        edits: in the order in which they are applied.
        settings: what is its own.
        lr, epochs: of its runs; None while they are not chosen.
        tries: what they were chosen from; empty where nothing is chosen.
        seeds: of the runs that are finished.
        top1: of each of them, shares 0..1.
        top1_mean: None without a finished run.
        top1_sd: the standard deviation over seeds; None with fewer than two.
        cost: of its model; empty without a finished run.
        latency: None where it was not timed.
        failed: runs that failed.
        missing: how many runs are still to come.
        minus_base: the difference from the first arm; None of the first arm, or where no seed is common.
    """

    name: str
    folder: str
    edits: list[str]
    settings: dict[str, Any]
    lr: float | None
    epochs: int | None
    tries: list[TryEntry]
    seeds: list[int]
    top1: list[float]
    top1_mean: float | None
    top1_sd: float | None
    cost: ArmCost
    latency: LatencyEntry | None
    failed: list[FailedRun]
    missing: int
    minus_base: DifferenceEntry | None


class CompareResult(TypedDict):
    """What `ulsam.compare` returns, and ``compare.json`` holds.

    Attributes:
        what: one line about it.
        command: that made the runs.
        margin: share of top-1 that an arm may lose and still be non-inferior.
        seeds: how many there are to be.
        chosen_on: the split that learning rates and epochs were chosen on; None where nothing was chosen.
        split: the images that the runs were measured on, and ``images`` how many; None without a finished run.
        finished: whether no run is still to come.
        arms: each arm, the base first.
        seed_sd: the standard deviation of a model's top-1 over seeds, pooled over the arms; None with too few runs.
        differences: of every two arms that have common seeds.
        notes: what a reader must know.
        versions: of each package, all that runs were made with.
        processor, threads: that latencies were measured with; None where they were not.
    """

    what: str
    command: str
    margin: float
    seeds: int
    chosen_on: str | None
    split: str | None
    images: int | None
    finished: bool
    arms: list[ArmResult]
    seed_sd: float | None
    differences: list[DifferenceEntry]
    notes: list[str]
    versions: dict[str, list[str]]
    processor: str | None
    threads: str | None
