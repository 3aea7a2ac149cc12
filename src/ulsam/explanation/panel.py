"""One image on one page: what it is, what the model says, and every map laid over it."""

from collections.abc import Sequence
from typing import Literal

from PIL import Image, ImageDraw

from ulsam.explanation import captions as words
from ulsam.explanation.drawing import fitting, font, grayed, overlaid, ramp, resized
from ulsam.explanation.explanation import (
    NO_LAYER,
    Explanation,
    MapRow,
    attention_row,
    cam_row,
    headline,
)

MARGIN, IMAGE, GUTTER = 28, 264, 36
TILE, GAP, CAPTION = 136, 10, 36
HEAD, HEADING, ROW_GAP = 86, 24, 16
SCALE = 66  # a color scale with its labels
LIST_ROW = 23
PAPER, INK, QUIET, LINE = "#ffffff", "#17181c", "#5b5f69", "#d9dbe0"
BAR = (63, 90, 140)


def panel(
    explanation: Explanation,
    base: Explanation | None = None,
    *,
    title: str = "",
    truth: str | None = None,
    names: tuple[str, str] = ("this model", "base"),
) -> Image.Image:
    """A panel: the image, the five most probable classes, the CAM, and the attention maps of every ULSAM layer.

    The maps of a layer share one color scale, from 0 to its largest value and to twice a uniform map's at least, so
    that maps that are nearly uniform look so. Maps lie on the image in gray; what the image shows is what the model
    was given.

    Args:
        explanation: by one model.
        base: of the same image by another one, whose classes and CAM are shown beside.
        title: usually the name of the file.
        truth: the true class, if it is known.
        names: what the two models are called.

    Returns:
        An RGB image; its width depends on the largest number of maps of a layer, its height on all of them.

    >>> import numpy as np
    >>> from ulsam.explanation.explanation import LayerMaps
    >>> maps = np.full((4, 7, 7), 1 / 49, np.float32)
    >>> layer = LayerMaps("blocks.5.2", "17", "equations", maps)
    >>> pixels, shares = np.zeros((96, 96, 3), np.uint8), np.array([0.9, 0.1], np.float32)
    >>> found = Explanation(pixels, ("wren", "robin"), shares, 0, (layer,), np.ones((3, 3), np.float32), "bn2")
    >>> panel(found, title="1.jpg", truth="wren").size
    (996, 520)
    """
    page = _Page(explanation, base, names)
    page.head(title, headline(truth, explanation, base, names[1]), words.verdict(truth, explanation.top(1)[0][0]))
    page.left(truth)
    page.right()
    return page.cut()


