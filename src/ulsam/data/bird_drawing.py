"""How one bird is drawn: its field marks, and everything else at random.

The bird has its own coordinates: x towards the bill, y down, the body about one unit long around the origin. They are
turned, mirrored, scaled and moved onto a canvas three times as large as the image, which is averaged down at the end.
"""

import colorsys
import dataclasses
import math
import random
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Spots = Literal["coarse", "fine", "none"]
Bill = Literal["short", "long", "hooked"]
Tail = Literal["square", "forked"]
Box = tuple[int, int, int, int]
"""(x0, y0, x1, y1) in pixels, x1 and y1 just outside."""

_Points = NDArray[np.float64]  # [n, 2]
_Color = tuple[int, int, int]
_Range = tuple[float, float]

_OVERSAMPLE = 3
_SCALE = (0.53, 0.61)  # one body length as a part of the image's side
_REACH = ((-0.70, -0.46), (1.00, 0.46))  # opposite corners around any bird, whatever its marks
_SHOULDER, _WING_TIP, _WING_WIDTH = np.array((0.16, -0.12)), np.array((-0.62, 0.02)), 0.17
_BARRED, _BAR_CENTRE = 0.40, 0.36  # length of wing under bars and gaps; their middle as a part of the wing
_BREAST, _BREAST_RADII, _BREAST_TILT = (0.21, 0.07), (0.24, 0.19), -0.45
_SPOTS = {"coarse": (6, 0.15), "fine": (24, 0.075)}  # how many, and from one to the next: the same area in all
_EYE, _EYE_RADIUS, _RING_RADIUS = (0.45, -0.30), 0.036, 0.068
_BILLS = {
    "short": ((0.50, -0.39), (0.71, -0.25), (0.50, -0.13)),
    "long": ((0.50, -0.43), (0.72, -0.37), (1.00, -0.24), (0.72, -0.16), (0.50, -0.11)),
    "hooked": ((0.50, -0.42), (0.68, -0.40), (0.79, -0.34), (0.85, -0.22), (0.82, -0.07), (0.73, -0.21), (0.50, -0.15)),
}
_TAILS = {
    "square": ((-0.38, -0.06), (-0.70, 0.03), (-0.68, 0.19), (-0.36, 0.12)),
    "forked": ((-0.38, -0.06), (-0.70, -0.02), (-0.52, 0.10), (-0.68, 0.24), (-0.36, 0.12)),
}
_ANGLES = np.linspace(0, 2 * np.pi, 24, endpoint=False)
_CIRCLE: _Points = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)


@dataclasses.dataclass(frozen=True)
class Marks:
    """The field marks of one class; lengths are in body lengths, 0.53 to 0.61 of the image's side.

    Attributes:
        wing_bars: pale bars across the wing: 2 broad ones, 5 fine ones that cover the same area, or any other number.
        spots: dark spots on the breast: coarse, fine (four times as many, half as wide and as far apart), or none.
        bill: short, long or hooked.
        tail: square or forked.
        eye_ring: a pale ring around the eye.

    >>> Marks(wing_bars=5).bar_period, Marks(spots="fine").spot_period
    (0.08, 0.075)
    """

    wing_bars: int = 2
    spots: Spots = "coarse"
    bill: Bill = "short"
    tail: Tail = "square"
    eye_ring: bool = False

    @property
    def bar_period(self) -> float | None:
        """From one wing bar to the next, in body lengths; None without bars."""
        return _BARRED / self.wing_bars if self.wing_bars else None

    @property
    def spot_period(self) -> float | None:
        """From one breast spot to the next, in body lengths; None without spots."""
        return None if self.spots == "none" else _SPOTS[self.spots][1]


