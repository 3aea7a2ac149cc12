"""How sure a difference between two models is, over the choice of seeds and of images.

Each model is trained with several seeds, and each run is measured on the same images. So the differences form a matrix,
a row a seed and a column an image, of which both rows and columns are samples: other seeds and other images would
have given other figures. The standard error of its mean is that of the two-way random-effects layout without
replication (Searle, Casella and McCulloch, Variance Components, 1992, chapter 4; Owen 2007, "The pigeonhole bootstrap",
https://doi.org/10.1214/07-AOAS122, on why one of the two alone is too small); its degrees of freedom are those of
Satterthwaite (1946, https://doi.org/10.2307/3002019).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ulsam.base.errors import UlsamError
from ulsam.study.student_t import t_quantile

Over = Literal["seeds and images", "images", "seeds", "nothing"]
Word = Literal["gain", "gain (one seed)", "non-inferior", "loss", "loss (one seed)", "inconclusive"]

MIN_IMAGES = 10  # on which two models must differ for a verdict: an interval from fewer is no good one


@dataclass(frozen=True)
class Difference:
    """One model's top-1 minus another's, as shares (0.01 is one point), with its 95 % interval."""

    mean: float
    low: float | None  # None where there is nothing to take an interval over
    high: float | None
    over: Over  # what the interval is over
    seeds: tuple[int, ...]  # that both models have
    of_seeds: tuple[float, ...]  # the difference with each seed
    differ: int | None = None  # images that one model got right and the other wrong, with any seed

    def words(self, margin: float = 0.005) -> tuple[Word, ...]:
        """The verdict: ``gain`` or ``loss`` where 0 is outside, ``non-inferior`` with a lower end above -``margin``.

        It is ``inconclusive`` where none of them is true, or the models differ on fewer than 10 images.

        >>> Difference(0.02, 0.01, 0.03, "seeds and images", (0, 1), (0.02, 0.02), 45).words()
        ('gain', 'non-inferior')
        >>> Difference(0.02, 0.01, 0.03, "images", (0,), (0.02,), 45).words()
        ('gain (one seed)', 'non-inferior')
        >>> Difference(0.02, 0.01, 0.03, "images", (0,), (0.02,), 9).words()
        ('inconclusive',)
        """
        few = self.differ is not None and self.differ < MIN_IMAGES
        if self.low is None or self.high is None or few:
            return ("inconclusive",)
        gain: Word = "gain" if len(self.seeds) > 1 else "gain (one seed)"
        loss: Word = "loss" if len(self.seeds) > 1 else "loss (one seed)"
        true: dict[Word, bool] = {gain: self.low > 0, loss: self.high < 0, "non-inferior": self.low > -margin}
        return tuple(word for word, is_true in true.items() if is_true) or ("inconclusive",)


@dataclass(frozen=True)
class SeedVariance:
    """The variance of a model's top-1 over seeds, pooled over the arms of a comparison, and its degrees of freedom."""

    variance: float
    freedom: int


def pooled_seed_variance(top1: Iterable[Mapping[int, float]]) -> SeedVariance | None:
    """The variance over seeds that is left when each arm's mean and what a seed does to all arms are taken off.

    A handful of seeds says little about the variance of one difference: intervals from it alone hold the truth as often
    as they should, but some are far too wide and others far too narrow. With two arms it is that of their difference.

    Args:
        top1: of each arm, by seed; arms without the seeds that the others have are left out.

    Returns:
        None with fewer than two arms or seeds.

    >>> pooled_seed_variance([{0: 0.5, 1: 0.6}, {0: 0.7, 1: 0.7}, {0: 0.9}])
    SeedVariance(variance=0.0025, freedom=1)
    """
    arms = list(top1)
    seeds = max((sorted(arm) for arm in arms), key=len, default=[])
    values = np.array([[arm[seed] for seed in seeds] for arm in arms if arm.keys() == set(seeds)])
    freedom = (len(values) - 1) * (len(seeds) - 1)
    if freedom < 1:
        return None
    rest = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
    return SeedVariance(round(float((rest**2).sum()) / freedom, 15), freedom)


