"""How one bird is drawn: scene, bird, field marks, things in front, light.

The bird's own coordinates: x towards the bill, y down, the body one unit long around the origin. `_Bird` takes them to the
pixels of a picture three times as large as asked for, which is averaged down at the end.
"""

import colorsys
import math
import random
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ulsam.data.marks import Marks

Box = tuple[int, int, int, int]
Colour = tuple[int, int, int]
Points = NDArray[np.float64]

OVERSAMPLE = 3
REACH = ((-0.70, -0.46), (0.88, 0.44))  # corners around any bird, whatever its marks
SHOULDER, WING_TIP, WING_WIDTH = np.array((0.16, -0.12)), np.array((-0.62, 0.02)), 0.17
BREAST, BREAST_RADII = (0.21, 0.06), (0.22, 0.17)
EYE = (0.45, -0.30)
BILLS = {
    "short": ((0.55, -0.34), (0.70, -0.25), (0.55, -0.20)),
    "long": ((0.55, -0.31), (0.72, -0.30), (0.90, -0.25), (0.72, -0.235), (0.55, -0.22)),
    "hooked": ((0.54, -0.36), (0.66, -0.35), (0.74, -0.29), (0.75, -0.17), (0.68, -0.23), (0.54, -0.20)),
}
TAILS = {
    "square": ((-0.38, -0.06), (-0.70, 0.03), (-0.68, 0.19), (-0.36, 0.12)),
    "forked": ((-0.38, -0.06), (-0.72, -0.02), (-0.52, 0.10), (-0.68, 0.24), (-0.36, 0.12)),
}


class _Bird:
    """Draws polygons given in the bird's coordinates and returns where they lie, in pixels of the final picture."""

    def __init__(self, picture: Image.Image, rng: random.Random) -> None:
        side = picture.width
        self.draw = ImageDraw.Draw(picture)
        self.unit = side * rng.uniform(0.54, 0.64)
        turn = math.radians(rng.uniform(-18, 18))
        flip = rng.choice((-1, 1))
        cos, sin = self.unit * math.cos(turn), self.unit * math.sin(turn)
        self.matrix = np.array(((flip * cos, flip * sin), (-sin, cos)))  # acts on row vectors, transposed
        corners = np.array([(x, y) for x in (REACH[0][0], REACH[1][0]) for y in (REACH[0][1], REACH[1][1])]) @ self.matrix
        free = side - np.ptp(corners, axis=0)
        place = [rng.random() * room if room > 0 else room / 2 for room in free]
        self.origin = np.array(place) - corners.min(axis=0)

    def polygon(self, points: Sequence[tuple[float, float]] | Points, colour: Colour) -> Points:
        placed = np.asarray(points) @ self.matrix + self.origin
        self.draw.polygon(placed.ravel().tolist(), fill=colour)
        return placed

    def ellipse(self, centre, radii, colour, tilt=0.0) -> Points:
        return self.polygon(ellipse(centre, radii, tilt), colour)

    def line(self, points, width: float, colour: Colour) -> None:
        placed = np.asarray(points) @ self.matrix + self.origin
        self.draw.line(placed.ravel().tolist(), fill=colour, width=max(1, round(width * self.unit)))


_CIRCLE = np.stack([f(np.linspace(0, 2 * np.pi, 24, endpoint=False)) for f in (np.cos, np.sin)], axis=1)
_DOT = _CIRCLE[::3]


def ellipse(centre, radii, tilt: float = 0.0) -> Points:
    points = _CIRCLE * radii
    if tilt:
        cos, sin = math.cos(tilt), math.sin(tilt)
        points = points @ np.array(((cos, sin), (-sin, cos)))
    return points + centre


def colour(rng, value, saturation=(0.1, 0.8), hue=None) -> Colour:
    h = rng.random() if hue is None else (hue + rng.uniform(-0.06, 0.06)) % 1
    r, g, b = colorsys.hsv_to_rgb(h, rng.uniform(*saturation), rng.uniform(*value))
    return round(255 * r), round(255 * g), round(255 * b)


def mix(a, b, part):
    return tuple(round(x + (y - x) * part) for x, y in zip(a, b, strict=True))


