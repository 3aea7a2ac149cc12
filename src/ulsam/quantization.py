"""An exported net in 8-bit integers: a quarter of the file, and faster where the processor multiplies bytes."""

import logging
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ulsam import runtime
from ulsam.data.pictures import Pixels, UnreadablePicture
from ulsam.data.sources import AnyPictures, MapPictures, StreamPictures, open_data
from ulsam.errors import UlsamError
from ulsam.exporting import engine_of
from ulsam.exporting.onnx_graph import ATTENTION, check_installed
from ulsam.files import check_readable, check_writable, write_atomic
from ulsam.models import load
from ulsam.sampling import pick

QUANTIZATION = "quantization"
"""Key of the metadata that tells how a file was quantised."""

MOST_LOST = 0.01
"""Share of top-1 that may be lost, as far as the pictures can tell it."""

_TYPES = ("Conv", "Gemm", "MatMul", "Add", "Clip", "Relu", "GlobalAveragePool", "AveragePool", "MaxPool", "Concat")
_BATCH = 16


@dataclass(frozen=True)
class Quantized:
    """How a quantised net compares with the net in float32, on pictures that it was not calibrated on.

    Attributes:
        calibrated: pictures from which the ranges were taken.
        pictures: that both nets were measured on.
        top1, top1_before: of the quantised net and of the net in float32, shares.
        same: share of the pictures for which both name the same class first.
        error: standard error of ``top1 - top1_before``, over the choice of the pictures.
        bytes, bytes_before: sizes of the files.
    """

    calibrated: int
    pictures: int
    top1: float
    top1_before: float
    same: float
    error: float
    bytes: int
    bytes_before: int

    def __str__(self) -> str:
        return (
            f"top-1 {100 * self.top1_before:.2f} % -> {100 * self.top1:.2f} %, "
            f"{100 * (self.top1 - self.top1_before):+.2f} +- {196 * self.error:.2f} points (95 %) "
            f"on {self.pictures} pictures; the same first class for {100 * self.same:.1f} %"
        )


def quantize(
    model: str | os.PathLike[str],
    data: str,
    out: str | os.PathLike[str],
    *,
    calibrate: int = 256,
    measure: int = 1000,
) -> Quantized:
    """Write a net with 8-bit weights and maps, and measure it beside the net in float32.

    ONNX Runtime's static quantisation after training (Jacob et al. 2018, arXiv 1712.05877): weights as int8, each
    output channel with a scale of its own, maps as uint8 with ranges from pictures. The normalisation, ULSAM layers,
    what other attention multiplies, and the logits stay in float32.

    Args:
        model: a ``.onnx`` file of `ulsam.export`, or a model file, which is exported first.
        data: image folder or data set as for training, with classes of the net. Ranges are taken from its training
            pictures, accuracy from the others.
        out: the file to write, NAME.onnx.
        calibrate, measure: pictures for the one and the other, at most; the same ones each time.

    Raises:
        UlsamError: top-1 falls by more than `MOST_LOST`, beyond what the choice of pictures explains at 95 %; the net
            is quantised already; the pictures have other classes, or come in a stream; a package is missing; the file
            cannot be written. There is no new file then.

    >>> quantize("missing.onnx", "pictures", "net.onnx")
    Traceback (most recent call last):
    ulsam.errors.UlsamError: no exported net missing.onnx
    """
    if calibrate < 1 or measure < 1:
        raise UlsamError(f"pictures to calibrate and to measure on must be 1 or more, not {calibrate} and {measure}")
    check_installed("ulsam quantize")
    out = os.fspath(out)
    if not out.endswith(".onnx"):
        raise UlsamError(f"a quantised net is a file called NAME.onnx, not {out}")
    content = _content(model)
    check_writable(out)
    net = runtime.open_net(content, os.fspath(model))
    if QUANTIZATION in net.metadata:
        raise UlsamError(f"{model} is quantised already: name the file in float32, or the model file")
    train, others, _ = open_data(data)
    seen = [image for image, _ in _read(train, net, calibrate, "calibrate")]
    if not seen:
        raise UlsamError(f"none of the pictures of {data} to calibrate on could be read")
    quantized = quantize_graph(content, seen, net.metadata)
    report = _measured(
        net,
        runtime.open_net(quantized, out),
        _read(others, net, measure, "measure"),
        calibrated=len(seen),
        bytes=len(quantized),
        bytes_before=len(content),
    )
    lost = report.top1_before - report.top1
    if lost - 1.96 * report.error > MOST_LOST:
        raise UlsamError(f"the quantised net is worse than {100 * MOST_LOST:g} point: {report}; nothing was written")
    write_atomic(out, quantized)
    return report