def crossed_interval(
    differences: NDArray[Any], level: float = 0.95, pooled: SeedVariance | None = None
) -> tuple[float, float, float]:
    """The mean of a matrix of differences and its confidence interval, over both rows and columns.

    With mean squares MS of rows, columns and residual, the variance of the mean is (MS_rows + MS_columns -
    MS_residual) / (rows * columns), but never less than what either the rows or the columns alone give. One row
    leaves an interval over the columns alone.

    Args:
        differences: [seeds, images], two images or more.
        level: of confidence.
        pooled: gives the mean square of the rows, in place of these rows' own.

    Returns:
        mean, low, high.

    >>> mean, low, high = crossed_interval(np.array([[1, 0, 0, 0], [1, 0, 0, -1]]))
    >>> mean, bool(low < mean < high)
    (0.125, True)
    """
    values = np.asarray(differences, dtype=np.float64)
    rows, columns = values.shape
    mean = float(values.mean())
    of_rows, of_columns = values.mean(axis=1), values.mean(axis=0)
    ms_columns = rows * float(((of_columns - mean) ** 2).sum()) / (columns - 1)
    terms = [(ms_columns, columns - 1)]  # mean square, degrees of freedom
    if rows > 1:
        ms_rows, freedom_rows = columns * float(((of_rows - mean) ** 2).sum()) / (rows - 1), rows - 1
        if pooled is not None:  # a difference has the variance of two models
            ms_rows, freedom_rows = columns * 2 * pooled.variance, pooled.freedom
        residual = values - of_rows[:, None] - of_columns + mean
        ms_residual = float((residual**2).sum()) / ((rows - 1) * (columns - 1))
        terms.append((ms_rows, freedom_rows))
        both = ms_rows + ms_columns - ms_residual
        if both > max(ms_rows, ms_columns):
            squares = ms_rows**2 / freedom_rows + ms_columns**2 / (columns - 1)
            squares += ms_residual**2 / ((rows - 1) * (columns - 1))
            terms = [(both, both**2 / squares)]
    square, freedom = max(terms)
    half = t_quantile((1 - level) / 2, freedom) * math.sqrt(square / (rows * columns))
    return mean, mean - half, mean + half


def difference(
    runs: Mapping[int, Mapping[str, Any]], base: Mapping[int, Mapping[str, Any]], pooled: SeedVariance | None = None
) -> Difference | None:
    """One model's runs minus another's, paired by seed and, where the runs say it, by image.

    Args:
        runs, base: the summaries of `ulsam.training.train.train`, by seed.
        pooled: the variance over seeds of all arms that are compared; by default that of this difference.

    Returns:
        The difference over the seeds that both have; None without one.

    Raises:
        UlsamError: the runs were measured on different images.

    >>> def run(top1): return {"scores": {"top1": top1, "images": 100}, "split": "test", "outcomes": None}
    >>> difference({0: run(0.5), 1: run(0.7)}, {0: run(0.4), 1: run(0.6)}).over
    'seeds'
    """
    seeds = tuple(sorted(runs.keys() & base.keys()))
    if not seeds:
        return None
    check_paired([*(runs[seed] for seed in seeds), *(base[seed] for seed in seeds)])
    of_seeds = [runs[seed]["scores"]["top1"] - base[seed]["scores"]["top1"] for seed in seeds]
    mean = sum(of_seeds) / len(of_seeds)
    by_image = all(found[seed].get("outcomes") for found in (runs, base) for seed in seeds)
    low: float | None
    high: float | None
    differ: int | None = None
    if by_image and runs[seeds[0]]["outcomes"]["images"] > 1:
        matrix = np.stack([right(runs[seed]).astype(np.int8) - right(base[seed]).astype(np.int8) for seed in seeds])
        mean, low, high = crossed_interval(matrix, pooled=pooled)
        differ = int(matrix.any(axis=0).sum())
        over: Over = "seeds and images" if len(seeds) > 1 else "images"
    elif len(seeds) > 1:
        spread = pooled or SeedVariance(float(np.var(of_seeds, ddof=1)) / 2, len(seeds) - 1)
        half = t_quantile(0.025, spread.freedom) * math.sqrt(2 * spread.variance / len(seeds))
        low, high, over = mean - half, mean + half, "seeds"
    else:
        low, high, over = None, None, "nothing"
    return Difference(mean, low, high, over, seeds, tuple(of_seeds), differ)


def right(run: Mapping[str, Any]) -> NDArray[np.uint8]:
    """Which images a run got right, [images] of 0 and 1; see `ulsam.training.evaluate.outcomes`.

    >>> right({"outcomes": {"images": 5, "right": "c8", "names": ""}})
    array([1, 1, 0, 0, 1], dtype=uint8)
    """
    entry = run["outcomes"]
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(entry["right"]), dtype=np.uint8))
    return bits[: entry["images"]]


def check_paired(runs: Sequence[Mapping[str, Any]]) -> None:
    """Raise unless all runs were measured on the same images.

    Raises:
        UlsamError: the split, the number or the names of the images differ.
    """
    first = runs[0]
    for run in runs[1:]:
        for what, one, other in [
            ("split", first["split"], run["split"]),
            ("number", first["scores"]["images"], run["scores"]["images"]),
            ("names", *((entry.get("outcomes") or {}).get("names") for entry in (first, run))),
        ]:
            if one != other and None not in (one, other):
                raise UlsamError(
                    f"runs that were measured on different images cannot be compared: their {what} differs"
                    + ("" if what == "names" else f", {one} and {other}")
                )
