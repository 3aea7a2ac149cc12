"""The report: one HTML page that needs no other file and no network, whatever the pictures and classes are called."""

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image

from ulsam.data.pictures import Pixels
from ulsam.explanation import words
from ulsam.explanation.drawing import coloured, gradient, resized
from ulsam.explanation.explainer import Explanation, LayerMaps

MOST_CARDS = 500
"""Pictures that the page shows in full, the first of the index; the others have their line there."""

LARGEST, SMALLEST = 256, 24
"""The most pixels to a side that a picture has in the page, and the least that a map is enlarged to."""


@dataclass(frozen=True)
class Card:
    """All that the page shows of one picture; its images are data URIs."""

    name: str
    panel: str
    truth: str | None
    named: str
    share: float
    verdict: str
    headline: str
    photo: str
    other_photo: str | None  # what the base net was given, where its crop or size is another
    aspect: float  # width / height
    top: tuple[tuple[str, str, float], ...]  # name, probability in words, and as a share
    base_top: tuple[tuple[str, str, float], ...]
    cams: tuple[tuple[str, tuple[str, str], str], ...]  # whose, caption, image
    layers: tuple[dict[str, Any], ...]


def card(name: str, truth: str | None, found: Explanation, base: Explanation | None = None, *, panel: str = "") -> Card:
    """What the page shows of a picture; ``panel`` is the name of its PNG file."""
    pairs = [("this net", found), ("base", base)]
    (named, share), *_ = found.top(1)
    return Card(
        name=name,
        panel=panel,
        truth=truth,
        named=named,
        share=share,
        verdict=words.verdict(truth, named),
        headline=words.headline(truth, found, base),
        photo=photo_uri(found.pixels),
        other_photo=None if base is None or np.array_equal(base.pixels, found.pixels) else photo_uri(base.pixels),
        aspect=found.pixels.shape[1] / found.pixels.shape[0],
        top=top_view(found),
        base_top=top_view(base) if base else (),
        cams=tuple((whose, words.cam_caption(whose, one), map_uri(one.cam)) for whose, one in pairs if one),
        layers=tuple(layer_view(layer) for layer in found.layers),
    )


def page(
    cards: Sequence[Card],
    *,
    net: str,
    base: str | None = None,
    unreadable: Iterable[str] = (),
    numbers: str = "",
    command: str = "",
    versions: str = "",
) -> str:
    """The page.

    Args:
        cards: in the order in which they are shown.
        net, base: what the nets are called.
        unreadable: a line about each picture that could not be read.
        numbers: a text table to show as it is.
        command: that made the report.
        versions: that it was made with.

    >>> found = Explanation(np.zeros((8, 8, 3), np.uint8), ("<b>",), np.ones(1, np.float32), 0, (), np.ones((2, 2)), "")
    >>> text = page([card("1.jpg", "<b>", found)], net="a net")
    >>> "<b>" in text, "&lt;b&gt;" in text
    (False, True)
    """
    room = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    known = [one for one in cards if one.truth is not None]
    return room.get_template("report.html").render(
        cards=cards,
        most=MOST_CARDS,
        known=len(known),
        wrong=sum(one.verdict == "wrong" for one in known),
        net=net,
        base=base,
        unreadable=list(unreadable),
        numbers=numbers,
        command=command,
        versions=versions,
        no_layer=words.NO_LAYER,
        percent=words.percent,
        gradient=gradient(),
    )


def photo_uri(pixels: Pixels) -> str:
    """A picture as a JPEG of `LARGEST` pixels to a side at most, in a data URI."""
    height, width = pixels.shape[:2]
    if max(height, width) > LARGEST:
        pixels = np.asarray(resized(pixels, round(width * LARGEST / max(height, width))))
    return _uri("jpeg", simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 85, "RGB", "420"))


def map_uri(values: NDArray[np.floating], smallest: int = SMALLEST) -> str:
    """A map of values from 0 to 1 as a PNG of so many pixels to a side at least, in a data URI; browsers enlarge it.

    >>> map_uri(np.zeros((7, 7))).startswith("data:image/png;base64,")
    True
    """
    height, width = values.shape
    factor = max(1, -(-smallest // min(height, width)))
    buffer = io.BytesIO()
    Image.fromarray(coloured(values, (width * factor, height * factor))).save(buffer, "png")
    return _uri("png", buffer.getvalue())


def layer_view(layer: LayerMaps, smallest: int = SMALLEST) -> dict[str, Any]:
    """What a page shows of a layer: heading, the top of its colour scale, where "uniform" lies on it in percent, and of
    each map the caption and an image, as of :func:`map_uri`.

    >>> view = layer_view(LayerMaps("blocks.5.2", "17", "equations", np.full((1, 2, 2), 0.25)))
    >>> view["heading"], view["top"], view["uniform"], view["maps"][0][0]
    ('layer 17, blocks.5.2: 1 map of 2 × 2', '2.00×', 50.0, ('1: entropy 100.0 %', 'peak 1.00×'))
    """
    top = words.layer_scale(layer)
    values = layer.maps * (layer.maps[0].size / top)
    captions = words.map_captions(layer)
    return {
        "heading": words.layer_heading(layer),
        "top": words.scale_text(top),
        "uniform": 100 / top,
        "maps": [(captions[number], map_uri(one, smallest)) for number, one in enumerate(values)],
    }


def top_view(found: Explanation) -> tuple[tuple[str, str, float], ...]:
    """The most probable classes: name, probability in words, and as a share."""
    return tuple((name, words.percent(share), share) for name, share in found.top())


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
