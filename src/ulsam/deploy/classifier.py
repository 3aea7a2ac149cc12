"""A model that is ready for images, whatever runs it: PyTorch, or ONNX Runtime alone for an exported file."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

import numpy as np
from numpy.typing import NDArray

from ulsam import runtime
from ulsam.base.errors import UlsamError
from ulsam.data.images import Pixels
from ulsam.data.preprocessing import Preprocessing
from ulsam.training.predict import Logits

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ulsam.model.spec import ModelSpec


@dataclass(frozen=True)
class Classifier:
    """A model and what its images and outputs are."""

    classes: tuple[str, ...]
    preprocessing: Preprocessing
    logits: Callable[[Pixels], Logits]  # [B, classes] of RGB bytes [B, H, W, 3] at the model's size
    thresholds: tuple[float, ...] | None = None  # of each class, where an image may have several labels


def open_classifier(
    model: Union["nn.Module", str, os.PathLike[str]],
    spec: "ModelSpec | None" = None,
    *,
    threads: int | None = None,
    folded: bool = False,
    device: str | None = None,
    features: Callable[[NDArray[np.float32]], None] | None = None,
) -> Classifier:
    """Open what `ulsam predict` and `ulsam serve` run. PyTorch is not imported for an exported file.

    Args:
        model: a model file, the name of a trained model of the package, NAME.onnx of `ulsam export` or `ulsam
            quantize`; or a model in memory, on any device.
        spec: of a model in memory, as of `ulsam.load`.
        threads: CPU threads that compute a batch; by default one a core.
        folded: whether PyTorch runs the folded model (`ulsam.fold`); an exported one is folded always.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``; by default the one that a model in memory is on, else the CPU.
            Of an exported file ``auto``, which is the CPU, or one that `ulsam.runtime.load` takes.
        features: is given what the classifier is given, the pooled features [B, F] of each batch, before its logits are
            returned; by PyTorch alone.

    Raises:
        UlsamError: as of `ulsam.load` or `ulsam.runtime.load`; no threads; no such device; or an exported model that is
            asked for its features.

    >>> open_classifier("birds.onnx")
    Traceback (most recent call last):
    ulsam.base.errors.UlsamError: no exported model birds.onnx
    """
    if threads is not None and threads < 1:
        raise UlsamError(f"`threads` must be 1 or more, not {threads}")
    if isinstance(model, str | os.PathLike) and os.fspath(model).endswith(".onnx"):
        if features:
            raise UlsamError(f"{os.fspath(model)} outputs no features: name the model file that it was made from")
        exported = runtime.load(model, threads=threads, device="cpu" if device in (None, "auto") else device)
        return Classifier(exported.classes, exported.preprocessing, exported.logits, exported.thresholds)

    from ulsam.base.distributed import device_of
    from ulsam.base.threads import cpu_threads
    from ulsam.model.given import model_and_spec
    from ulsam.surgery.fold import fold
    from ulsam.training.evaluate import logits_of, spec_transform

    module, spec = model_and_spec(model, spec)
    if device is not None:
        module = module.to(device_of(device))
    transform = spec_transform(spec)
    run = logits_of(fold(module, spec.input_size) if folded else module, transform)

    def logits(images: Pixels) -> Logits:
        with cpu_threads(threads):
            return run(images)

    shown = _showing(logits, module, features) if features else logits
    return Classifier(tuple(spec.classes), transform.preprocessing, shown, spec.thresholds)


def _showing(
    logits: Callable[[Pixels], Logits], module: "nn.Module", features: Callable[[NDArray[np.float32]], None]
) -> Callable[[Pixels], Logits]:
    """``logits``, which also shows what the classifier of ``module`` is given."""
    from ulsam.model.weights import heads

    outer = heads(module)
    if not outer:
        raise UlsamError("the model has no classifier before which it could be asked for its features")

    def keep(_: "nn.Module", given: "tuple[Tensor, ...]") -> None:
        value = given[0].float()
        features((value.flatten(2).mean(2) if value.dim() > 2 else value).cpu().numpy())

    def shown(images: Pixels) -> Logits:
        handle = outer[0].register_forward_pre_hook(keep)
        try:
            return logits(images)
        finally:
            handle.remove()

    return shown
