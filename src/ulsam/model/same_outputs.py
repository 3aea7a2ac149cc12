"""Whether two models with the same weights are the same function."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ulsam.base.errors import UlsamError, first_line
from ulsam.base.eval_mode import eval_mode
from ulsam.surgery.edited import reference_tensor


@torch.no_grad()
def check_same_outputs(model: nn.Module, other: nn.Module, input_size: Sequence[int]) -> None:
    """Raise unless the two output the same for one random image; weights do not show strides, activations or padding.

    Args:
        model: on any device, of any floating-point type.
        other: what the spec builds, with the weights of ``model``; is moved to its device and type.
        input_size: C, H, W of the image.

    Raises:
        UlsamError: their outputs differ by more than rounding does, or ``model`` does not run on such an image.

    >>> check_same_outputs(nn.ReLU(), nn.SiLU(), (3, 8, 8))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ulsam.base.errors.UlsamError: the model computes something else than what its spec builds, ...
    """
    like = reference_tensor(model, model)
    image = torch.randn(1, *input_size, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)
    try:
        ours, theirs = (_outputs(one, image) for one in (model, other.to(like.device, like.dtype)))
    except RuntimeError as error:
        size = "x".join(map(str, input_size))
        raise UlsamError(f"the model does not run on an image of its spec, {size}: {first_line(error)}") from error
    rounding = (1e-3 if like.dtype in (torch.float32, torch.float64) else 5e-2) * float(theirs.abs().nan_to_num().max())
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=0, atol=rounding, equal_nan=True):
        raise UlsamError(
            "the model computes something else than what its spec builds, with the same weights: give the spec the "
            "`model_args` that the model was made with, such as act_layer or pad_type"
        )


def _outputs(model: nn.Module, image: Tensor) -> Tensor:
    with eval_mode(model):
        found: Tensor = model(image)
    return found.float()
