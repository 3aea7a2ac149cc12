"""What stands around a model in an exported file: the normalization before it, and the change to half precision."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ulsam.data.augment import Normalize


class FromPixels(nn.Module):
    """A model with its normalization before it: RGB bytes [B, H, W, 3] -> the model's outputs.

    >>> import torch
    >>> model = FromPixels(nn.AdaptiveAvgPool2d(1), mean=[0.5] * 3, std=[0.25] * 3)
    >>> model(torch.full((1, 4, 4, 3), 255, dtype=torch.uint8)).flatten()
    tensor([2., 2., 2.])
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        normalize = Normalize(mean, std)
        self.register_buffer("scale", normalize.scale.flatten())
        self.register_buffer("shift", normalize.shift.flatten())

    def forward(self, pixels: Tensor) -> Any:
        width, channels = pixels.shape[2:]
        # floats first: TensorRT takes bytes nowhere but in a cast. By rows: ONNX Runtime keeps the channels of a
        # quantized model last, and is slow at steps of three values
        rows = pixels.float().flatten(2) * self.scale.repeat(width) + self.shift.repeat(width)
        # contiguous: PyTorch's pooling in channels_last is exported with a dozen operations on indices
        return self.model(rows.unflatten(2, (width, channels)).permute(0, 3, 1, 2).contiguous())


class FromImage(FromPixels):
    """The same for engines whose images are floats 0..255, [B, 3, H, W].

    >>> import torch
    >>> model = FromImage(nn.AdaptiveAvgPool2d(1), mean=[0.5] * 3, std=[0.25] * 3)
    >>> model(torch.full((1, 3, 4, 4), 255.0)).flatten()
    tensor([2., 2., 2.])
    """

    def forward(self, pixels: Tensor) -> Any:
        return self.model(pixels * self.scale[:, None, None] + self.shift[:, None, None])


class InHalf(nn.Module):
    """A model in float16 that takes and gives float32; ``model`` itself is changed.

    >>> import torch
    >>> model = InHalf(nn.Linear(2, 1))
    >>> model.model.weight.dtype, model(torch.ones(1, 2)).dtype
    (torch.float16, torch.float32)
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.half()

    def forward(self, x: Tensor) -> Any:
        return self.model(x.half()).float()
