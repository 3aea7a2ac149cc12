"""The charts and the confused pairs of the page about runs."""

import random
from pathlib import Path

import pytest

from ulsam.explanation.confusions import choose_samples, class_rows, confusion, most_confused
from ulsam.explanation.run_measured import Measured, RunPrediction
from ulsam.explanation.svg_charts import BOTTOM, HEIGHT, LABEL, LEFT, RIGHT, TOP, WIDTH, Line, chart
from ulsam.explanation.trained_runs import TrainedRun
from ulsam.training.config import TrainConfig

# ------------------------------------------------------------------------------------------ parts


def made_up(number: int, named: dict[str, tuple[str, str, float]]) -> Measured:
    run = TrainedRun(Path("x"), number, "x", TrainConfig(data="x"), (), None)
    guesses = {key: RunPrediction(n, key, *each) for n, (key, each) in enumerate(named.items())}
    return Measured(run, None, guesses, 0, None)  # type: ignore[arg-type]


def test_confused_pairs_are_counted_over_runs_and_both_ways() -> None:
    draw = random.Random(0)
    classes = [f"class {n}" for n in range(6)]
    truths = {f"{n}.jpg": draw.choice(classes) for n in range(200)}
    runs = [
        made_up(number, {key: (truth, draw.choice([truth, *classes]), draw.random()) for key, truth in truths.items()})
        for number in range(3)
    ]
    found = most_confused(runs, pairs=5, images=4)
    naive = {
        (a, b): sum(
            {one.truth, one.named} == {a, b} for run in runs for one in run.guesses.values() if one.truth != one.named
        )
        for a in classes for b in classes if a < b
    }  # fmt: skip
    assert [pair.total for pair in found] == sorted(naive.values(), reverse=True)[:5]
    for pair in found:
        a, b = pair.classes
        assert pair.total == naive[a, b]
        for run in runs:
            assert pair.counts[run.run.key] == (confusion(run)[a, b], confusion(run)[b, a])
        shares = [max(g.share for g in one.guesses.values() if {g.truth, g.named} == {a, b}) for one in pair.errors]
        assert shares == sorted(shares, reverse=True) and len(shares) == 4
        for one in pair.errors:
            assert any({guess.truth, guess.named} == {a, b} for guess in one.guesses.values())
        for one in pair.right:
            assert one.truth in (a, b) and all(guess.right for guess in one.guesses.values())
    chosen = choose_samples(runs, errors=3, right=3)
    assert len({one.image for one in chosen}) == 6
    for run, one in zip(runs, chosen, strict=False):
        surest = max(guess.share for guess in run.guesses.values() if not guess.right)
        assert one.guesses[run.run.key].share == surest or one in chosen[:3]
    assert all(guess.right for one in chosen[3:] for guess in one.guesses.values())
    assert most_confused([]) == [] and choose_samples([]) == [] and class_rows([], []) == []


def test_charts_put_points_where_their_values_are() -> None:
    points = tuple((epoch, 3.0 / epoch) for epoch in range(1, 9))
    one = chart("loss", "Loss", [Line("A", 0, "a", points)], unit="nats", epochs=(1, 10))
    assert one
    (line,) = one.lines
    ticks = [(at, float(text)) for at, text in one.y_ticks]
    (y0, v0), (y1, v1) = ticks[0], ticks[-1]
    assert v0 <= 3 / 8 and v1 >= 3 and y0 == HEIGHT - BOTTOM and y1 == TOP
    for (epoch, value), mark in zip(points, line.marks, strict=True):
        assert mark.x == pytest.approx(LEFT + (epoch - 1) / 9 * (WIDTH - LEFT - RIGHT), abs=0.01)
        assert mark.y == pytest.approx(y0 + (value - v0) / (v1 - v0) * (y1 - y0), abs=0.01)
    assert (one.x_ticks[0][1], one.x_ticks[-1][1]) == ("1", "10")
    for at, value in ticks:
        assert at == pytest.approx(y0 + (value - v0) / (v1 - v0) * (y1 - y0), abs=0.01)


@pytest.mark.parametrize("values", [[50.0], [100.0] * 3, [0.0, 0.0], [99.9, 100.0], [0.0, 100.0], [88.6, 97.3]])
def test_charts_stay_within_their_limits(values: list[float]) -> None:
    line = Line("A", 0, "a", tuple(enumerate(values, start=1)))
    one = chart("x", "X", [line, Line("B", 1, "b", line.points)], unit="%", epochs=(1, len(values)), limits=(0, 100))
    assert one
    shown = [float(text) for _, text in one.y_ticks]
    assert shown == sorted(set(shown)) and len(shown) >= 2
    assert 0 <= shown[0] <= min(values) and max(values) <= shown[-1] <= 100
    for drawn in one.lines:
        assert all(LEFT <= mark.x <= WIDTH - RIGHT and TOP <= mark.y <= HEIGHT - BOTTOM for mark in drawn.marks)
    first, second = (drawn.label for drawn in one.lines)
    assert first != second and abs(first[1] - second[1]) >= LABEL


def test_labels_of_many_runs_do_not_lie_on_each_other() -> None:
    lines = [Line("ABCDEFGH"[n], n, "x", ((1, 1.0), (2 + n % 2 * 7, 0.1 * (n // 4)))) for n in range(8)]
    one = chart("x", "X", lines, unit="%", epochs=(1, 9), limits=(0, 100))
    assert one and sorted(drawn.line.key for drawn in one.lines) == list("ABCDEFGH")
    labels = [drawn.label for drawn in one.lines]
    for place, (x, y) in enumerate(labels):
        assert y <= HEIGHT - BOTTOM + 4
        assert all(abs(x - other_x) >= LABEL or abs(y - other_y) >= LABEL for other_x, other_y in labels[:place])


def test_no_points_no_chart() -> None:
    assert chart("x", "X", [Line("A", 0, "a", ())], unit="%", epochs=(1, 2)) is None