def quantize_graph(content: bytes, images: Sequence[Pixels], metadata: dict[str, str]) -> bytes:
    """The content of an ONNX file, quantised with the ranges that its maps take on these pictures.

    Args:
        content: of a file of `ulsam.export`.
        images: at the net's size.
        metadata: of the file, which stays.
    """
    import onnx
    from onnxruntime import quantization

    model = onnx.load_from_string(content)
    nodes = list(model.graph.node)
    first = next(place for place, node in enumerate(nodes) if node.op_type in ("Conv", "Gemm", "MatMul"))
    left = [node.name for place, node in enumerate(nodes) if place < first or ATTENTION in node.name]
    reader = _Reader(runtime.open_net(content, "the net"), images)
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # advice to do what an export by ulsam has done
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "net.onnx")
            quantization.quantize_static(
                model,
                path,
                reader,
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=list(_TYPES),
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                nodes_to_exclude=left,
                extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
            )
            made = onnx.load(path)
    finally:
        logger.setLevel(level)
    for node in made.graph.node:  # of biases: a zero for each channel, which is what ONNX takes where there is none
        if node.op_type == "DequantizeLinear" and node.input[0].endswith("bias_quantized"):
            del node.input[2]
    used = {name for node in made.graph.node for name in node.input}
    kept = [tensor for tensor in made.graph.initializer if tensor.name in used]
    del made.graph.initializer[:]
    made.graph.initializer.extend(kept)
    how = f"int8 weights a channel, uint8 maps, {len(images)} pictures"
    onnx.helper.set_model_props(made, {**metadata, QUANTIZATION: how})
    return bytes(made.SerializeToString())


class _Reader:
    """Pictures as ONNX Runtime's `CalibrationDataReader` hands them over."""

    def __init__(self, net: runtime.Net, images: Sequence[Pixels]) -> None:
        batches = [np.stack(images[first : first + _BATCH]) for first in range(0, len(images), _BATCH)]
        self.feeds = iter([net.feed(batch) for batch in batches])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.feeds, None)


def _content(model: str | os.PathLike[str]) -> bytes:
    """What an exported file holds, or would hold for a model file."""
    if os.fspath(model).endswith(".onnx"):
        check_readable(model, "exported net")
        return Path(model).read_bytes()
    return engine_of(*load(model)).files[".onnx"]


def _read(pictures: AnyPictures, net: runtime.Net, most: int, title: str) -> Iterator[tuple[Pixels, int]]:
    """So many of the pictures at the net's size, the same ones each time, and the net's number of their classes."""
    if isinstance(pictures, StreamPictures):
        raise UlsamError("pictures cannot be picked from a stream of shards: name an image folder, or torch/... data")
    unknown = [name for name in pictures.classes if name not in net.classes]
    if unknown:
        raise UlsamError(f"the net knows no class {unknown[0]!r}; it has {', '.join(net.classes[:8])}, ...")
    number_of = [net.classes.index(name) for name in pictures.classes]
    for number in tqdm(pick(len(pictures), most), desc=title, disable=None, leave=False, unit="picture"):
        try:
            pixels, label = _fetch(pictures, number, net)
        except UnreadablePicture:
            continue  # training and ulsam eval name them
        yield pixels, number_of[label]


def _fetch(pictures: MapPictures, number: int, net: runtime.Net) -> tuple[Pixels, int]:
    pixels, label = pictures.fetch(number, net.preprocessing.reduction)
    return net.preprocessing.crop(pixels), label


def _measured(
    before: runtime.Net, after: runtime.Net, pictures: Iterator[tuple[Pixels, int]], **facts: int
) -> Quantized:
    """Both nets' answers on the same pictures; ``facts`` are the rest of `Quantized`."""
    found = []
    for pixels, label in pictures:
        found.append((*(int(net.logits(pixels[None]).argmax()) for net in (before, after)), label))
    if not found:
        raise UlsamError("none of the pictures to measure on could be read")
    one, two, labels = np.array(found).T
    change = (two == labels).astype(float) - (one == labels)
    return Quantized(
        pictures=len(found),
        top1=float((two == labels).mean()),
        top1_before=float((one == labels).mean()),
        same=float((one == two).mean()),
        error=float(change.std()) / math.sqrt(len(found)),
        **facts,
    )