def draw_bird(marks: Marks, size: int, rng: random.Random) -> tuple[Image.Image, dict[str, Box]]:
    """Draw a bird with these marks in a random place, pose, plumage, scene and light.

    Args:
        marks: the field marks, all that the image has in common with others of its class.
        size: side of the image, in pixels.
        rng: decides on all the rest. From the same state, other marks give the same image but for the marks, and
            another size the same scene but for the noise.

    Returns:
        An RGB image of size x size, and for each field of `Marks` the box in which that mark lies; where a mark is
        absent, the box in which others have it. Leaves may cover a part of it.

    >>> image, boxes = draw_bird(Marks(bill="long"), 96, random.Random(0))
    >>> image.size, sorted(boxes)
    ((96, 96), ['bill', 'eye_ring', 'spots', 'tail', 'wing_bars'])
    """
    canvas = _scene(size * _OVERSAMPLE, rng)
    bird = _Bird(canvas, rng)
    hue = rng.random()
    back = _color(rng, (0.25, 0.75), (0.1, 0.6), hue)
    wing = _color(rng, (0.1, 0.4), (0.1, 0.6), hue)
    horn = _color(rng, (0.92, 1.0), (0.9, 1.0), 0.09, spread=0.012)
    slope = rng.uniform(-0.15, 0.15)
    perch = _color(rng, (0.15, 0.6), (0.2, 0.6), 0.08)
    bird.line([(-2.5, 0.46 - 2.5 * slope), (2.5, 0.46 + 2.5 * slope)], rng.uniform(0.04, 0.1), perch)
    for x in (-0.06, 0.06):
        bird.line([(x, 0.2), (x + 0.02, 0.45)], 0.025, wing)
    places = {
        "tail": bird.polygon(np.array(_TAILS[marks.tail]), wing),
        "bill": bird.polygon(np.array(_BILLS[marks.bill]), horn),
    }
    bird.polygon(_ellipse((0, 0), (0.48, 0.29), -0.2), back)
    bird.polygon(_ellipse((0.33, -0.16), (0.20, 0.20)), back)
    bird.polygon(_ellipse((0.41, -0.27), (0.19, 0.175)), back)
    places["spots"] = _draw_breast(bird, marks, rng)
    places["wing_bars"] = _draw_wing(bird, marks, wing, rng)
    pale = _color(rng, (0.9, 1.0), (0.0, 0.15))
    places["eye_ring"] = bird.polygon(_ellipse(_EYE, (_RING_RADIUS,) * 2), pale if marks.eye_ring else back)
    bird.polygon(_ellipse(_EYE, (_EYE_RADIUS,) * 2), (15, 12, 10))
    for _ in range(rng.choice((0, 0, 1, 2))):
        _draw_leaf(bird.draw, canvas.width, rng, _color(rng, (0.2, 0.9), (0.1, 0.7)), 0.7)
    return _develop(canvas, rng), {name: _box(points, size) for name, points in places.items()}


class _Bird:
    """Draws shapes given in a bird's coordinates, once its place and pose on the canvas are chosen."""

    def __init__(self, canvas: Image.Image, rng: random.Random) -> None:
        self.draw = ImageDraw.Draw(canvas)
        self.unit = canvas.width * rng.uniform(*_SCALE)
        turn, flip = math.radians(rng.uniform(-18, 18)), rng.choice((-1, 1))
        cos, sin = self.unit * math.cos(turn), self.unit * math.sin(turn)
        self.matrix = np.array(((flip * cos, flip * sin), (-sin, cos)))
        corners = np.array([(x, y) for x, _ in _REACH for _, y in _REACH]) @ self.matrix
        room = canvas.width - np.ptp(corners, axis=0)
        self.origin = (
            np.array([rng.random(), rng.random()]) * room.clip(0) + room.clip(None, 0) / 2 - corners.min(axis=0)
        )

    def place(self, points: _Points) -> _Points:
        """From the bird's coordinates to the canvas's."""
        placed: _Points = points @ self.matrix + self.origin
        return placed

    def polygon(self, points: _Points, color: _Color) -> _Points:
        """Fill a polygon; returns its corners on the canvas."""
        placed = self.place(points)
        self.draw.polygon(placed.ravel().tolist(), fill=color)
        return placed

    def line(self, points: Sequence[tuple[float, float]], width: float, color: _Color) -> None:
        placed = self.place(np.array(points))
        self.draw.line(placed.ravel().tolist(), fill=color, width=max(1, round(width * self.unit)))


