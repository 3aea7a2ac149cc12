"""The nets to measure: each as a file for every backend, with what it must put out."""

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ulsam import runtime
from ulsam.benchmarking.worker import Backend
from ulsam.costs import Cost, cost
from ulsam.data.pictures import Pixels
from ulsam.errors import UlsamError
from ulsam.evaluate import logits_of, recipe_transform
from ulsam.exporting import engine_of
from ulsam.exporting.engines import check_openvino
from ulsam.exporting.onnx_graph import check_installed
from ulsam.exporting.parity import TOLERANCE, drawn_images
from ulsam.files import write_atomic
from ulsam.models import build, load, recipe_of, save_model, sketch
from ulsam.prediction import Logits
from ulsam.quantization import QUANTIZATION
from ulsam.recipe import Recipe
from ulsam.train.machine import why_not_compiled
from ulsam.trained import names

INT8_TOLERANCE = 0.15
"""As `ulsam.exporting.parity.TOLERANCE`, between two engines that each round maps to a byte in their own way.

OpenVINO's logits of quantised MobileNets were found 4 to 6 % from ONNX Runtime's, with the same first classes."""


@dataclass(frozen=True)
class BenchNet:
    """A net to measure.

    Attributes:
        name: as it was asked for.
        birds: drawn pictures at its size, RGB bytes [B, H, W, 3].
        files: by the backends that can run it.
        logits: what it puts out: by PyTorch, not folded; by ONNX Runtime for an ONNX file.
        tolerance: share of the largest logit by which a backend's logits may differ from those.
        cost: parameters, MACs and activations; None for an ONNX file without a recipe.
    """

    name: str
    birds: Pixels
    files: dict[Backend, str]
    logits: Callable[[Pixels], Logits]
    tolerance: float
    cost: Cost | None

    def images(self, batch: int) -> Pixels:
        """So many of its birds, again and again."""
        return np.resize(self.birds, (batch, *self.birds.shape[1:]))


def check_backends(backends: Collection[str]) -> None:
    """Raise unless everything is installed that these backends need.

    Raises:
        UlsamError: something is missing.

    >>> check_backends(["eager"])
    """
    if "compile" in backends and (lack := why_not_compiled()):
        raise UlsamError(f"--backends compile: {lack}; install it")
    for backend in ("onnxruntime", "openvino"):
        if backend in backends:
            check_installed(f"--backends {backend}")
    if "openvino" in backends:
        check_openvino("--backends openvino")


def open_net(name: str, backends: Collection[Backend], folder: Path, size: int | None = None) -> BenchNet:
    """A net, and its files for those of the backends that can run it.

    Args:
        name: a timm name, whose weights are then random, a model file, a trained net of the package, or an ONNX file of
            `ulsam export` or `ulsam quantize`, which PyTorch does not run.
        folder: to write files into; an own one for each net.
        size: height and width in place of the net's own.

    Raises:
        UlsamError: no such net, it does not take RGB pictures, it cannot be exported, or not with this size.
    """
    return _open_onnx(name, backends, size) if name.endswith(".onnx") else _open_torch(name, backends, folder, size)


def _open_onnx(name: str, backends: Collection[Backend], size: int | None) -> BenchNet:
    net = runtime.load(name)
    look, text = net.preprocessing, net.metadata.get(runtime.RECIPE)
    recipe = Recipe.from_json(text) if text else None
    if size is not None and look.size != (size, size):
        if not net.any_size:
            raise UlsamError(f"--size {size}: {name} was exported for pictures of {'x'.join(map(str, look.size))}")
        look = dataclasses.replace(look, size=(size, size))
        recipe = recipe and dataclasses.replace(recipe, input_size=(3, size, size))
    return BenchNet(
        name,
        np.stack(drawn_images(look)),
        {backend: name for backend in backends if backend in ("onnxruntime", "openvino")},
        net.logits,
        INT8_TOLERANCE if QUANTIZATION in net.metadata else TOLERANCE,
        _cost(recipe) if recipe else None,
    )


def _open_torch(name: str, backends: Collection[Backend], folder: Path, size: int | None) -> BenchNet:
    recipe = recipe_of(name, size=size)
    transform = recipe_transform(recipe)
    is_file = name.endswith(".safetensors") or name in names()
    model = load(name)[0] if is_file else build(recipe)[0].eval()
    model_file, onnx_file = folder / "net.safetensors", folder / "net.onnx"
    save_model(model, recipe, model_file)
    if {"onnxruntime", "openvino"} & set(backends):
        write_atomic(onnx_file, engine_of(model, recipe).files[".onnx"])
    files = {backend: str(model_file if backend in ("eager", "compile") else onnx_file) for backend in backends}
    birds = np.stack(drawn_images(transform.preprocessing))
    return BenchNet(name, birds, files, logits_of(model, transform), TOLERANCE, _cost(recipe))


def _cost(recipe: Recipe) -> Cost:
    return cost(sketch(recipe), recipe.input_size)
