"""The models of the page, and what they find on one uploaded image."""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from ulsam.base.errors import printable
from ulsam.data.images import read_pixels
from ulsam.explanation.captions import model_name
from ulsam.explanation.explainer import Explainer
from ulsam.explanation.explanation import Explanation
from ulsam.explanation.measured_batches import look
from ulsam.model.given import model_and_spec


@dataclass(frozen=True)
class ExploredModel:
    """A model of the page."""

    file: str  # as it was named
    name: str  # the base model and its edits
    explainer: Explainer


def open_models(files: Sequence[str | os.PathLike[str]]) -> list[ExploredModel]:
    """Load model files.

    Raises:
        UlsamError: not a model file, or a model without a feature map to explain.
    """
    models = []
    for file in files:
        model, spec = model_and_spec(file)
        models.append(ExploredModel(printable(os.fspath(file)), model_name(spec), Explainer(model, spec)))
    return models


def explain_upload(models: Sequence[ExploredModel], content: bytes, name: str) -> list[Explanation]:
    """What each model finds on an image, read, resized and cropped as for evaluation.

    Args:
        models: each is given its own size and crop of the image.
        content: of the image file.
        name: of the file, for messages.

    Raises:
        UnreadableImage: it is no image, or broken, too large, or a mere line.
        NotFinite: the outputs of a model are not finite.
    """
    given: dict[tuple[object, ...], Tensor] = {}
    found = []
    for model in models:
        key = look(model.explainer.spec)
        if key not in given:
            given[key] = _pixels(model.explainer, content, name)
        found += model.explainer([given[key]])
    return found


def gray_image() -> bytes:
    """A small PNG, to be the first image that models are given: first times are slow.

    >>> len(gray_image()) < 1000
    True
    """
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "gray").save(buffer, "png")
    return buffer.getvalue()


def _pixels(explainer: Explainer, content: bytes, name: str) -> Tensor:
    stream = io.BytesIO(content)
    stream.name = name
    return explainer.transform.pixels(
        read_pixels(stream, explainer.transform.reduction, channels=explainer.transform.channels)
    )
