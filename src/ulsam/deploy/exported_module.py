"""An exported model in the place of a model of PyTorch, to be measured by the same code on the same images."""

import os

import torch
from torch import Tensor, nn

from ulsam import runtime
from ulsam.base.errors import UlsamError
from ulsam.data.augment import EvalTransform, Normalize
from ulsam.model.spec import ModelSpec
from ulsam.training.evaluate import spec_transform


class Exported(nn.Module):
    """RGB bytes [B, H, W, 3] -> logits [B, classes], by ONNX Runtime."""

    def __init__(self, model: runtime.Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.model.logits(images.numpy()))


class Bytes(Normalize):
    """Leaves the images as they are: an exported model normalizes them itself."""

    def __init__(self) -> None:
        super().__init__([0.0] * 3, [1.0] * 3)

    def __call__(self, images: Tensor) -> Tensor:
        return images


def load_exported(path: str | os.PathLike[str], device: str = "cpu") -> tuple[Exported, ModelSpec, EvalTransform]:
    """An exported model, its spec, and the transform whose batches it takes.

    Args:
        path: of the file.
        device: that runs it, of `ulsam.base.providers.PROVIDERS`.

    Raises:
        UlsamError: as of `ulsam.runtime.load`, or the file holds no spec.
    """
    model = runtime.load(path, device=device)
    if runtime.SPEC not in model.metadata:
        raise UlsamError(f"{path} holds no spec: write it by `ulsam.export`")
    spec = ModelSpec.from_json(model.metadata[runtime.SPEC])
    transform = spec_transform(spec)
    transform.normalize = Bytes()
    return Exported(model), spec, transform
