"""An exported net in the place of a net of PyTorch, to be measured by the same code on the same pictures."""

import os

import torch
from torch import Tensor, nn

from ulsam import runtime
from ulsam.data.augment import EvalTransform, Normalise
from ulsam.errors import UlsamError
from ulsam.evaluate import recipe_transform
from ulsam.recipe import Recipe


class Exported(nn.Module):
    """RGB bytes [B, H, W, 3] -> logits [B, classes], by ONNX Runtime on the CPU."""

    def __init__(self, net: runtime.Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.net.logits(images.numpy()))


class Bytes(Normalise):
    """Leaves the pictures as they are: an exported net normalises them itself."""

    def __init__(self) -> None:
        super().__init__([0.0] * 3, [1.0] * 3)

    def __call__(self, images: Tensor) -> Tensor:
        return images


def load_exported(path: str | os.PathLike[str]) -> tuple[Exported, Recipe, EvalTransform]:
    """An exported net, its recipe, and the transform whose batches it takes.

    Raises:
        UlsamError: as of `ulsam.runtime.load`, or the file holds no recipe.
    """
    net = runtime.load(path)
    if runtime.RECIPE not in net.metadata:
        raise UlsamError(f"{path} holds no recipe: write it by ulsam export MODEL --to onnx")
    recipe = Recipe.from_json(net.metadata[runtime.RECIPE])
    transform = recipe_transform(recipe)
    transform.normalise = Bytes()
    return Exported(net), recipe, transform
