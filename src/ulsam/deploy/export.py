"""A trained model as a file for other engines, checked against the model itself before it is written."""

import json
import os
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ulsam import __version__
from ulsam.base.errors import UlsamError
from ulsam.base.files import check_writable, write_atomic
from ulsam.data.augment import Normalise
from ulsam.data.folder import image_paths
from ulsam.deploy.engines import Engine, executorch_engine, onnx_engine, openvino_engine
from ulsam.deploy.parity import Parity, compared, generated_images, read_images
from ulsam.model.given import model_and_spec
from ulsam.model.spec import ModelSpec
from ulsam.runtime import CLASSES, PREPROCESSING, SPEC, VERSION
from ulsam.surgery.fold import fold
from ulsam.training.evaluate import spec_transform

Format = Literal["onnx", "openvino", "executorch"]

SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "openvino": ".xml", "executorch": ".pte"}
"""What the files of a format are called."""

_ENGINES = {"onnx": onnx_engine, "openvino": openvino_engine, "executorch": executorch_engine}


class FromPixels(nn.Module):
    """A model with its normalization before it: bytes [B, H, W, C] -> the model's outputs.

    >>> model = FromPixels(nn.AdaptiveAvgPool2d(1), mean=[0.5] * 3, std=[0.25] * 3)
    >>> model(torch.full((1, 4, 4, 3), 255, dtype=torch.uint8)).flatten()
    tensor([2., 2., 2.])
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        normalise = Normalise(mean, std)
        self.register_buffer("scale", normalise.scale.flatten())
        self.register_buffer("shift", normalise.shift.flatten())

    def forward(self, pixels: Tensor) -> Any:
        width, channels = pixels.shape[2:]
        # by rows: ONNX Runtime keeps the channels of a quantized model last, and is slow at steps of three values
        rows = pixels.flatten(2).float() * self.scale.repeat(width) + self.shift.repeat(width)
        # contiguous: PyTorch's pooling in channels_last is exported with a dozen operations on indices
        return self.model(rows.unflatten(2, (width, channels)).permute(0, 3, 1, 2).contiguous())


@torch.inference_mode(False)
def export(
    model: nn.Module | str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: Format = "onnx",
    *,
    spec: ModelSpec | None = None,
    dynamic_size: bool = False,
    preprocessing: bool = True,
    images: Sequence[str | os.PathLike[str]] = (),
) -> Parity:
    """Write a model as a file for another engine, after running that file beside the model.

    The model is folded (`ulsam.fold`). The file's input is ``pixels``, RGB bytes [batch, H, W, 3], as cameras and
    image decoders give them, which it normalizes itself; of other channels [batch, H, W, C]. Its output is ``logits``
    [batch, classes]. Resizing is left outside: no engine's equals Pillow's, with which the model was trained;
    `ulsam.runtime` does it. The file holds the names of the classes, the preprocessing, the spec and ulsam's version
    (`ulsam.runtime` names the keys).

    Args:
        model: a model file, the name of a trained model of the package, or a model in memory.
        out: the file to write; its suffix is that of the format, `SUFFIXES`. OpenVINO's weights go beside it, ``.bin``.
        to: the format. ExecuTorch's files take one image at a time.
        spec: of a model in memory, as of `ulsam.load`.
        dynamic_size: whether H and W are free too; not for ExecuTorch.
        preprocessing: False for an input ``x``, float [batch, 3, H, W], which is normalized already.
        images: files, or folders of them, to compare on, 64 of them at most; by default 16 generated ones.

    Returns:
        How far the file's outputs are from the model's.

    Raises:
        UlsamError: the outputs differ by more than `ulsam.deploy.parity.TOLERANCE` allows; a package is missing; the
            model cannot be exported; the file cannot be written. There is no new file then.

    >>> from ulsam.model.build import build, make_spec
    >>> spec = make_spec("mobilenetv2_050", ["cat", "dog"], size=32)
    >>> export(build(spec)[0], "cats.pt", spec=spec)
    Traceback (most recent call last):
    ulsam.base.errors.UlsamError: a file for onnx is called NAME.onnx, not cats.pt
    """
    if to not in get_args(Format):
        raise UlsamError(f"unknown format {to!r}; valid: {', '.join(get_args(Format))}")
    path = os.fspath(out)
    if not path.endswith(SUFFIXES[to]):
        raise UlsamError(f"a file for {to} is called NAME{SUFFIXES[to]}, not {path}")
    check_writable(path)
    model, spec = model_and_spec(model, spec)
    look = spec_transform(spec).preprocessing
    files = image_paths([os.fspath(image) for image in images])
    wanted = read_images(files, look) if images else list(generated_images(look.size, look.channels))
    engine = engine_of(model, spec, to, dynamic_size=dynamic_size, preprocessing=preprocessing)
    parity = compared(model, engine.run, look, wanted, pixels=preprocessing, one_by_one=engine.one_by_one)
    if dynamic_size:  # another size too, with another shape
        larger = [image.repeat(2, 0)[: 3 * look.size[0] // 2, :, :].repeat(2, 1) for image in wanted[:4]]
        parity += compared(model, engine.run, look, larger, pixels=preprocessing)
    parity = parity.of(drawn=not images)
    parity.check(to)
    for suffix, content in engine.files.items():
        write_atomic(path.removesuffix(SUFFIXES[to]) + suffix, content)
    return parity


@torch.inference_mode(False)
def engine_of(
    model: nn.Module,
    spec: ModelSpec,
    to: Format = "onnx",
    *,
    dynamic_size: bool = False,
    preprocessing: bool = True,
) -> Engine:
    """The model in another engine, ready to run, and what its files would hold; otherwise as :func:`export`."""
    channels, height, width = spec.input_size
    look = spec_transform(spec).preprocessing
    folded = fold(model, spec.input_size, channels_last=False).to("cpu").float()
    if dynamic_size:  # a map of one pixel in the example would be taken for one of a pixel whatever the size
        height, width = 2 * height, 2 * width
    example = torch.zeros(2, channels, height, width)
    sizes = (2, 3)
    if preprocessing:
        folded, sizes = FromPixels(folded, spec.mean, spec.std).eval(), (1, 2)
        example = torch.zeros(2, height, width, channels, dtype=torch.uint8)
    free = {0: "batch", **(dict(zip(sizes, ("height", "width"), strict=True)) if dynamic_size else {})}
    metadata = {
        VERSION: __version__,
        CLASSES: json.dumps(spec.classes, ensure_ascii=False),
        PREPROCESSING: look.to_json(),
        SPEC: spec.to_json(),
    }
    return _ENGINES[to](folded, example, free, metadata)
