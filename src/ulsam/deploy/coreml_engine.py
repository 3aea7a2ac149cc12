"""Core ML's model package, for iOS, iPadOS and macOS; it runs on a Mac alone."""

import contextlib
import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from ulsam.base.errors import UlsamError, first_line
from ulsam.base.extras import extra
from ulsam.deploy.engines import ExportedEngine, RunBatch
from ulsam.deploy.input_forms import FromImage
from ulsam.deploy.onnx_graph import with_attention

MAC_ONLY = "Core ML runs on macOS alone, so the file was not run: export it on a Mac to compare it with the model"


def coreml_engine(
    model: nn.Module, example: Tensor, free: Mapping[int, str], metadata: Mapping[str, str], half: bool
) -> ExportedEngine:
    """An ML program for iOS 15, macOS 12 and later, one image at a time; as `ulsam.deploy.engines.onnx_engine`.

    The input of a `FromImage` is an RGB or gray image, that of another model is an array. The metadata is user-defined
    metadata of the model. With ``half`` the program computes in float16, as the Neural Engine does.

    Raises:
        UlsamError: also for a free size, and for images of other channels.
    """
    if len(free) > 1:
        raise UlsamError("`dynamic_size=True`: a file for Core ML is for one size here; leave it out")
    with extra("coreml", "`to=coreml` needs"), _silent():
        import coremltools
    takes_image, channels = isinstance(model, FromImage), example.shape[1]
    if takes_image and channels not in (1, 3):
        raise UlsamError(f"images for Core ML are RGB or gray, not of {channels} channels: set `preprocessing=False`")
    kind = coremltools.ImageType if takes_image else coremltools.TensorType
    colors = coremltools.colorlayout.RGB if channels == 3 else coremltools.colorlayout.GRAYSCALE
    layout = {"color_layout": colors} if takes_image else {}
    name = "pixels" if takes_image else "x"
    try:
        with _silent(), torch.no_grad():
            program = torch.export.export(with_attention(model)[0], (example[:1],)).run_decompositions({})
            made = coremltools.convert(
                program,
                convert_to="mlprogram",
                inputs=[kind(name, tuple(example[:1].shape), **layout)],
                outputs=[coremltools.TensorType("logits")],
                compute_precision=coremltools.precision.FLOAT16 if half else coremltools.precision.FLOAT32,
                minimum_deployment_target=coremltools.target.iOS15,
                skip_model_load=sys.platform != "darwin",
            )
    except Exception as error:  # whatever it raises at an operation that it does not know
        raise UlsamError(f"this {type(model).__name__} cannot be exported to Core ML: {first_line(error)}") from error
    made.user_defined_metadata.update(metadata)
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder, "model.mlpackage")
        made.save(str(package))
        paths = [package / "Manifest.json", *(path for path in (package / "Data").rglob("*") if path.is_file())]
        files = {f".mlpackage/{path.relative_to(package).as_posix()}": path.read_bytes() for path in paths}
    if sys.platform != "darwin":
        return ExportedEngine(files, None, one_by_one=True, why_not=MAC_ONLY)
    return ExportedEngine(files, _run(made, takes_image), one_by_one=True)


def _run(made: Any, takes_image: bool) -> RunBatch:
    def run(images: NDArray[Any]) -> NDArray[np.float32]:
        gray = takes_image and images.shape[3] == 1
        given = {"pixels": Image.fromarray(images[0, :, :, 0] if gray else images[0])} if takes_image else {"x": images}
        found: NDArray[np.float32] = made.predict(given)["logits"]
        return found

    return run


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without progress bars, and what it says about versions of PyTorch and about parts that only a Mac has."""
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
