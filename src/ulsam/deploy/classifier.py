"""A model that is ready for images, whatever runs it: PyTorch, or ONNX Runtime alone for an exported file."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

from ulsam import runtime
from ulsam.base.errors import UlsamError
from ulsam.data.images import Pixels
from ulsam.data.preprocessing import Preprocessing
from ulsam.training.predict import Logits

if TYPE_CHECKING:
    from torch import nn

    from ulsam.model.spec import ModelSpec


@dataclass(frozen=True)
class Classifier:
    """A model and what its images and outputs are."""

    classes: tuple[str, ...]
    preprocessing: Preprocessing
    logits: Callable[[Pixels], Logits]  # [B, classes] of RGB bytes [B, H, W, 3] at the model's size


def open_classifier(
    model: Union["nn.Module", str, os.PathLike[str]],
    spec: "ModelSpec | None" = None,
    *,
    threads: int | None = None,
    folded: bool = False,
) -> Classifier:
    """Open what `ulsam predict` and `ulsam serve` run. PyTorch is not imported for an exported file.

    Args:
        model: a model file, the name of a trained model of the package, NAME.onnx of `ulsam export` or `ulsam
            quantize`; or a model in memory, on any device.
        spec: of a model in memory, as of `ulsam.load`.
        threads: CPU threads that compute a batch; by default one a core.
        folded: whether PyTorch runs the folded model (`ulsam.fold`); an exported one is folded always.

    Raises:
        UlsamError: as of `ulsam.load` or `ulsam.runtime.load`; or no threads.

    >>> open_classifier("birds.onnx")
    Traceback (most recent call last):
    ulsam.base.errors.UlsamError: no exported model birds.onnx
    """
    if threads is not None and threads < 1:
        raise UlsamError(f"`threads` must be 1 or more, not {threads}")
    if isinstance(model, str | os.PathLike) and os.fspath(model).endswith(".onnx"):
        exported = runtime.load(model, threads=threads)
        return Classifier(exported.classes, exported.preprocessing, exported.logits)

    import torch

    from ulsam.model.given import model_and_spec
    from ulsam.surgery.fold import fold
    from ulsam.training.evaluate import logits_of, spec_transform

    if threads is not None:
        torch.set_num_threads(threads)
    module, spec = model_and_spec(model, spec)
    transform = spec_transform(spec)
    logits = logits_of(fold(module, spec.input_size) if folded else module, transform)
    return Classifier(tuple(spec.classes), transform.preprocessing, logits)
