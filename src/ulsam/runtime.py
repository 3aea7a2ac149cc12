"""Run an exported model: needs NumPy, Pillow and ONNX Runtime, and nothing of PyTorch.

pip install --no-deps ulsam && pip install numpy pillow onnxruntime
"""

import contextlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

from ulsam.base.errors import UlsamError, first_line
from ulsam.base.files import check_readable
from ulsam.base.providers import PROVIDERS
from ulsam.data.images import Pixels
from ulsam.data.preprocessing import Preprocessing
from ulsam.training.predict import Image, Logits, Prediction, predict

CLASSES, PREPROCESSING, SPEC, VERSION, PRECISION = "classes", "preprocessing", "spec", "ulsam_version", "precision"
THRESHOLDS = "thresholds"
"""Keys of an exported file's metadata; each value is text: JSON, but for the version, and ``float16``, the precision.

A file in float32 says nothing about its precision. Only a model that gives several labels an image has thresholds.
"""


class Model:
    """An exported model that is ready to run; :func:`load` makes it.

    Attributes:
        classes: names of the outputs.
        preprocessing: how an image becomes the input.
        thresholds: of each class, where an image may have several labels: the probability, a sigmoid of the output,
            from which on it has the label. None: an image has one class, and a softmax gives their probabilities.
        any_size: whether it takes images of other sizes too (`ulsam export --dynamic-size`).
        metadata: of the file, as text by key.
    """

    def __init__(self, session: Any, metadata: dict[str, str]) -> None:
        self.metadata = metadata
        outputs = session.get_outputs()[0].shape
        self.classes = _class_names(metadata[CLASSES], outputs[1] if len(outputs) == 2 else None)
        self.preprocessing = Preprocessing.from_json(metadata[PREPROCESSING])
        self.thresholds = _thresholds(metadata.get(THRESHOLDS), len(self.classes))
        self._session = session
        given = session.get_inputs()[0]
        self._name, self._takes_pixels = given.name, given.type == "tensor(uint8)"
        self.any_size = isinstance(given.shape[1 if self._takes_pixels else 2], str)

    def logits(self, images: Pixels) -> Logits:
        """The model's outputs [B, classes] for RGB bytes [B, H, W, 3].

        H and W are those of ``preprocessing.size``; others too, if the model takes ``any_size``.

        Raises:
            UlsamError: the model does not take images of this shape.
        """
        try:
            found: Logits = self._session.run(None, self.feed(images))[0]
        except Exception as error:  # ONNX Runtime has its own, which derive from nothing else
            raise UlsamError(
                f"the model does not take {images.dtype} {list(images.shape)}: {first_line(error)}"
            ) from error
        return found

    def feed(self, images: Pixels) -> dict[str, Any]:
        """The input that the file takes for RGB bytes [B, H, W, 3], by its name."""
        return {self._name: images if self._takes_pixels else self.preprocessing.normalize(images)}

    def predict(self, images: Iterable[Image], *, top: int | None = None, batch: int = 32) -> Iterator[Prediction]:
        """Classify images, in their order: `ulsam.training.predict.predict`.

        An image is a file's path, a binary stream, or RGB bytes [H, W, 3] of any size; an unreadable one gives a
        prediction with an error.

        Raises:
            NotFinite: the model's outputs are not finite.
            UlsamError: ``top`` or ``batch`` is below 1, or what is given is no image at all.
        """
        return predict(
            images,
            self.logits,
            self.preprocessing,
            self.classes,
            top=top,
            batch=batch,
            thresholds=self.thresholds,
        )


def load(path: str | os.PathLike[str], *, threads: int | None = None, device: str = "cpu") -> Model:
    """Open a file that `ulsam export --to onnx` or `ulsam quantize` wrote.

    Args:
        path: the file.
        threads: CPU threads that compute one batch; by default one a core.
        device: that runs it: ``cpu``, ``cuda``, ``tensorrt``, ``coreml``, ``openvino`` or ``directml``, where ONNX
            Runtime is installed for it. Operations that it does not know run on the CPU.

    Raises:
        UlsamError: no such file, no ONNX file, or one that was not exported by ulsam; fewer than one thread; or a
            device that this ONNX Runtime does not know, or cannot start.

    >>> load("birds.onnx")
    Traceback (most recent call last):
    ulsam.base.errors.UlsamError: no exported model birds.onnx
    """
    if threads is not None and threads < 1:
        raise UlsamError(f"threads must be 1 or more, not {threads}; None is one a core")
    check_readable(path, "exported model")
    return open_model(os.fspath(path), os.fspath(path), threads, device=device)