class _Page:
    """A white page that is filled from the top, in two columns."""

    def __init__(self, explanation: Explanation, base: Explanation | None, names: tuple[str, str]) -> None:
        self.explanation, self.base, self.names = explanation, base, names
        self.columns = 4 if all(len(layer.maps) <= 4 for layer in explanation.layers) else 8
        self.gray = grayed(explanation.pixels, TILE)
        self.x = MARGIN + IMAGE + GUTTER
        self.width = self.x + self.columns * (TILE + GAP) - GAP + SCALE + MARGIN
        lines = 1 + sum(-(-len(layer.maps) // self.columns) for layer in explanation.layers)
        row = HEADING + self.gray.height + CAPTION + ROW_GAP
        tall = HEAD + lines * row + 6 * IMAGE + resized(explanation.pixels, IMAGE).height
        self.canvas = Image.new("RGB", (self.width, tall), PAPER)
        self.draw = ImageDraw.Draw(self.canvas)
        self.bottom = 0

    def head(self, title: str, headline: str, verdict: str) -> None:
        """The name of the image and what was made of it."""
        room = self.width - 2 * MARGIN
        self.text((MARGIN, 20), fitting(title, room, 20, "-Bold"), 20, weight="-Bold")
        color = {"wrong": "#a3241b", "right": "#1d6b3a"}.get(verdict, QUIET)
        self.text((MARGIN, 50), fitting(headline, room, 14), 14, color)

    def left(self, truth: str | None) -> None:
        """The image, and the classes below it."""
        image = resized(self.explanation.pixels, IMAGE)
        self.canvas.paste(image, (MARGIN, HEAD))
        y = HEAD + image.height + 20
        for name, explanation in zip(self.names, (self.explanation, self.base), strict=True):
            if explanation is None:
                continue
            self.text((MARGIN, y), fitting(name, IMAGE, 13, "-Bold"), 13, weight="-Bold")
            y += HEADING
            for label, share in explanation.top():
                self.bar(y, label, share, label == truth)
                y += LIST_ROW
            y += 14
        self.bottom = max(self.bottom, y - 14)

    def bar(self, y: int, label: str, share: float, true: bool) -> None:
        """A class, its probability as a bar below its name, and as a figure; the true class has a mark."""
        figure = words.percent(share)
        room = IMAGE - font(12).getlength(figure) - 12
        text = fitting(f"{label} (true)" if true else label, room, 12)
        self.text((MARGIN, y), text, 12)
        self.text((MARGIN + IMAGE, y), figure, 12, INK, anchor="ra")
        self.draw.rectangle((MARGIN, y + 16, MARGIN + IMAGE - 1, y + 18), fill=LINE)
        if (length := round(share * IMAGE)) > 0:
            self.draw.rectangle((MARGIN, y + 16, MARGIN + length - 1, y + 18), fill=BAR)

    def right(self) -> None:
        """The CAMs, then the maps of each layer."""
        y = HEAD - 2
        models = {
            name: one for name, one in zip(self.names, (self.explanation, self.base), strict=True) if one is not None
        }
        y = self.row(y, cam_row(models), [grayed(one.pixels, TILE) for one in models.values()])
        for layer in self.explanation.layers:
            y = self.row(y, attention_row(layer), [self.gray] * len(layer.maps))
        if not self.explanation.layers:
            self.text((self.x, y), NO_LAYER, 12, QUIET)
            y += HEADING
        self.bottom = max(self.bottom, y - ROW_GAP)

    def row(self, y: int, row: MapRow, grays: Sequence[Image.Image]) -> int:
        """Maps on their images, in as many lines as they need, with their scale; returns where the next row begins."""
        self.text((self.x, y), fitting(row.heading, self.width - MARGIN - self.x, 13, "-Bold"), 13, weight="-Bold")
        y += HEADING
        for first in range(0, len(grays), self.columns):
            line = slice(first, first + self.columns)
            for number, gray in enumerate(grays[line], start=first):
                x = self.x + (number - first) * (TILE + GAP)
                self.canvas.paste(overlaid(gray, row.maps[number]), (x, y))
                for step, text in enumerate(row.captions[number]):
                    self.text((x, y + gray.height + 4 + 15 * step), fitting(text, TILE, 11), 11, QUIET)
            if not first:
                self.scale(self.x + min(len(grays), self.columns) * (TILE + GAP), y, row.marks)
            y += max(gray.height for gray in grays[line]) + CAPTION + ROW_GAP // 2
        return y + ROW_GAP // 2

    def scale(self, x: int, y: int, labels: Sequence[tuple[float, str]]) -> None:
        """A color scale with labels at shares of its height; one that would lie on another is left out."""
        height = self.gray.height
        self.canvas.paste(ramp(10, height), (x, y))
        last = -20.0
        for share, text in labels:
            place = y + (1 - share) * (height - 1)
            self.draw.line((x + 10, place, x + 13, place), fill=QUIET)
            level = min(max(place, y + 5), y + height - 6)
            if level - last >= 12:
                self.text((x + 17, level), text, 10, QUIET, anchor="lm")
                last = level

    def text(
        self,
        place: tuple[float, float],
        text: str,
        size: int,
        color: str = INK,
        *,
        weight: Literal["", "-Bold"] = "",
        anchor: str = "la",
    ) -> None:
        self.draw.text(place, text, fill=color, font=font(size, weight), anchor=anchor)

    def cut(self) -> Image.Image:
        """The part of the page that is filled."""
        return self.canvas.crop((0, 0, self.width, self.bottom + MARGIN))
