"""How much two runs differ in top-1 on the same images, and how sure that is."""

from collections.abc import Sequence
from dataclasses import dataclass

from ulsam.base.errors import UlsamError
from ulsam.explanation.trained_runs import TrainedRun
from ulsam.study.statistics import Difference, difference, right


@dataclass(frozen=True)
class Paired:
    """One run minus another."""

    run: TrainedRun
    minus: TrainedRun
    gap: Difference | None  # None: they cannot be paired
    why_not: str = ""
    only_run: int | None = None  # images that it alone has right; None: not known
    only_minus: int | None = None


def differences(runs: Sequence[TrainedRun]) -> list[Paired]:
    """Every finished run minus each one before it; those minus the first run come first."""
    finished = [run for run in runs if run.result]
    pairs = [(run, other) for number, run in enumerate(finished) for other in finished[:number]]
    return [_paired(run, other) for run, other in sorted(pairs, key=lambda pair: pair[1] is not finished[0])]


def _paired(run: TrainedRun, minus: TrainedRun) -> Paired:
    assert run.result and minus.result
    ours, theirs = run.result.summary, minus.result.summary
    if run.result.spec.classes != minus.result.spec.classes:
        return Paired(run, minus, None, "their classes are in another order")
    try:
        gap = difference({0: ours}, {0: theirs})
    except UlsamError as error:
        return Paired(run, minus, None, str(error))
    if gap is None or gap.differ is None:
        return Paired(run, minus, gap)
    one, other = right(ours), right(theirs)
    return Paired(run, minus, gap, "", int((one > other).sum()), int((other > one).sum()))
