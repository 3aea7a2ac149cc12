"""The model behind a service: an exported one without PyTorch, or a model file, folded."""

from collections.abc import Callable
from dataclasses import dataclass

from ulsam import runtime
from ulsam.base.errors import UlsamError
from ulsam.data.images import Pixels
from ulsam.data.preprocessing import Preprocessing
from ulsam.training.predict import Logits


@dataclass(frozen=True)
class Model:
    """What is served."""

    classes: tuple[str, ...]
    preprocessing: Preprocessing
    logits: Callable[[Pixels], Logits]  # [B, classes] of RGB bytes [B, H, W, 3] at the model's size


def open_model(model: str, threads: int | None = None) -> Model:
    """Open a model file on the CPU, or a file that `ulsam export --to onnx` or `ulsam quantize` wrote.

    Args:
        model: its path.
        threads: CPU threads that compute a batch; by default one a core.

    Raises:
        UlsamError: as of `ulsam.load` or `ulsam.runtime.load`; or no threads.

    >>> open_model("birds.onnx")
    Traceback (most recent call last):
    ulsam.base.errors.UlsamError: no exported model birds.onnx
    """
    if threads is not None and threads < 1:
        raise UlsamError(f"`threads` must be 1 or more, not {threads}")
    if model.endswith(".onnx"):
        exported = runtime.load(model, threads=threads)
        return Model(exported.classes, exported.preprocessing, exported.logits)

    import torch

    from ulsam.model.build import load
    from ulsam.surgery.fold import fold
    from ulsam.training.evaluate import logits_of, spec_transform

    if threads is not None:
        torch.set_num_threads(threads)
    opened, spec = load(model)
    transform = spec_transform(spec)
    return Model(tuple(spec.classes), transform.preprocessing, logits_of(fold(opened, spec.input_size), transform))
