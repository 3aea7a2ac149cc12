"""A trained model as a file for other engines, checked against the model itself before it is written."""

import json
import os
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import nn

from ulsam import __version__
from ulsam.base.errors import UlsamError
from ulsam.base.files import check_writable, write_atomic, write_folder
from ulsam.data.folder import image_paths
from ulsam.deploy.coreml_engine import coreml_engine
from ulsam.deploy.engines import ExportedEngine, executorch_engine, onnx_engine, openvino_engine
from ulsam.deploy.input_forms import FromImage, FromPixels, InHalf
from ulsam.deploy.parity import HALF_TOLERANCE, TOLERANCE, Parity, compared, generated_images, read_images
from ulsam.deploy.tflite_engine import tflite_engine
from ulsam.model.given import model_and_spec
from ulsam.model.spec import ModelSpec
from ulsam.runtime import CLASSES, PRECISION, PREPROCESSING, SPEC, THRESHOLDS, VERSION
from ulsam.surgery.fold import fold
from ulsam.training.evaluate import spec_transform
from ulsam.training.predict import check_outputs

Format = Literal["onnx", "openvino", "executorch", "coreml", "tflite"]

SUFFIXES: dict[Format, str] = {
    "onnx": ".onnx",
    "openvino": ".xml",
    "executorch": ".pte",
    "coreml": ".mlpackage",
    "tflite": ".tflite",
}
"""What the files of a format are called."""

_ENGINES = {
    "onnx": onnx_engine,
    "openvino": openvino_engine,
    "executorch": executorch_engine,
    "coreml": coreml_engine,
    "tflite": tflite_engine,
}


