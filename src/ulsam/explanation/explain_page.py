"""The report: one HTML page that needs no other file and no network, whatever the images and classes are called."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image

from ulsam.data.image_channels import shown
from ulsam.data.images import Pixels, jpeg_of
from ulsam.explanation import captions as words
from ulsam.explanation.drawing import colored, gradient, resized
from ulsam.explanation.explanation import (
    NO_LAYER,
    Explanation,
    LayerMaps,
    attention_row,
    cam_row,
    headline,
)

MAX_CARDS = 500
"""Images that the page shows in full, the first of the index; the others have their line there."""

LARGEST, SMALLEST = 256, 24
"""The most pixels to a side that an image has in the page, and the least that a map is enlarged to."""


@dataclass(frozen=True)
class Tile:
    """A map, the place of its photo among the card's, and its words."""

    image: str
    photo: int
    caption: tuple[str, str]
    alt: str


@dataclass(frozen=True)
class Card:
    """All that the page shows of one image; its images are data URIs."""

    name: str
    panel: str
    truth: str | None
    named: str
    share: float
    verdict: str
    headline: str
    photos: tuple[str, ...]  # what the first model was given, then others, where their crops or sizes differ
    aspect: float  # width / height, of the first photo
    tops: tuple[tuple[str, tuple[tuple[str, str, float], ...]], ...]  # whose; name, probability in words and as a share
    cams: tuple[Tile, ...]
    layers: tuple[dict[str, Any], ...]


def card(
    name: str, truth: str | None, explanation: Explanation, base: Explanation | None = None, *, panel: str = ""
) -> Card:
    """What the page shows of an image; ``panel`` is the name of its PNG file."""
    models = {"this model": explanation, **({"base": base} if base else {})}
    return card_of_models(name, truth, models, headline(truth, explanation, base), {"": explanation}, panel=panel)


def card_of_models(
    name: str,
    truth: str | None,
    models: Mapping[str, Explanation],
    headline: str,
    attention: Mapping[str, Explanation],
    *,
    panel: str = "",
) -> Card:
    """What a page shows of an image that several models saw.

    Args:
        name: of the image.
        truth: its true class, if it is known.
        models: what each of them finds, by what it is called; the first one gives photo and verdict.
        headline: a sentence on what was predicted.
        attention: the models whose attention maps are shown, by what stands before the layers' names.
        panel: the name of the image's PNG file.
    """
    first = next(iter(models.values()))
    given: list[Pixels] = []  # distinct photos

    def photo(explanation: Explanation) -> int:
        for number, pixels in enumerate(given):
            if np.array_equal(pixels, explanation.pixels):
                return number
        given.append(explanation.pixels)
        return len(given) - 1

    (named, share), *_ = first.top(1)
    photo(first)
    cams = [
        Tile(map_uri(one.cam), photo(one), caption, f"Grad-CAM++ of {', '.join(caption)}")
        for one, caption in zip(models.values(), cam_row(models).captions, strict=True)
    ]
    layers = [_tiles(layer_view(layer), whose, photo(one)) for whose, one in attention.items() for layer in one.layers]
    return Card(
        name=name,
        panel=panel,
        truth=truth,
        named=named,
        share=share,
        verdict=words.verdict(truth, named),
        headline=headline,
        photos=tuple(map(photo_uri, given)),
        aspect=first.pixels.shape[1] / first.pixels.shape[0],
        tops=tuple((whose, top_view(one)) for whose, one in models.items()),
        cams=tuple(cams),
        layers=tuple(layers),
    )


def page(
    cards: Sequence[Card],
    *,
    model: str,
    base: str | None = None,
    unreadable: Iterable[str] = (),
    numbers: str = "",
    note: str = "",
    command: str = "",
    versions: str = "",
) -> str:
    """The page.

    Args:
        cards: in the order in which they are shown.
        model, base: what the models are called.
        unreadable: a line about each image that could not be read.
        numbers: a text table to show as it is.
        note: a sentence on what to beware of.
        command: that made the report.
        versions: that it was made with.

    >>> found = Explanation(np.zeros((8, 8, 3), np.uint8), ("<b>",), np.ones(1, np.float32), 0, (), np.ones((2, 2)), "")
    >>> text = page([card("1.jpg", "<b>", found)], model="a model")
    >>> "<b>" in text, "&lt;b&gt;" in text
    (False, True)
    """
    known = [one for one in cards if one.truth is not None]
    return (
        environment()
        .get_template("explain_page.html")
        .render(
            cards=cards,
            max_cards=MAX_CARDS,
            known=len(known),
            wrong=sum(one.verdict == "wrong" for one in known),
            model=model,
            base=base,
            unreadable=list(unreadable),
            numbers=numbers,
            note=note,
            command=command,
            versions=versions,
        )
    )


def environment(*folders: Path) -> Environment:
    """Templates: those in the folders, and what this page has for them to include: ``page.css`` and the image."""
    environment = Environment(
        loader=FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(no_layer=NO_LAYER, percent=words.percent, gradient=gradient())
    return environment


def photo_uri(pixels: Pixels, largest: int = LARGEST) -> str:
    """An image as a JPEG of so many pixels to a side at most, in a data URI."""
    height, width = pixels.shape[:2]
    if max(height, width) > largest:
        pixels = np.asarray(resized(pixels, round(width * largest / max(height, width))))
    return _uri("jpeg", jpeg_of(shown(pixels), 85))


def map_uri(values: NDArray[np.floating], smallest: int = SMALLEST) -> str:
    """A map of values from 0 to 1 as a PNG of so many pixels to a side at least, in a data URI; browsers enlarge it.

    >>> map_uri(np.zeros((7, 7))).startswith("data:image/png;base64,")
    True
    """
    height, width = values.shape
    factor = max(1, -(-smallest // min(height, width)))
    buffer = io.BytesIO()
    Image.fromarray(colored(values, (width * factor, height * factor))).save(buffer, "png")
    return _uri("png", buffer.getvalue())


def layer_view(layer: LayerMaps, smallest: int = SMALLEST) -> dict[str, Any]:
    """What a page shows of a layer: heading, the note that ends it, the top of its color scale, where "uniform" lies
    on it in percent, and of each map the caption and an image, as of :func:`map_uri`.

    >>> view = layer_view(LayerMaps("blocks.5.2", "17", "equations", np.full((1, 2, 2), 0.25)))
    >>> view["heading"], view["top"], view["uniform"], view["maps"][0][0]
    ('layer 17, blocks.5.2: 1 map of 2 × 2; nearly uniform: this layer does little', '2.00×', 50.0, \
('1: entropy 100.0 %', 'peak 1.00×'))
    """
    row = attention_row(layer)
    (_, top), (uniform, _), _ = row.marks
    maps = [(caption, map_uri(one, smallest)) for caption, one in zip(row.captions, row.maps, strict=True)]
    return {"heading": row.heading, "note": row.note, "top": top, "uniform": 100 * uniform, "maps": maps}


def top_view(explanation: Explanation) -> tuple[tuple[str, str, float], ...]:
    """The most probable classes: name, probability in words, and as a share."""
    return tuple((name, words.percent(share), share) for name, share in explanation.top())


def _tiles(view: dict[str, Any], whose: str, photo: int) -> dict[str, Any]:
    """What :func:`layer_view` gives, with the model's name before the heading, and each map as a tile."""
    heading = (f"{whose}: " if whose else "") + view["heading"]
    maps = [Tile(image, photo, caption, f"{heading}; {', '.join(caption)}") for caption, image in view["maps"]]
    return {**view, "heading": heading, "maps": maps}


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
