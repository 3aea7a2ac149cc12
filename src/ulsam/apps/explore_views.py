"""What the page shows, ready for JSON; images are data URIs."""

import io
from collections.abc import Sequence
from typing import Any

from ulsam.apps.explore_models import ExploredModel
from ulsam.explanation import captions as words
from ulsam.explanation.drawing import gradient
from ulsam.explanation.explain_page import layer_view, map_uri, photo_uri, top_view
from ulsam.explanation.explanation import NO_LAYER, Explanation
from ulsam.explanation.panel import panel

SIDE = 112
"""Pixels to a side of a map at least: the page shows it larger than the report does."""


def about(models: Sequence[ExploredModel], max_bytes: int) -> dict[str, Any]:
    """What the page needs before there is an image."""
    return {
        "models": [
            {"name": model.name, "file": model.file, "attention": bool(model.explainer.attention)} for model in models
        ],
        "max_bytes": max_bytes,
        "gradient": gradient(),
        "no_layer": NO_LAYER,
    }


def view(explanations: Sequence[Explanation]) -> dict[str, Any]:
    """What the page shows of an image: a sentence, and of each model the image, its classes, CAM and layers."""
    return {"said": said(explanations), "models": [_model_view(one) for one in explanations]}


def panel_png(models: Sequence[ExploredModel], explanations: Sequence[Explanation], number: int, title: str) -> bytes:
    """The panel of one model, beside the next one if there is another, as a PNG."""
    other = (number + 1) % len(models)
    names = [f"{letter(place)}, {model.name}" if len(models) > 1 else model.name for place, model in enumerate(models)]
    base = explanations[other] if other != number else None
    buffer = io.BytesIO()
    panel(explanations[number], base, title=title, names=(names[number], names[other])).save(buffer, "png")
    return buffer.getvalue()


def said(explanations: Sequence[Explanation]) -> str:
    """What the models say, in one sentence; they are called A, B, C, in their order.

    >>> import numpy as np
    >>> def model(*shares: float) -> Explanation:
    ...     pixels, cam = np.zeros((8, 8, 3), np.uint8), np.ones((2, 2), np.float32)
    ...     return Explanation(pixels, ("wren", "robin"), np.array(shares, np.float32), 0, (), cam, "bn2")
    >>> said([model(0.75, 0.25)]), said([model(0.75, 0.25), model(0.5, 0.5)]), said([model(0.75, 0.25), model(0, 1)])
    ('wren, 75 %', 'Both models say wren', 'The models disagree: A says wren, B says robin')
    """
    named = [one.top(1)[0] for one in explanations]
    first, share = named[0]
    if len(named) == 1:
        return f"{first}, {words.percent(share)}"
    if all(name == first for name, _ in named):
        return f"{'Both' if len(named) == 2 else f'All {len(named)}'} models say {first}"
    each = ", ".join(f"{letter(number)} says {name}" for number, (name, _) in enumerate(named))
    same = len({frozenset(one.classes) for one in explanations}) == 1
    return f"The models {'disagree' if same else 'know different classes'}: {each}"


def letter(number: int) -> str:
    """What the page calls a model.

    >>> letter(0), letter(25), letter(26)
    ('A', 'Z', '27')
    """
    return chr(ord("A") + number) if number < 26 else str(number + 1)


def _model_view(explanation: Explanation) -> dict[str, Any]:
    height, width = explanation.pixels.shape[:2]
    return {
        "photo": photo_uri(explanation.pixels),
        "width": width,
        "height": height,
        "top": top_view(explanation),
        "cam": {
            "of": explanation.classes[explanation.target],
            "layer": explanation.cam_layer,
            "image": map_uri(explanation.cam, SIDE),
        },
        "layers": [layer_view(layer, SIDE) for layer in explanation.layers],
    }
