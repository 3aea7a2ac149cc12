"""The nets of the page, and what they find on one uploaded picture."""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from ulsam.data.pictures import read_pixels
from ulsam.errors import printable
from ulsam.explanation.batches import look
from ulsam.explanation.explainer import Explainer, Explanation
from ulsam.explanation.words import net_name
from ulsam.models import load


@dataclass(frozen=True)
class Net:
    """A net of the page."""

    file: str  # as it was named
    name: str  # the base net and its edits
    explainer: Explainer


def open_nets(files: Sequence[str | os.PathLike[str]]) -> list[Net]:
    """Load model files.

    Raises:
        UlsamError: not a model file, or a net without a feature map to explain.
    """
    nets = []
    for file in files:
        model, recipe = load(file)
        nets.append(Net(printable(os.fspath(file)), net_name(recipe), Explainer(model, recipe)))
    return nets


def explain_upload(nets: Sequence[Net], content: bytes, name: str) -> list[Explanation]:
    """What each net finds on a picture, read, resized and cropped as for evaluation.

    Args:
        nets: each is given its own size and crop of the picture.
        content: of the picture file.
        name: of the file, for messages.

    Raises:
        UnreadablePicture: it is no picture, or broken, too large, or a mere line.
        NotFinite: the outputs of a net are not finite.
    """
    given: dict[tuple[object, ...], Tensor] = {}
    found = []
    for net in nets:
        key = look(net.explainer.recipe)
        if key not in given:
            given[key] = _pixels(net.explainer, content, name)
        found += net.explainer([given[key]])
    return found


def grey_picture() -> bytes:
    """A small PNG, to be the first picture that nets are given: first times are slow.

    >>> len(grey_picture()) < 1000
    True
    """
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "grey").save(buffer, "png")
    return buffer.getvalue()


def _pixels(explainer: Explainer, content: bytes, name: str) -> Tensor:
    stream = io.BytesIO(content)
    stream.name = name
    return explainer.transform.pixels(read_pixels(stream, explainer.transform.reduction))
