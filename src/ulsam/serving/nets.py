"""The net behind a service: an exported one without PyTorch, or a model file, folded."""

from collections.abc import Callable
from dataclasses import dataclass

from ulsam import runtime
from ulsam.data.pictures import Pixels
from ulsam.data.preprocessing import Preprocessing
from ulsam.errors import UlsamError
from ulsam.prediction import Logits


@dataclass(frozen=True)
class Net:
    """What is served."""

    classes: tuple[str, ...]
    preprocessing: Preprocessing
    logits: Callable[[Pixels], Logits]  # [B, classes] of RGB bytes [B, H, W, 3] at the net's size


def open_net(model: str, threads: int | None = None) -> Net:
    """Open a model file on the CPU, or a file that `ulsam export --to onnx` or `ulsam quantize` wrote.

    Args:
        model: its path.
        threads: CPU threads that compute a batch; by default one a core.

    Raises:
        UlsamError: as of `ulsam.load` or `ulsam.runtime.load`; or no threads.

    >>> open_net("birds.onnx")
    Traceback (most recent call last):
    ulsam.errors.UlsamError: no exported net birds.onnx
    """
    if threads is not None and threads < 1:
        raise UlsamError(f"--threads must be 1 or more, not {threads}")
    if model.endswith(".onnx"):
        exported = runtime.load(model, threads=threads)
        return Net(exported.classes, exported.preprocessing, exported.logits)

    import torch

    from ulsam.evaluate import logits_of, recipe_transform
    from ulsam.folding import fold
    from ulsam.models import load

    if threads is not None:
        torch.set_num_threads(threads)
    net, recipe = load(model)
    transform = recipe_transform(recipe)
    return Net(tuple(recipe.classes), transform.preprocessing, logits_of(fold(net, recipe.input_size), transform))
