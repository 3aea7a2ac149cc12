"""The interval over seeds and images against naive loops, special cases, and simulated experiments."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import t as student

from ulsam.base.errors import UlsamError
from ulsam.study.statistics import Difference, crossed_interval, difference, pooled_seed_variance, right
from ulsam.study.student_t import t_quantile


def summary(hits: Any, names: str = "same", split: str = "test") -> dict[str, Any]:
    """A run's summary as training writes it: the parts that count here."""
    hits = [int(hit) for hit in hits]
    packed = np.packbits(np.array(hits, dtype=np.uint8)).tobytes().hex()
    return {
        "split": split,
        "scores": {"top1": sum(hits) / len(hits), "images": len(hits)},
        "outcomes": {"images": len(hits), "right": packed, "names": names},
    }


@given(st.floats(1e-4, 0.45), st.floats(-1, 5))
def test_quantiles_are_those_of_scipy(tail: float, digits: float) -> None:
    assert t_quantile(tail, 10**digits) == pytest.approx(student.isf(tail, 10**digits), rel=1e-9)


@given(st.integers(2, 5), st.integers(2, 9), st.integers(0, 999))
@settings(max_examples=80, deadline=None)
def test_the_interval_equals_a_naive_double_loop(rows: int, columns: int, seed: int) -> None:
    matrix = np.random.default_rng(seed).integers(-1, 2, (rows, columns)).tolist()
    mean = sum(sum(row) for row in matrix) / rows / columns
    row_means = [sum(row) / columns for row in matrix]
    column_means = [sum(row[j] for row in matrix) / rows for j in range(columns)]
    ms_rows = sum(columns * (m - mean) ** 2 for m in row_means) / (rows - 1)
    ms_columns = sum(rows * (m - mean) ** 2 for m in column_means) / (columns - 1)
    ms_rest = 0.0
    for i in range(rows):
        for j in range(columns):
            ms_rest += (matrix[i][j] - row_means[i] - column_means[j] + mean) ** 2
    ms_rest /= (rows - 1) * (columns - 1)
    best, freedom = max((ms_rows, rows - 1), (ms_columns, columns - 1))
    both = ms_rows + ms_columns - ms_rest
    # Where two of these are equal, rounding decides which one's degrees of freedom count.
    assume(abs(both - best) > 1e-9)
    assume(both > best or abs(ms_rows - ms_columns) > 1e-9)
    if both > best:
        parts = ms_rows**2 / (rows - 1) + ms_columns**2 / (columns - 1) + ms_rest**2 / ((rows - 1) * (columns - 1))
        best, freedom = both, both**2 / parts
    half = student.ppf(0.975, freedom) * math.sqrt(best / rows / columns)
    assert crossed_interval(np.array(matrix)) == pytest.approx((mean, mean - half, mean + half), abs=1e-9)


def test_one_seed_is_the_paired_t_interval_over_images() -> None:
    values = np.random.default_rng(0).integers(-1, 2, 50)
    spread = values.std(ddof=1) / math.sqrt(50)
    low, high = student.interval(0.95, 49, values.mean(), spread)
    assert crossed_interval(values[None]) == pytest.approx((values.mean(), low, high))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("of_seeds", "of_images"),
    [pytest.param(0.0, 0.3, marks=pytest.mark.slow), (0.02, 0.2), pytest.param(0.05, 0.0, marks=pytest.mark.slow)],
)
def test_95_of_100_intervals_hold_the_true_difference(of_seeds: float, of_images: float) -> None:
    """5 seeds and 400 images, drawn anew each time; the true difference is 0.02."""
    random = np.random.default_rng(7)
    held, rounds, too_narrow = 0, 1500, 0
    for _ in range(rounds):
        shift = 0.02 + random.normal(0, of_seeds, (5, 1)) + random.normal(0, of_images, (1, 400))
        matrix = shift + random.normal(0, 0.4, (5, 400))
        _, low, high = crossed_interval(matrix)
        held += low <= 0.02 <= high
        half = 1.96 * matrix.std() / math.sqrt(matrix.size)  # as if all 2000 values were independent
        too_narrow += abs(matrix.mean() - 0.02) <= half
    assert 0.935 <= held / rounds <= 0.985
    if of_seeds:
        assert too_narrow / rounds < 0.9


def test_of_two_arms_the_pooled_variance_is_that_of_their_difference() -> None:
    random = np.random.default_rng(5)
    runs, base = ({seed: summary(random.random(40) < share) for seed in range(4)} for share in (0.6, 0.5))
    pooled = pooled_seed_variance(
        {seed: run["scores"]["top1"] for seed, run in found.items()} for found in (runs, base)
    )
    own, same = difference(runs, base), difference(runs, base, pooled)
    assert own is not None and same is not None and pooled is not None
    assert pooled.freedom == 3
    assert (same.low, same.high) == pytest.approx((own.low, own.high))