def scene(side, rng) -> Image.Image:
    """A soft background with leaves, stems and berries: shapes of the same sizes and spacings as the marks."""
    hues = (rng.random(), rng.random())
    small = Image.new("RGB", (4, 4))
    small.putdata([colour(rng, (0.25, 0.95), (0.05, 0.6), rng.choice(hues)) for _ in range(16)])
    picture = small.resize((side, side), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.randint(4, 14)):
        leaf(draw, side, rng, colour(rng, (0.2, 0.9), (0.1, 0.7), rng.choice(hues)))
    for _ in range(rng.randint(0, 2)):
        stripes(draw, side, rng, colour(rng, (0.1, 1.0)))
    for _ in range(rng.randint(0, 2)):
        berries(draw, side, rng, colour(rng, (0.1, 1.0)))
    return picture


def leaf(draw, side, rng, fill, scale=1.0) -> None:
    centre = (rng.uniform(0, side), rng.uniform(0, side))
    length = side * rng.uniform(0.05, 0.2) * scale
    points = ellipse(centre, (length, length * rng.uniform(0.25, 0.7)), rng.uniform(0, math.pi))
    draw.polygon(points.ravel().tolist(), fill=fill)


def stripes(draw, side, rng, fill) -> None:
    x, y, turn = rng.uniform(0, side), rng.uniform(0, side), rng.uniform(0, math.pi)
    period, length = side * rng.choice((0.04, 0.1)) * rng.uniform(0.8, 1.25), side * rng.uniform(0.06, 0.14)
    along, across = np.array((math.cos(turn), math.sin(turn))), np.array((-math.sin(turn), math.cos(turn)))
    for number in range(rng.choice((2, 3, 5, 6))):
        start = (x, y) + across * period * number
        draw.line([*start, *(start + along * length)], fill=fill, width=round(period / 2))


def berries(draw, side, rng, fill) -> None:
    x, y = rng.uniform(0, side), rng.uniform(0, side)
    period = side * rng.choice((0.0375, 0.075)) * rng.uniform(0.8, 1.25)
    for _ in range(rng.randint(3, 14)):
        cx, cy = x + rng.uniform(-2.5, 2.5) * period, y + rng.uniform(-2.5, 2.5) * period
        draw.ellipse((cx - period * 0.3, cy - period * 0.3, cx + period * 0.3, cy + period * 0.3), fill=fill)


def wing_width(u: float) -> float:
    return WING_WIDTH * math.sin(math.pi * u**0.7) ** 0.8


def wing_point(u: float, v: float) -> Points:
    axis = WING_TIP - SHOULDER
    normal = np.array((-axis[1], axis[0])) / np.hypot(*axis)
    return SHOULDER + axis * u + normal * v