def open_model(
    model: str | bytes, name: str, threads: int | None = None, *, device: str = "cpu", as_written: bool = False
) -> Model:
    """A model from its path, or from what a file would hold; messages call it ``name``; see :func:`open_session`.

    Raises:
        UlsamError: as of :func:`load`.
    """
    try:
        session = open_session(model, threads, device=device, as_written=as_written)
    except UlsamError:
        raise
    except ImportError as error:
        raise UlsamError(f"{name}: {error}; pip install onnxruntime") from error
    except Exception as error:  # as above
        raise UlsamError(f"{name} is no ONNX file that can be run here: {first_line(error)}") from error
    metadata: dict[str, str] = session.get_modelmeta().custom_metadata_map
    missing = [key for key in (CLASSES, PREPROCESSING) if key not in metadata]
    if missing:
        raise UlsamError(
            f"{name} was not exported by ulsam: its metadata has no {' and no '.join(missing)};"
            " write it by `ulsam.export`"
        )
    try:
        return Model(session, metadata)
    except (ValueError, RecursionError) as error:  # no JSON, or an UlsamError
        raise UlsamError(f"{name} has metadata that cannot be read: {first_line(error)}") from error


def _class_names(text: str, outputs: object) -> tuple[str, ...]:
    """The names in the metadata: one for each output of the model.

    Raises:
        ValueError: other things, or not as many.
    """
    names = json.loads(text)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError("its classes are no list of names")
    if outputs != len(names):
        raise ValueError(f"it names {len(names)} classes, and has {outputs} outputs")
    return tuple(names)


def _thresholds(text: str | None, classes: int) -> tuple[float, ...] | None:
    """The thresholds in the metadata: one for each class.

    Raises:
        ValueError: other things, or not as many.
    """
    if text is None:
        return None
    found = json.loads(text)
    if not isinstance(found, list) or not all(type(value) in (int, float) and 0 <= value <= 1 for value in found):
        raise ValueError("its thresholds are no list of shares")
    if len(found) != classes:
        raise ValueError(f"it has {len(found)} thresholds, and {classes} classes")
    return tuple(map(float, found))


def import_onnxruntime() -> Any:
    """ONNX Runtime. Before its first import this sets ``ORT_DISABLE_TELEMETRY``, unless it is set already.

    Otherwise ONNX Runtime reports to its makers, and writes an identifier to disk.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    return onnxruntime


def open_session(
    model: str | bytes, threads: int | None = None, *, device: str = "cpu", as_written: bool = False
) -> Any:
    """ONNX Runtime's session for a file, or for what one would hold; a CPU thread for each core by default.

    Args:
        model: path or content.
        threads: CPU threads.
        device: of `ulsam.base.providers.PROVIDERS`. Where ONNX Runtime cannot start it, it would run on the CPU by
            itself, and say nothing.
        as_written: each operation of the file runs by itself: a quantized model's in float32, exactly.

    Raises:
        UlsamError: there is no such device, this ONNX Runtime does not know it, or cannot start it.
    """
    if device not in PROVIDERS:
        raise UlsamError(f"`device={device}`: an exported model runs on {', '.join(PROVIDERS)}")
    onnxruntime = import_onnxruntime()
    provider, package = PROVIDERS[device]
    available = onnxruntime.get_available_providers()
    if provider not in available:
        known = ", ".join(name for name, (one, _) in PROVIDERS.items() if one in available)
        raise UlsamError(
            f"`device={device}`: the ONNX Runtime that is installed here runs on {known}; for {device} install"
            f" {package} in its place"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised
    options.intra_op_num_threads = threads or 0
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.force_spinning_stop", "1")  # between calls its threads leave the cores
    if device == "cpu":
        return onnxruntime.InferenceSession(model, options, providers=[provider])
    said = _preload(onnxruntime) if package == "onnxruntime-gpu" else ""
    providers = [provider, "CPUExecutionProvider"]
    try:
        session = onnxruntime.InferenceSession(model, options, providers=providers, enable_fallback=False)
    except Exception as error:  # as above
        raise UlsamError(f"`device={device}`: {provider} fails here: {first_line(error)}") from error
    if session.get_providers()[0] != provider:
        raise UlsamError(
            f"`device={device}`: {provider} does not start here: {said or 'a library or the device is missing'}"
        )
    return session


def _preload(onnxruntime: Any) -> str:
    """Load CUDA from NVIDIA's Python packages, if they are installed; the first line of what ONNX Runtime says to it.

    It finds CUDA by itself where the system has it.
    """
    with contextlib.redirect_stdout(io.StringIO()) as said:
        onnxruntime.preload_dlls()
    return next(iter(said.getvalue().splitlines()), "")