def _draw_breast(bird: _Bird, marks: Marks, rng: random.Random) -> _Points:
    """A pale breast with its spots, on a jittered hexagonal lattice from the middle outwards."""
    pale, dark = _color(rng, (0.7, 1.0), (0.0, 0.35)), _color(rng, (0.05, 0.3), (0.0, 0.5))
    shift = (rng.uniform(-0.5, 0.5), rng.uniform(-0.5, 0.5))
    jitter = np.array([(rng.uniform(-0.1, 0.1), rng.uniform(-0.1, 0.1)) for _ in range(_SPOTS["fine"][0])])
    breast = bird.polygon(_ellipse(_BREAST, _BREAST_RADII, _BREAST_TILT), pale)
    if marks.spots == "none":
        return breast
    count, period = _SPOTS[marks.spots]
    lattice = [
        (column + shift[0] + row % 2 / 2, (row + shift[1]) * 0.866) for row in range(-4, 5) for column in range(-4, 5)
    ]
    lattice.sort(key=lambda spot: math.hypot(spot[0] / _BREAST_RADII[0], spot[1] / _BREAST_RADII[1]))
    radius = 0.29 * period
    inside = (np.array(lattice[:count]) + jitter[:count]) * period / (np.array(_BREAST_RADII) - radius)
    inside /= np.hypot(*inside.T).clip(1.0)[:, None]  # no spot leaves the breast
    for center in _turn(inside * (np.array(_BREAST_RADII) - radius), _BREAST_TILT) + _BREAST:
        bird.polygon(_CIRCLE[::3] * radius + center, dark)
    return breast


def _draw_wing(bird: _Bird, marks: Marks, color: _Color, rng: random.Random) -> _Points:
    """A dark wing with its pale bars; returns where the bars are, or would be."""
    along = np.linspace(0, 1, 12)
    bird.polygon(np.concatenate([_on_wing(along, 1.0), _on_wing(along[::-1], -1.0)]), color)
    pale = _color(rng, (0.8, 1.0), (0.0, 0.25))
    middle = _BAR_CENTRE + rng.uniform(-0.12, 0.12)
    barred = _BARRED / float(np.hypot(*(_WING_TIP - _SHOULDER)))
    for number in range(marks.wing_bars):
        step = barred / marks.wing_bars
        start = middle + (number - (marks.wing_bars - 0.5) / 2) * step
        along = np.array((start, start + step / 4, start + step / 2))
        bird.polygon(np.concatenate([_on_wing(along, 0.92), _on_wing(along[::-1], -0.92)]), pale)
    ends = np.array((middle - barred / 2, middle, middle + barred / 2))
    return bird.place(np.concatenate([_on_wing(ends, 1.0), _on_wing(ends, -1.0)]))


def _on_wing(along: NDArray[np.float64], across: float) -> _Points:
    """Points on the wing: `along` it from shoulder (0) to tip (1), `across` it from edge (-1) to edge (1)."""
    along = along.clip(0, 0.999)
    axis = _WING_TIP - _SHOULDER
    normal = np.array((-axis[1], axis[0])) / np.hypot(*axis)
    width = _WING_WIDTH * np.sin(np.pi * along**0.7) ** 0.8
    points: _Points = _SHOULDER + along[:, None] * axis + (across * width)[:, None] * normal
    return points


