"""LiteRT's file, formerly TensorFlow Lite's, for Android and small devices."""

import contextlib
import io
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ulsam.base.errors import UlsamError, first_line
from ulsam.base.extras import extra
from ulsam.deploy.engines import ExportedEngine
from ulsam.deploy.onnx_graph import with_attention


def tflite_engine(
    model: nn.Module, example: Tensor, free: Mapping[int, str], metadata: Mapping[str, str], half: bool
) -> ExportedEngine:
    """A file for one image at a time, run by LiteRT's interpreter; as `ulsam.deploy.engines.onnx_engine`.

    Its signature names the input and ``logits``. Each entry of the metadata is a file in the ZIP archive at its end,
    where LiteRT's tools keep such files. With ``half`` the weights are float16, which the interpreter makes float32;
    GPUs compute with them as they are.

    Raises:
        UlsamError: also for a free size.
    """
    if len(free) > 1:
        raise UlsamError("`dynamic_size=True`: a file for LiteRT is for one size here; leave it out")
    with extra("tflite", "`to=tflite` needs, in an environment of its own,"), _silent():
        import litert_torch
        from ai_edge_litert.interpreter import Interpreter
    name = "pixels" if example.dtype.itemsize == 1 else "x"
    try:
        with _silent():
            whole = _WithNamedOutput(with_attention(model)[0], name).eval()
            content = litert_torch.convert(whole, sample_kwargs={name: example[:1]}).model_content()
            content = _with_half_weights(content) if half else content
    except Exception as error:  # whatever it raises at an operation that it does not know
        raise UlsamError(f"this {type(model).__name__} cannot be exported to LiteRT: {first_line(error)}") from error
    file = io.BytesIO(content)
    with zipfile.ZipFile(file, "a") as archive:
        for key, text in metadata.items():
            archive.writestr(zipfile.ZipInfo(key), text)  # with no date
    runner = Interpreter(model_content=file.getvalue()).get_signature_runner()
    return ExportedEngine(
        {".tflite": file.getvalue()}, lambda images: runner(**{name: images})["logits"], one_by_one=True
    )


class _WithNamedOutput(nn.Module):
    """The model with a name for its output; its input gets one where it is called."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, **given: Tensor) -> dict[str, Any]:
        return {"logits": self.model(given[self.name])}


def _with_half_weights(content: bytes) -> bytes:
    """The file with float16 weights, each of which is made float32 when it is loaded."""
    from ai_edge_quantizer import algorithm_manager, qtyping, quantizer

    made = quantizer.Quantizer(content)
    made.update_quantization_recipe(
        regex=".*",
        operation_name=qtyping.TFLOperationName.ALL_SUPPORTED,
        op_config=qtyping.OpQuantizationConfig(
            weight_tensor_config=qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT),
            compute_precision=qtyping.ComputePrecision.FLOAT,
            explicit_dequantize=True,
        ),
        algorithm_key=algorithm_manager.AlgorithmName.FLOAT_CASTING,
    )
    return bytes(made.quantize().quantized_model)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without progress on stdout and stderr."""
    texts = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(texts), contextlib.redirect_stderr(texts):
        warnings.simplefilter("ignore")
        yield