@torch.inference_mode(False)
def export(
    model: nn.Module | str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: Format | None = None,
    *,
    spec: ModelSpec | None = None,
    half: bool = False,
    dynamic_size: bool = False,
    preprocessing: bool = True,
    images: Sequence[str | os.PathLike[str]] = (),
) -> Parity:
    """Write a model as a file for another engine, after running that file beside the model.

    The model is folded (`ulsam.fold`). The file's input is ``pixels``, RGB bytes [batch, H, W, 3], as cameras and
    image decoders give them, which it normalizes itself; of other channels [batch, H, W, C]. Its output is ``logits``
    [batch, classes]. Resizing is left outside: no engine's equals Pillow's, with which the model was trained;
    `ulsam.runtime` does it. The file holds the names of the classes, the preprocessing, the spec and ulsam's version
    (`ulsam.runtime` names the keys). Of a model that gives several labels an image it also holds their thresholds,
    which probabilities, by a sigmoid, must reach.

    Args:
        model: a model file, the name of a trained model of the package, or a model in memory.
        out: the file to write; its suffix is that of the format, `SUFFIXES`. OpenVINO's weights go beside it, ``.bin``.
            Core ML's is a folder.
        to: the format; by default the one that the suffix of ``out`` means. Files for ExecuTorch, Core ML and LiteRT
            take one image at a time. Core ML's ``pixels`` are an RGB image.
        spec: of a model in memory, as of `ulsam.load`.
        half: float16 in the place of float32: half the size. Files for ONNX and Core ML compute in it too; those for
            OpenVINO and LiteRT hold their weights in it. Input and output stay float32. Not for ExecuTorch.
        dynamic_size: whether H and W are free too; for ONNX and OpenVINO.
        preprocessing: False for an input ``x``, float [batch, 3, H, W], which is normalized already.
        images: files, or folders of them, to compare on, 64 of them at most; by default 16 generated ones.

    Returns:
        How far the file's outputs are from the model's. For Core ML anywhere but on macOS: that they were not compared.

    Raises:
        UlsamError: the outputs differ by more than `ulsam.deploy.parity.TOLERANCE` allows, or `HALF_TOLERANCE` there; a
            package is missing; the model cannot be exported; the file cannot be written. There is no new file then.

    >>> from ulsam.model.build import build, make_spec
    >>> spec = make_spec("mobilenetv2_050", ["cat", "dog"], size=32)
    >>> export(build(spec)[0], "cats.pt", spec=spec)
    Traceback (most recent call last):
    ulsam.base.errors.UlsamError: cats.pt: a file is called NAME.onnx, NAME.xml, NAME.pte, NAME.mlpackage or NAME.tflite
    """
    path = os.fspath(out)
    to = to or format_of(path)
    if to not in get_args(Format):
        raise UlsamError(f"unknown format {to!r}; valid: {', '.join(get_args(Format))}")
    suffix = SUFFIXES[to]
    if not path.endswith(suffix):
        raise UlsamError(f"a file for {to} is called NAME{suffix}, not {path}")
    is_package = os.path.isfile(os.path.join(path, "Manifest.json"))  # of Core ML, a folder that may be replaced
    check_writable(f"{path}.new" if is_package else path)
    model, spec = model_and_spec(model, spec)
    look = spec_transform(spec).preprocessing
    files = image_paths([os.fspath(image) for image in images])
    wanted = read_images(files, look) if images else list(generated_images(look.size, look.channels))
    engine = engine_of(model, spec, to, half=half, dynamic_size=dynamic_size, preprocessing=preprocessing)
    if engine.run is None:
        parity = Parity.unknown(engine.why_not)
    else:
        parity = compared(model, engine.run, look, wanted, pixels=preprocessing, one_by_one=engine.one_by_one)
        if dynamic_size:  # another size too, with another shape
            larger = [image.repeat(2, 0)[: 3 * look.size[0] // 2, :, :].repeat(2, 1) for image in wanted[:4]]
            parity += compared(model, engine.run, look, larger, pixels=preprocessing)
        parity = parity.of(drawn=not images)
        parity.check(to, HALF_TOLERANCE if half else TOLERANCE)
    if inside := {name.removeprefix(f"{suffix}/"): content for name, content in engine.files.items() if "/" in name}:
        write_folder(path, inside)
    else:
        for ending, content in engine.files.items():
            write_atomic(path.removesuffix(suffix) + ending, content)
    return parity


def format_of(path: str) -> Format:
    """The format that the name of a file means.

    Raises:
        UlsamError: none.

    >>> format_of("birds.mlpackage")
    'coreml'
    """
    for name, suffix in SUFFIXES.items():
        if path.endswith(suffix):
            return name
    *others, last = (f"NAME{suffix}" for suffix in SUFFIXES.values())
    raise UlsamError(f"{path}: a file is called {', '.join(others)} or {last}")


@torch.inference_mode(False)
def engine_of(
    model: nn.Module,
    spec: ModelSpec,
    to: Format = "onnx",
    *,
    half: bool = False,
    dynamic_size: bool = False,
    preprocessing: bool = True,
) -> ExportedEngine:
    """The model in another engine, ready to run, and what its files would hold; otherwise as :func:`export`."""
    channels, height, width = spec.input_size
    look = spec_transform(spec).preprocessing
    folded = fold(model, spec.input_size, channels_last=False).to("cpu").float()
    with torch.no_grad():
        check_outputs(folded(torch.zeros(1, channels, height, width)).shape, spec.classes)
    if half and to == "onnx":  # others do it themselves
        folded = InHalf(folded).eval()
    if dynamic_size:  # a map of one pixel in the example would be taken for one of a pixel whatever the size
        height, width = 2 * height, 2 * width
    example = torch.zeros(2, channels, height, width)
    sizes = (2, 3)
    if preprocessing and to == "coreml":
        folded = FromImage(folded, spec.mean, spec.std).eval()
    elif preprocessing:
        folded, sizes = FromPixels(folded, spec.mean, spec.std).eval(), (1, 2)
        example = torch.zeros(2, height, width, channels, dtype=torch.uint8)
    free = {0: "batch", **(dict(zip(sizes, ("height", "width"), strict=True)) if dynamic_size else {})}
    metadata = {
        VERSION: __version__,
        CLASSES: json.dumps(spec.classes, ensure_ascii=False),
        PREPROCESSING: look.to_json(),
        SPEC: spec.to_json(),
        **({PRECISION: "float16"} if half else {}),
    }
    if spec.thresholds is not None:
        metadata[THRESHOLDS] = json.dumps(spec.thresholds)
    return _ENGINES[to](folded, example, free, metadata, half)