@pytest.mark.slow
def test_pooling_over_arms_keeps_the_coverage_and_steadies_the_widths() -> None:
    """8 arms, 3 seeds and 300 images, drawn anew each time; what a seed does to all arms is in no difference."""
    random = np.random.default_rng(11)
    rounds, held = 600, np.zeros(2)
    widths: list[tuple[float, float]] = []
    for _ in range(rounds):
        shift = random.normal(0, 0.02, (8, 3, 1)) + random.normal(0, 0.05, (1, 3, 1))
        arms = 0.7 + shift + random.normal(0, 0.2, (8, 1, 300)) + random.normal(0, 0.3, (8, 3, 300))
        pooled = pooled_seed_variance(dict(enumerate(values.mean(1))) for values in arms)
        found = [crossed_interval(arms[1] - arms[0], pooled=chosen) for chosen in (None, pooled)]
        held += [low <= 0 <= high for _, low, high in found]
        widths.append((found[0][2] - found[0][1], found[1][2] - found[1][1]))
    own, steady = np.std(widths, axis=0) / np.mean(widths, axis=0)
    assert 0.93 <= held[1] / rounds <= 0.985
    assert steady < 0.5 * own


def test_a_common_luck_of_the_seed_is_not_mistaken_for_certainty() -> None:
    """Every image agrees, but the seeds do not: the interval is that of the seeds."""
    shifts = np.array([0.03, -0.01, 0.02, 0.00, 0.01])
    matrix = np.repeat(shifts[:, None], 1000, axis=1)
    expected = student.interval(0.95, 4, 0.01, shifts.std(ddof=1) / math.sqrt(5))
    assert crossed_interval(matrix)[1:] == pytest.approx(expected)


def test_the_difference_pairs_by_seed_and_image() -> None:
    random = np.random.default_rng(3)
    hits = {seed: random.random((2, 30)) < 0.6 for seed in range(4)}
    runs = {seed: summary(both[0]) for seed, both in hits.items()}
    base = {seed: summary(both[1]) for seed, both in hits.items() if seed != 2}  # one run failed
    found = difference(runs, base)
    assert found is not None
    assert (found.seeds, found.over) == ((0, 1, 3), "seeds and images")
    matrix = np.stack([hits[seed][0].astype(int) - hits[seed][1] for seed in (0, 1, 3)])
    assert (found.mean, found.low, found.high) == pytest.approx(crossed_interval(matrix))
    assert found.of_seeds == pytest.approx(matrix.mean(axis=1))
    assert right(runs[0]).tolist() == hits[0][0].astype(int).tolist()


def test_what_is_missing_narrows_what_the_interval_is_over() -> None:
    runs, base = {0: summary([1, 1, 0, 1])}, {0: summary([1, 0, 0, 1])}
    assert difference(runs, base).over == "images"  # type: ignore[union-attr]
    streams = [{**run[0], "outcomes": None} for run in (runs, base)]
    alone = difference({0: streams[0]}, {0: streams[1]})
    assert alone is not None and (alone.over, alone.low, alone.words()) == ("nothing", None, ("inconclusive",))
    both = difference({0: streams[0], 1: streams[1]}, {0: streams[1], 1: streams[1]})
    assert both is not None and both.over == "seeds"
    expected = student.interval(0.95, 1, 0.125, np.std([0.25, 0.0], ddof=1) / math.sqrt(2))
    assert (both.low, both.high) == pytest.approx(expected)
    assert difference(runs, {1: base[0]}) is None


@pytest.mark.parametrize(
    ("other", "word"),
    [
        (summary([1, 0, 1, 1], names="others"), "names"),
        (summary([1, 0, 1], names="same"), "number"),
        (summary([1, 0, 1, 1], split="val"), "split"),
    ],
)
def test_different_images_are_not_paired(other: dict[str, Any], word: str) -> None:
    with pytest.raises(UlsamError, match=f"different images.*{word}"):
        difference({0: summary([1, 1, 0, 1])}, {0: other})


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.001, 0.02, ("gain", "non-inferior")),
        (0.0, 0.02, ("non-inferior",)),
        (-0.004, 0.02, ("non-inferior",)),
        (-0.004, -0.001, ("loss", "non-inferior")),
        (-0.005, 0.02, ("inconclusive",)),
        (-0.02, -0.001, ("loss",)),
    ],
)
def test_verdicts(low: float, high: float, words: tuple[str, ...]) -> None:
    middle = (low + high) / 2
    found = Difference(middle, low, high, "seeds and images", (0, 1), (middle, middle), 10)
    assert found.words() == words
    one = Difference(middle, low, high, "images", (0,), (middle,), 10)
    assert one.words() == tuple(f"{word} (one seed)" if word in ("gain", "loss") else word for word in words)
    assert ("non-inferior" in found.words(margin=0.03)) is True


def test_no_verdict_from_a_handful_of_images() -> None:
    """9 images of 1000 that one model alone gets right, with both seeds, are a tight interval above 0: no verdict."""
    base = {seed: summary([0] * 1000) for seed in range(2)}
    for count, words in ((9, ("inconclusive",)), (10, ("gain", "non-inferior"))):
        found = difference({seed: summary([1] * count + [0] * (1000 - count)) for seed in range(2)}, base)
        assert found is not None and found.low is not None
        assert (found.differ, found.low > 0, found.words()) == (count, True, words)
    moving = {seed: summary([index // 6 == seed for index in range(12)] + [0] * 988) for seed in range(2)}
    assert difference(moving, base).differ == 12  # type: ignore[union-attr]
