"""Grad-CAM++: where the evidence for a class lies (Chattopadhay et al., WACV 2018, arXiv 1710.11063)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ulsam.base.errors import UlsamError
from ulsam.base.eval_mode import eval_mode
from ulsam.surgery.trace import is_feature_map


def grad_cam_plus_plus(features: Tensor, gradients: Tensor) -> Tensor:
    """The maps of Grad-CAM++ for the exponential of a class score, each between 0 and 1.

    With features A of channel k and the score's gradient g (equations 10 to 19 of the paper)::

        alpha_k = g^2 / (2 g^2 + g^3 * sum over positions of A_k)
        map     = relu(sum over k of A_k * (sum over positions of alpha_k * relu(g)))

    TorchCAM 0.5.0 leaves out the division in alpha (it divides a copy), so its maps are others.

    Features below 0, which the paper's models do not have, are left out of the sum in alpha: it would pass through
    zero.

    Args:
        features: A, [B, K, h, w].
        gradients: of each image's score with respect to them, the same shape.

    Returns:
        [B, h, w], each divided by its maximum; 0 everywhere where nothing speaks for the class.

    >>> features = torch.tensor([[[[0.0, 3.0]], [[1.0, 1.0]]]])
    >>> grad_cam_plus_plus(features, torch.tensor([[[[2.0, 2.0]], [[-1.0, -1.0]]]]))
    tensor([[[0., 1.]]])
    """
    ahead = gradients.relu()  # alpha counts only where the gradient is positive: g^2 cancels
    alpha = torch.where(ahead > 0, 1 / (2 + ahead * features.relu().sum((2, 3), keepdim=True)), 0.0)
    weights = (alpha * ahead).sum((2, 3), keepdim=True)
    maps = (weights * features).sum(1).relu()
    highest = maps.amax((1, 2), keepdim=True)
    return torch.where(highest > 0, maps / highest, 0.0)


def cam_layer(model: nn.Module, image: Tensor) -> str:
    """The name of the module whose output is the last feature map [B, K, h, w] of more than one position.

    It is found on one forward pass, in the order in which modules finish, so of nested modules it is the outer one:
    what the global pooling of any CNN takes in. Where more modules output tokens [B, N, C] after it than maps up to
    it, as in a vision transformer behind its patches, it would say little of the model.

    Args:
        model: a classifier; run in eval mode, and left as it was.
        image: an input of it, [1, C, H, W].

    Raises:
        UlsamError: nothing of that shape leads to the outputs, or the model works mostly on tokens.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    >>> cam_layer(model, torch.zeros(1, 3, 9, 9))
    '1'
    """
    feature_maps: list[tuple[str, Tensor]] = []
    tokens = 0  # modules that put them out after the last map

    def note(name: str) -> None:
        def hook(_module: nn.Module, _args: object, output: object) -> None:
            nonlocal tokens
            if isinstance(output, Tensor) and _has_positions(output, image):
                feature_maps.append((name, output))
                tokens = 0
            elif isinstance(output, Tensor):
                tokens += output.ndim == 3

        handles.append(modules[name].register_forward_hook(hook))

    modules: dict[str, nn.Module] = dict(model.named_modules())
    handles: list[RemovableHandle] = []
    try:
        for name in modules:
            note(name)
        with eval_mode(model), torch.enable_grad():
            score = model(image.detach().clone().requires_grad_()).max()
    finally:
        for handle in handles:
            handle.remove()
    outputs = [output for _, output in feature_maps if output.requires_grad]
    used = torch.autograd.grad(score, outputs, allow_unused=True) if outputs else ()
    names = [name for name, output in feature_maps if output.requires_grad]
    leading = [name for name, gradient in zip(names, used, strict=True) if gradient is not None]
    if not leading or tokens > len(leading):
        raise UlsamError(
            f"this {type(model).__name__} has no feature map [B, C, H, W] of several positions before its outputs: "
            "Grad-CAM++ is for CNNs, on images that are not too small for them"
        )
    return leading[-1]


@contextmanager
def watched(model: nn.Module, name: str) -> Iterator[list[Tensor]]:
    """Within it the outputs of the module ``name`` are listed, and scores can be differentiated with respect to them.

    No graph is kept of what lies before that module: a backward pass costs what the head costs.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    outputs: list[Tensor] = []

    def cut(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        outputs.append(output.detach().requires_grad_())
        return outputs[-1].clone()  # which the model may change in place

    handle = model.get_submodule(name).register_forward_hook(cut)
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield outputs
    finally:
        handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)


def upsampled(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps [B, h, w] at the size of the image, [B, H, W], bilinearly.

    >>> upsampled(torch.ones(2, 3, 3), (12, 9)).shape
    torch.Size([2, 12, 9])
    """
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def _has_positions(output: Tensor, image: Tensor) -> bool:
    """Whether this is a feature map of several positions, with the sides of the image in proportion.

    The keys of attention, [B, heads, tokens, channels], are none, and differ from a map in their sides alone.
    """
    if not output.is_floating_point() or not is_feature_map(output.shape, image.shape):
        return False
    (height, width), (rows, columns) = image.shape[2:], output.shape[2:]
    return rows * columns > 1 and 0.5 <= (height / rows) / (width / columns) <= 2