def _scene(side: int, rng: random.Random) -> Image.Image:
    """A soft background with leaves, stems and berries: shapes with the sizes and spacings of the marks."""
    hues = (rng.random(), rng.random())
    soft = Image.new("RGB", (4, 4))
    for place in range(16):
        soft.putpixel((place % 4, place // 4), _color(rng, (0.25, 0.95), (0.05, 0.45), rng.choice(hues)))
    canvas = soft.resize((side, side), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.randint(3, 10)):
        _draw_leaf(draw, side, rng, _color(rng, (0.2, 0.9), (0.1, 0.7), rng.choice(hues)))
    for _ in range(rng.randint(0, 2)):
        _draw_stems(draw, side, rng)
    for _ in range(rng.randint(0, 2)):
        _draw_berries(draw, side, rng)
    return canvas


def _draw_leaf(draw: ImageDraw.ImageDraw, side: int, rng: random.Random, color: _Color, scale: float = 1.0) -> None:
    length = side * scale * rng.uniform(0.05, 0.2)
    center = (rng.uniform(0, side), rng.uniform(0, side))
    points = _ellipse(center, (length, length * rng.uniform(0.25, 0.7)), rng.uniform(0, math.pi))
    draw.polygon(points.ravel().tolist(), fill=color)


def _draw_stems(draw: ImageDraw.ImageDraw, side: int, rng: random.Random) -> None:
    """Parallel stripes anywhere, as far apart as broad or fine wing bars."""
    color, turn = _color(rng, (0.1, 1.0), (0.1, 0.8)), rng.uniform(0, math.pi)
    start = np.array((rng.uniform(0, side), rng.uniform(0, side)))
    period, length = side * rng.choice((0.045, 0.11)) * rng.uniform(0.8, 1.25), side * rng.uniform(0.06, 0.14)
    along, across = _turn(np.array(((length, 0.0), (0.0, period))), turn)
    for number in range(rng.choice((2, 3, 5, 6))):
        foot = start + number * across
        draw.line([*foot, *(foot + along)], fill=color, width=max(1, round(period / 2)))


def _draw_berries(draw: ImageDraw.ImageDraw, side: int, rng: random.Random) -> None:
    """A cluster of dots anywhere, as wide as coarse or fine breast spots."""
    color = _color(rng, (0.1, 1.0), (0.1, 0.8))
    x, y, period = (
        rng.uniform(0, side),
        rng.uniform(0, side),
        side * rng.choice((0.043, 0.086)) * rng.uniform(0.8, 1.25),
    )
    for _ in range(rng.randint(3, 14)):
        center = (x + period * rng.uniform(-2.5, 2.5), y + period * rng.uniform(-2.5, 2.5))
        draw.polygon(_ellipse(center, (0.29 * period,) * 2).ravel().tolist(), fill=color)


def _develop(canvas: Image.Image, rng: random.Random) -> Image.Image:
    """Average down to the image's size, under uneven light and with sensor noise."""
    size = canvas.width // _OVERSAMPLE
    lamps = Image.frombytes("L", (3, 3), bytes(rng.randint(80, 255) for _ in range(9)))
    light = np.asarray(lamps.resize((size, size), Image.Resampling.BICUBIC), np.float32)[..., None] / 510 + 0.62
    strength = rng.uniform(0.02, 0.06)
    noise = np.frombuffer(rng.randbytes(size * size * 3), np.uint8).reshape(size, size, 3) - np.float32(127.5)
    pixels = np.asarray(canvas.reduce(_OVERSAMPLE), np.float32) * light + noise * strength
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _color(
    rng: random.Random, value: _Range, saturation: _Range, hue: float | None = None, spread: float = 0.04
) -> _Color:
    """A random color in ranges of HSV value and saturation, and close to `hue` if one is given."""
    hue = rng.random() if hue is None else (hue + rng.uniform(-spread, spread)) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, rng.uniform(*saturation), rng.uniform(*value))
    return round(255 * red), round(255 * green), round(255 * blue)


def _turn(points: _Points, angle: float) -> _Points:
    cos, sin = math.cos(angle), math.sin(angle)
    turned: _Points = points @ np.array(((cos, sin), (-sin, cos)))
    return turned


def _ellipse(center: Iterable[float], radii: _Range, tilt: float = 0.0) -> _Points:
    points: _Points = _turn(_CIRCLE * radii, tilt) + np.array(tuple(center))
    return points


def _box(points: _Points, size: int) -> Box:
    """The smallest box of whole pixels around points on the canvas, cut at the image's border."""
    x0, y0 = np.floor(points.min(axis=0) / _OVERSAMPLE).clip(0, size).astype(int).tolist()
    x1, y1 = np.ceil(points.max(axis=0) / _OVERSAMPLE).clip(0, size).astype(int).tolist()
    return x0, y0, x1, y1
