"""The models to measure: each as a file for every backend, with what it must output."""

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ulsam import runtime
from ulsam.base.errors import UlsamError
from ulsam.base.files import write_atomic
from ulsam.data.images import Pixels
from ulsam.deploy.bench_worker import BenchBackend
from ulsam.deploy.engines import check_openvino
from ulsam.deploy.export import engine_of
from ulsam.deploy.onnx_graph import check_installed
from ulsam.deploy.parity import TOLERANCE, generated_images
from ulsam.deploy.quantize import QUANTIZATION
from ulsam.model.build import build, file_content, load, meta_model, spec_of_name
from ulsam.model.pretrained import is_hub_name, means_file
from ulsam.model.spec import ModelSpec
from ulsam.surgery.cost import Cost, cost
from ulsam.training.evaluate import logits_of, spec_transform
from ulsam.training.machine import why_not_compiled
from ulsam.training.predict import Logits

INT8_TOLERANCE = 0.15
"""As `ulsam.deploy.parity.TOLERANCE`, between two engines that each round maps to a byte in their own way.

OpenVINO's logits of quantized MobileNets were found 4 to 6 % from ONNX Runtime's, with the same first classes."""


@dataclass(frozen=True)
class BenchModel:
    """A model to measure.

    Attributes:
        name: as it was asked for.
        pixels: generated images at its size, RGB bytes [B, H, W, 3].
        files: by the backends that can run it.
        logits: what it outputs: by PyTorch, not folded; by ONNX Runtime for an ONNX file.
        tolerance: share of the largest logit by which a backend's logits may differ from those.
        cost: parameters, MACs and activations; None for an ONNX file without a spec.
    """

    name: str
    pixels: Pixels
    files: dict[BenchBackend, str]
    logits: Callable[[Pixels], Logits]
    tolerance: float
    cost: Cost | None

    def images(self, batch: int) -> Pixels:
        """So many of its images, again and again."""
        return np.resize(self.pixels, (batch, *self.pixels.shape[1:]))


def check_backends(backends: Collection[str]) -> None:
    """Raise unless everything is installed that these backends need.

    Raises:
        UlsamError: something is missing.

    >>> check_backends(["eager"])
    """
    if "compile" in backends and (lack := why_not_compiled()):
        raise UlsamError(f"`backends=compile`: {lack}; install it")
    for backend in ("onnxruntime", "openvino"):
        if backend in backends:
            check_installed(f"`backends={backend}`")
    if "openvino" in backends:
        check_openvino("`backends=openvino`")


def open_bench_model(
    name: str, backends: Collection[BenchBackend], folder: Path, size: int | None = None
) -> BenchModel:
    """A model, and its files for those of the backends that can run it.

    Args:
        name: a timm name, whose weights are then random, a model of the hub, a model file, a run's folder, a trained
            model of the package, or an ONNX file of `ulsam export` or `ulsam quantize`, which PyTorch does not run.
        folder: to write files into; an own one for each model.
        size: height and width in place of the model's own.

    Raises:
        UlsamError: no such model, it cannot be exported, or not with this size.
    """
    return _open_onnx(name, backends, size) if name.endswith(".onnx") else _open_torch(name, backends, folder, size)


def _open_onnx(name: str, backends: Collection[BenchBackend], size: int | None) -> BenchModel:
    model = runtime.load(name)
    look, text = model.preprocessing, model.metadata.get(runtime.SPEC)
    spec = ModelSpec.from_json(text) if text else None
    if size is not None and look.size != (size, size):
        if not model.any_size:
            raise UlsamError(f"`size={size}`: {name} was exported for images of {'x'.join(map(str, look.size))}")
        look = dataclasses.replace(look, size=(size, size))
        spec = spec and dataclasses.replace(spec, input_size=(look.channels, size, size))
    return BenchModel(
        name,
        generated_images(look.size, look.channels),
        {backend: name for backend in backends if backend in ("onnxruntime", "openvino")},
        model.logits,
        INT8_TOLERANCE if QUANTIZATION in model.metadata else TOLERANCE,
        _cost(spec) if spec else None,
    )


def _open_torch(name: str, backends: Collection[BenchBackend], folder: Path, size: int | None) -> BenchModel:
    if is_hub_name(name):
        model, spec = load(name)
        spec = spec if size is None else dataclasses.replace(spec, input_size=(spec.input_size[0], size, size))
    else:
        spec = spec_of_name(name, size=size)
        model = load(name)[0] if means_file(name) else build(spec)[0].eval()
    transform = spec_transform(spec)
    model_file, onnx_file = folder / "model.safetensors", folder / "model.onnx"
    write_atomic(model_file, file_content(model, spec))  # the spec built the model: nothing to compare
    if {"onnxruntime", "openvino"} & set(backends):
        spec.check_classes(f"{name}, which is to be exported,")
        write_atomic(onnx_file, engine_of(model, spec).files[".onnx"])
    files = {backend: str(model_file if backend in ("eager", "compile") else onnx_file) for backend in backends}
    pixels = generated_images(transform.preprocessing.size, transform.channels)
    return BenchModel(name, pixels, files, logits_of(model, transform), TOLERANCE, _cost(spec))


def _cost(spec: ModelSpec) -> Cost:
    return cost(meta_model(spec), spec.input_size)