def draw_bird(marks: Marks, size: int, rng: random.Random):
    side = size * OVERSAMPLE
    picture = scene(side, rng)
    bird = _Bird(picture, rng)
    hue = rng.random()
    back = colour(rng, (0.25, 0.75), (0.1, 0.6), hue=hue)
    belly = colour(rng, (0.7, 1.0), (0.0, 0.35))
    wing = colour(rng, (0.1, 0.4), (0.1, 0.6), hue=hue)
    bill = colour(rng, (0.7, 0.95), (0.5, 0.95), 0.09) if rng.random()<.5 else colour(rng,(.05,.25))
    perch = colour(rng, (0.15, 0.6), (0.2, 0.6), 0.08)
    boxes = {}
    # perch and legs
    slope = rng.uniform(-0.15, 0.15)
    bird.line([(-2.5, 0.46 - 2.5 * slope), (2.5, 0.46 + 2.5 * slope)], rng.uniform(0.04, 0.1), perch)
    for x in (-0.06, 0.06):
        bird.line([(x, 0.2), (x + 0.02, 0.45)], 0.025, bill)
    boxes["tail"] = bird.polygon(TAILS[marks.tail], mix(wing, (0, 0, 0), 0.15))
    boxes["bill"] = bird.polygon(BILLS[marks.bill], bill)
    bird.ellipse((0, 0), (0.48, 0.29), back, -0.2)
    bird.ellipse((0.33, -0.16), (0.20, 0.20), back)
    bird.ellipse((0.41, -0.27), (0.19, 0.175), back)
    # breast
    boxes["spots"] = bird.ellipse(BREAST, BREAST_RADII, belly, -0.45)
    if marks.spot_period:
        spots(bird, marks.spot_period, colour(rng, (0.05, 0.3), (0.0, 0.5)), rng)
    # wing
    us = np.linspace(0, 1, 12).tolist()
    outline = [wing_point(u, wing_width(u)) for u in us] + [wing_point(u, -wing_width(u)) for u in us[::-1]]
    bird.polygon(np.array(outline), wing)
    ink = colour(rng, (0.8, 1.0), (0.0, 0.25))
    shift = rng.uniform(-0.03, 0.03)
    places = []
    n = marks.wing_bars or 1
    period = 0.40 / n / 0.81
    for k in range(n):
        u0 = 0.14 + shift + k * period
        u1 = u0 + period / 2
        quad = [wing_point(u, s * 0.92 * wing_width(u)) for u, s in ((u0, 1), ((u0 + u1) / 2, 1), (u1, 1), (u1, -1), ((u0 + u1) / 2, -1), (u0, -1))]
        places.append(bird.polygon(np.array(quad), ink if marks.wing_bars else wing))
    boxes["wing_bars"] = np.concatenate(places)
    # eye
    r = 0.036
    ring = bird.ellipse(EYE, (0.066, 0.066), (245, 240, 225) if marks.eye_ring else back)
    bird.ellipse(EYE, (r, r), (15, 12, 10))
    boxes["eye_ring"] = ring
    for _ in range(rng.choice((0, 0, 1, 2))):
        leaf(bird.draw, side, rng, colour(rng, (0.2, 0.9), (0.1, 0.7)), 0.7)
    picture = finish(picture, rng)
    return picture, {k: box(v, size) for k, v in boxes.items()}


def box(points, size) -> Box:
    x0, y0 = np.floor(points.min(axis=0) / OVERSAMPLE).clip(0, size)
    x1, y1 = np.ceil(points.max(axis=0) / OVERSAMPLE).clip(0, size)
    return int(x0), int(y0), int(x1), int(y1)


def contrast(base, rng):
    """Light on dark or dark on light"""
    luma = 0.3 * base[0] + 0.59 * base[1] + 0.11 * base[2]
    up = luma < 100 or (luma < 155 and rng.random() < 0.5)
    target = colour(rng, (0.9, 1.0), (0.0, 0.25)) if up else colour(rng, (0.0, 0.2), (0.0, 0.6))
    return mix(base, target, rng.uniform(0.65, 0.95))


def spots(bird, period, ink, rng):
    radius = 0.29 * period
    cos, sin = math.cos(-0.45), math.sin(-0.45)
    dx, dy = rng.random(), rng.random()
    rows = math.ceil(BREAST_RADII[1] / (period * 0.87)) + 1
    cols = math.ceil(BREAST_RADII[0] / period) + 1
    for row in range(-rows, rows + 1):
        for col in range(-cols, cols + 1):
            x = (col + dx + 0.5 * (row % 2)) * period + rng.uniform(-0.1, 0.1) * period
            y = (row + dy) * period * 0.87 + rng.uniform(-0.1, 0.1) * period
            if (x / (BREAST_RADII[0] - radius)) ** 2 + (y / (BREAST_RADII[1] - radius)) ** 2 < 1:
                bird.polygon(_DOT * radius + (BREAST[0] + cos * x - sin * y, BREAST[1] + sin * x + cos * y), ink)


def finish(picture, rng):
    size = picture.width // OVERSAMPLE
    light = Image.frombytes("L", (3, 3), bytes(rng.randint(80, 255) for _ in range(9))).resize((size, size), Image.Resampling.BICUBIC)
    light = (np.asarray(light, dtype=np.float32) / 255.0 * 0.5 + 0.62)[..., None]
    noise = np.frombuffer(rng.randbytes(size * size * 3), np.uint8).reshape(size, size, 3).astype(np.float32) - 127.5
    pixels = np.asarray(picture.reduce(OVERSAMPLE), dtype=np.float32) * light + noise * rng.uniform(0.02, 0.06)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
