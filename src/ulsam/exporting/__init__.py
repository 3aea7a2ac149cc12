"""A trained net as a file for other engines, checked against the net itself before it is written."""

import json
import os
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ulsam import __version__
from ulsam.data.augment import Normalise
from ulsam.errors import UlsamError
from ulsam.evaluate import recipe_transform
from ulsam.exporting.engines import Engine, executorch_engine, onnx_engine, openvino_engine
from ulsam.exporting.parity import Parity, compared, drawn_images, read_images
from ulsam.files import check_writable, write_atomic
from ulsam.folding import fold
from ulsam.recipe import Recipe
from ulsam.runtime import CLASSES, PREPROCESSING, RECIPE, VERSION

Format = Literal["onnx", "openvino", "executorch"]

SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "openvino": ".xml", "executorch": ".pte"}
"""What the files of a format are called."""

_ENGINES = {"onnx": onnx_engine, "openvino": openvino_engine, "executorch": executorch_engine}


class FromPixels(nn.Module):
    """A net with its normalisation before it: RGB bytes [B, H, W, 3] -> the net's outputs.

    >>> net = FromPixels(nn.AdaptiveAvgPool2d(1), mean=[0.5] * 3, std=[0.25] * 3)
    >>> net(torch.full((1, 4, 4, 3), 255, dtype=torch.uint8)).flatten()
    tensor([2., 2., 2.])
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, net: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.net = net
        normalise = Normalise(mean, std)
        self.register_buffer("scale", normalise.scale.flatten())
        self.register_buffer("shift", normalise.shift.flatten())

    def forward(self, pixels: Tensor) -> Any:
        width, channels = pixels.shape[2:]
        # by rows: ONNX Runtime keeps the channels of a quantised net last, and is slow at steps of three values
        rows = pixels.flatten(2).float() * self.scale.repeat(width) + self.shift.repeat(width)
        # contiguous: PyTorch's pooling in channels_last is exported with a dozen operations on indices
        return self.net(rows.unflatten(2, (width, channels)).permute(0, 3, 1, 2).contiguous())


@torch.inference_mode(False)
def export(
    model: nn.Module,
    recipe: Recipe,
    path: str | os.PathLike[str],
    to: Format = "onnx",
    *,
    dynamic_size: bool = False,
    preprocessing: bool = True,
    pictures: Sequence[str | os.PathLike[str]] = (),
) -> Parity:
    """Write a net as a file for another engine, after running that file beside the net.

    The net is folded (`ulsam.fold`). The file's input is ``pixels``, RGB bytes [batch, H, W, 3], as cameras and
    picture decoders give them, which it normalises itself; its output is ``logits`` [batch, classes]. Resizing is left
    outside: no engine's equals Pillow's, with which the net was trained; `ulsam.runtime` does it. The file holds the
    names of the classes, the preprocessing, the recipe and ulsam's version (`ulsam.runtime` names the keys).

    Args:
        model, recipe: as of `ulsam.load`.
        path: to write; its suffix is that of the format, `SUFFIXES`. OpenVINO's weights go beside it, ``.bin``.
        to: the format. ExecuTorch's files take one picture at a time.
        dynamic_size: whether H and W are free too; not for ExecuTorch.
        preprocessing: False for an input ``x``, float [batch, 3, H, W], which is normalised already.
        pictures: files to compare on, 64 of them at most; by default 16 drawn birds.

    Returns:
        How far the file's outputs are from the net's.

    Raises:
        UlsamError: the outputs differ by more than `ulsam.exporting.parity.TOLERANCE` allows; a package is missing; the
            net cannot be exported; the file cannot be written. There is no new file then.

    >>> from ulsam.models import build, make_recipe
    >>> recipe = make_recipe("mobilenetv2_050", ["cat", "dog"], size=32)
    >>> export(build(recipe)[0], recipe, "cats.pt")
    Traceback (most recent call last):
    ulsam.errors.UlsamError: a file for onnx is called NAME.onnx, not cats.pt
    """
    if to not in get_args(Format):
        raise UlsamError(f"unknown format {to!r}; valid: {', '.join(get_args(Format))}")
    path = os.fspath(path)
    if not path.endswith(SUFFIXES[to]):
        raise UlsamError(f"a file for {to} is called NAME{SUFFIXES[to]}, not {path}")
    check_writable(path)
    look = recipe_transform(recipe).preprocessing
    images = read_images(pictures, look) if pictures else drawn_images(look)
    engine = engine_of(model, recipe, to, dynamic_size=dynamic_size, preprocessing=preprocessing)
    parity = compared(model, engine.run, look, images, pixels=preprocessing, one_by_one=engine.one_by_one)
    if dynamic_size:  # another size too, with another shape
        larger = [image.repeat(2, 0)[: 3 * look.size[0] // 2, :, :].repeat(2, 1) for image in images[:4]]
        parity += compared(model, engine.run, look, larger, pixels=preprocessing)
    parity = parity.of(drawn=not pictures)
    parity.check(to)
    for suffix, content in engine.files.items():
        write_atomic(path.removesuffix(SUFFIXES[to]) + suffix, content)
    return parity


@torch.inference_mode(False)
def engine_of(
    model: nn.Module,
    recipe: Recipe,
    to: Format = "onnx",
    *,
    dynamic_size: bool = False,
    preprocessing: bool = True,
) -> Engine:
    """The net in another engine, ready to run, and what its files would hold; otherwise as :func:`export`."""
    channels, height, width = recipe.input_size
    look = recipe_transform(recipe).preprocessing
    folded = fold(model, recipe.input_size, channels_last=False).to("cpu").float()
    if dynamic_size:  # a map of one pixel in the example would be taken for one of a pixel whatever the size
        height, width = 2 * height, 2 * width
    example = torch.zeros(2, channels, height, width)
    sizes = (2, 3)
    if preprocessing:
        folded, sizes = FromPixels(folded, recipe.mean, recipe.std).eval(), (1, 2)
        example = torch.zeros(2, height, width, channels, dtype=torch.uint8)
    free = {0: "batch", **(dict(zip(sizes, ("height", "width"), strict=True)) if dynamic_size else {})}
    metadata = {
        VERSION: __version__,
        CLASSES: json.dumps(recipe.classes, ensure_ascii=False),
        PREPROCESSING: look.to_json(),
        RECIPE: recipe.to_json(),
    }
    return _ENGINES[to](folded, example, free, metadata)
