"""Curves as SVG: where each line, mark and label goes. The page's style sheet gives the colors, light and dark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

WIDTH, HEIGHT = 460, 290
LEFT, RIGHT, TOP, BOTTOM = 52, 26, 12, 40  # of what is outside the axes
LABEL = 13  # the least distance of two labels, from base line to base line

#: Shapes of marks, as SVG paths around (0, 0). Runs differ in color, in shape and by the letter at a line's end.
SHAPES = (
    "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0z",
    "M-3.2 -3.2h6.4v6.4h-6.4z",
    "M0 -4.2L4 3h-8z",
    "M0 -4.6L4.6 0L0 4.6L-4.6 0z",
    "M0 4.2L4 -3h-8z",
    "M-1.3 -4.2h2.6v2.9h2.9v2.6h-2.9v2.9h-2.6v-2.9h-2.9v-2.6h2.9z",
    "M-4 -2.6h8v5.2h-8z",
)


@dataclass(frozen=True)
class Line:
    """A curve to draw: (x, y) points, sorted by x."""

    key: str  # of the run, its label; empty for none
    number: int  # of the run; it gives color and mark
    name: str  # in the description and the marks' tooltips
    points: tuple[tuple[float, float], ...]
    dashed: bool = False


@dataclass(frozen=True)
class Mark:
    """A point of a curve, where it is drawn, and what it says."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class PlacedLine:
    """A curve as it is drawn; its label stands at its end."""

    line: Line
    path: str
    marks: tuple[Mark, ...]
    label: tuple[float, float]


@dataclass(frozen=True)
class Chart:
    """All that the template needs."""

    name: str
    title: str
    description: str
    unit: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    lines: tuple[PlacedLine, ...]


def shape(number: int) -> str:
    """The mark of a run."""
    return SHAPES[number % len(SHAPES)]


def chart(
    name: str,
    title: str,
    lines: Sequence[Line],
    *,
    unit: str,
    epochs: tuple[float, float],
    limits: tuple[float, float] = (-math.inf, math.inf),
    digits: str = ".4g",
) -> Chart | None:
    """Lay curves over epochs out; None where there is no point.

    Args:
        name: of the chart's ids in the page.
        title: of the chart.
        lines: the curves; those without a point are left out.
        unit: of the y axis.
        epochs: the first and the last one of the x axis.
        limits: what the y axis does not go beyond.
        digits: the format of values in words.

    >>> line = Line("A", 0, "A, training", ((1, 2.0), (2, 1.0)))
    >>> found = chart("loss", "Loss", [line], unit="nats", epochs=(1, 2))
    >>> found.description
    'A, training: 2 in epoch 1, 1 in epoch 2.'
    >>> [round(x) for x, _ in found.x_ticks], found.y_ticks[0][1], found.y_ticks[-1][1]
    ([52, 434], '1', '2')
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    ys = [y for line in lines for _, y in line.points]
    x_values = _epoch_ticks(epochs[0], max(epochs[1], epochs[0] + 1))
    y_values = _ticks(min(ys), max(ys), limits)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_values[0]) / (x_values[-1] - x_values[0])
        up = (y - y_values[0]) / (y_values[-1] - y_values[0])
        return (
            round(LEFT + across * (WIDTH - LEFT - RIGHT), 2),
            round(HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 2),
        )

    drawn = []
    for line in lines:
        at = [place(*point) for point in line.points]
        texts = [f"{line.name}, epoch {x:g}: {y:{digits}}" for x, y in line.points]
        marks = tuple(Mark(*xy, text) for xy, text in zip(at, texts, strict=True))
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in at)
        drawn.append(PlacedLine(line, path, marks, (at[-1][0] + 8, at[-1][1] + 4)))
    return Chart(
        name,
        title,
        " ".join(_words(line, digits) for line in lines),
        unit,
        tuple((place(x, y_values[0])[0], f"{x:g}") for x in x_values),
        tuple((place(x_values[0], y)[1], f"{y:g}") for y in y_values),
        tuple(_apart(drawn)),
    )


def _ticks(low: float, high: float, limits: tuple[float, float]) -> list[float]:
    """Round values that hold the range between them, and stay within the limits, which are round themselves."""
    if high - low < 1e-6 * abs(high) or high == low:
        around = 0.02 * abs(high) or 1.0
        low, high = max(low - around, limits[0]), min(high + around, limits[1])
    from matplotlib.ticker import MaxNLocator

    values = MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10], min_n_ticks=2).tick_values(low, high)
    return [round(float(value), 12) for value in values if limits[0] <= value <= limits[1]]


def _epoch_ticks(first: float, last: float) -> list[float]:
    """The first epoch, the last one, and round ones between them."""
    from matplotlib.ticker import MaxNLocator

    values = MaxNLocator(nbins=8, integer=True).tick_values(first, last)
    step = float(values[1] - values[0])
    between = [float(value) for value in values if first + 0.4 * step < value < last - 0.4 * step]
    return [first, *between, last]


def _apart(lines: Sequence[PlacedLine]) -> list[PlacedLine]:
    """The same, with labels that would lie on each other moved up and down, within the axes if there is room."""
    found: list[PlacedLine] = []
    column: list[PlacedLine] = []  # whose labels stand above each other
    for one in [*sorted(lines, key=lambda one: one.label[0]), None]:
        if column and (one is None or one.label[0] - column[-1].label[0] >= LABEL):
            column.sort(key=lambda drawn: drawn.label[1])
            heights = _spread([drawn.label[1] for drawn in column], HEIGHT - BOTTOM + 4)
            found += [replace(drawn, label=(drawn.label[0], y)) for drawn, y in zip(column, heights, strict=True)]
            column = []
        if one is not None:
            column.append(one)
    return found


def _spread(heights: Sequence[float], lowest: float) -> list[float]:
    """Sorted heights, from the top down, `LABEL` apart or more; none below the lowest."""
    down = list(heights)
    for place in range(1, len(down)):
        down[place] = max(down[place], down[place - 1] + LABEL)
    down[-1] = min(down[-1], lowest)
    for place in reversed(range(len(down) - 1)):
        down[place] = min(down[place], down[place + 1] - LABEL)
    return [round(y, 2) for y in down]


def _words(line: Line, digits: str) -> str:
    (first, at_first), (last, at_last) = line.points[0], line.points[-1]
    end = f", {at_last:{digits}} in epoch {last:g}" if last != first else ""
    return f"{line.name}: {at_first:{digits}} in epoch {first:g}{end}."
