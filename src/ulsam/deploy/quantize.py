"""An exported model in 8-bit integers: a quarter of the file, and faster where the processor multiplies bytes."""

import functools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ulsam import runtime
from ulsam.base.class_names import class_numbers
from ulsam.base.errors import UlsamError
from ulsam.base.files import check_readable, check_writable, write_atomic
from ulsam.base.logs import progress
from ulsam.base.timing import time_in_turn
from ulsam.data.images import Pixels, UnreadableImage
from ulsam.data.opening import open_data
from ulsam.data.sources import AnyImages, FolderImages, MapImages, StreamImages, check_one_class
from ulsam.deploy.byte_products import Target, saturates, weight_bits
from ulsam.deploy.export import engine_of
from ulsam.deploy.onnx_graph import ATTENTION, check_installed, drop_unused
from ulsam.model.given import model_and_spec
from ulsam.model.spec import ModelSpec
from ulsam.training.sample import pick
from ulsam.training.trained_on import held_out_settings, note_trained_on

QUANTIZATION = "quantization"
"""Key of the metadata that says how a file was quantized."""

MAX_LOST = 0.01
"""Share of top-1 that may be lost, as far as the images can show it."""

COVERED = 0.85
"""Share of the images whose values a map's range holds at either end; beyond it values are clipped.

Of the whole range, percentiles of all values, the least squared error, and shares from 0.25 to 0.93, those from 0.8 to
0.87 kept the answers of MobileNet-V2 best: on held-out images of cub100 its probabilities diverged a third less from
those in float32 than with the whole range.
"""

_TYPES = (
    *("Conv", "Gemm", "MatMul", "Add", "Mul", "Clip", "Relu"),
    *("GlobalAveragePool", "AveragePool", "MaxPool", "Concat"),
)
_BATCH = 4  # all maps of a batch are in memory at once


@dataclass(frozen=True)
class Quantized:
    """How a quantized model compares with the model in float32, on images that it was not calibrated on.

    Attributes:
        calibrated: images from which the ranges were taken.
        images: that both models were measured on.
        top1, top1_before: of the quantized model and of the model in float32, shares.
        same: share of the images for which both name the same class first.
        error: standard error of ``top1 - top1_before``, over the choice of the images.
        bytes, bytes_before: sizes of the files.
        weight_bits: that are used of each weight: 7 where products of bytes saturate.
        time_ratio: of one image, over that of the model in float32, on this machine; None for another kind of it.
    """

    calibrated: int
    images: int
    top1: float
    top1_before: float
    same: float
    error: float
    bytes: int
    bytes_before: int
    weight_bits: int
    time_ratio: float | None

    def __str__(self) -> str:
        return (
            f"top-1 {100 * self.top1_before:.2f} % -> {100 * self.top1:.2f} %, "
            f"{100 * (self.top1 - self.top1_before):+.2f} +- {196 * self.error:.2f} points (95 %) "
            f"on {self.images} images; the same first class for {100 * self.same:.1f} %"
        )


def quantize(
    model: nn.Module | str | os.PathLike[str],
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    spec: ModelSpec | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    calibrate: int = 256,
    measure: int = 1000,
    target: Target = "this",
) -> Quantized:
    """Write a model with 8-bit weights and maps, and measure it beside the model in float32.

    ONNX Runtime's static quantization after training (Jacob et al. 2018, arXiv 1712.05877): weights as int8, each
    output channel with a scale of its own, maps as uint8 with ranges from images (:func:`map_statistics`), ULSAM
    layers included. The normalization, what other attention multiplies, and the logits stay in float32. Biases take up
    what rounding the weights changes on average.

    Args:
        model: a ``.onnx`` file of `ulsam.export`; or a model file or a model in memory, which is exported first.
        data: image folder or data set as for training, with classes of the model. Ranges are taken from its training
            images, accuracy from the others. Where the model file lies in the folder of its run, the same images are
            held out as in that run.
        out: the file to write, NAME.onnx.
        data_dir: where the paths of a table count from, or a named data set lies.
        spec: of a model in memory, as of `ulsam.load`.
        calibrate: images to calibrate on, at most; the same ones each time.
        measure: images to measure on, likewise.
        target: the processor that the file is for. x86 without VNNI multiplies bytes with sums that saturate: weights
            for it have 7 bits, and run exactly everywhere. With 8 bits for another processor than this one, accuracy
            is measured by the operations one by one, which are exact.

    Raises:
        UlsamError: an unknown target; top-1 falls by more than `MAX_LOST`, beyond what the choice of images explains
            at 95 %; the model is quantized or in float16 already; the images have other classes, or come in a stream; a
            package is missing; the file cannot be written. There is no new file then.

    >>> quantize("missing.onnx", "images", "model.onnx")
    Traceback (most recent call last):
    ulsam.base.errors.UlsamError: no exported model missing.onnx
    """
    if calibrate < 1 or measure < 1:
        raise UlsamError(f"images to calibrate and to measure on must be 1 or more, not {calibrate} and {measure}")
    check_installed("ulsam quantize")
    out = os.fspath(out)
    if not out.endswith(".onnx"):
        raise UlsamError(f"a quantized model is a file called NAME.onnx, not {out}")
    check_writable(out)
    bits = weight_bits(target)
    name = type(model).__name__ if isinstance(model, nn.Module) else os.fspath(model)
    if os.path.realpath(out) == os.path.realpath(name):
        raise UlsamError(f"{out} is the model in float32, and would be lost: name another file to write")
    content = _content(model, spec)
    before = runtime.open_model(content, name)
    if QUANTIZATION in before.metadata:
        raise UlsamError(f"{name} is quantized already: name the file in float32, or the model file")
    if runtime.PRECISION in before.metadata:
        raise UlsamError(
            f"{name} is in {before.metadata[runtime.PRECISION]}: name the file in float32, or the model file"
        )
    if before.thresholds is not None:
        raise UlsamError("quantizing is measured by one class an image, and this model gives several labels")
    place = {} if data_dir is None else {"data_dir": os.fspath(data_dir)}
    train, others, _ = open_data(os.fspath(data), **{**held_out_settings(model, os.fspath(data), {}), **place})
    check_one_class(others, "quantizing")
    if isinstance(others, FolderImages):
        note_trained_on(model, [path for path, _ in others.samples], [data])
    seen = [image for image, _ in _read(train, before, calibrate, "calibrate")]
    if not seen:
        raise UlsamError(f"none of the images of {data} to calibrate on could be read")
    quantized = quantize_graph(content, seen, before.metadata, bits=bits)
    elsewhere = bits == 8 and saturates()
    small = runtime.open_model(quantized, out, as_written=elsewhere)
    report = _measured(
        before,
        small,
        _read(others, before, measure, "measure"),
        calibrated=len(seen),
        bytes=len(quantized),
        bytes_before=len(content),
        weight_bits=bits,
        time_ratio=None if target != "this" else _time_ratio(before, small),
    )
    lost = report.top1_before - report.top1
    if lost - 1.96 * report.error > MAX_LOST:
        raise UlsamError(f"the quantized model is worse than {100 * MAX_LOST:g} point: {report}; nothing was written")
    write_atomic(out, quantized)
    return report


def quantize_graph(content: bytes, images: Sequence[Pixels], metadata: dict[str, str], *, bits: int = 8) -> bytes:
    """The content of an ONNX file, quantized with the ranges that its maps take on these images.

    Args:
        content: of a file of `ulsam.export`.
        images: at the model's size.
        metadata: of the file, which stays.
        bits: of a weight, 7 or 8.
    """
    import onnx
    from onnxruntime import quantization

    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(content))
    nodes = list(model.graph.node)
    first = next(place for place, node in enumerate(nodes) if node.op_type in ("Conv", "Gemm", "MatMul"))
    left = [node.name for place, node in enumerate(nodes) if place < first or _is_others(node)]
    statistics = map_statistics(content, images)
    ranges = {name: quantization.TensorData(lowest=found.low, highest=found.high) for name, found in statistics.items()}
    quantizer = quantization.QDQQuantizer(
        model,
        per_channel=True,
        reduce_range=bits == 7,
        weight_qType=quantization.QuantType.QInt8,
        activation_qType=quantization.QuantType.QUInt8,
        tensors_range=quantization.TensorsData(quantization.CalibrationMethod.MinMax, ranges),
        nodes_to_quantize=[],
        nodes_to_exclude=left,
        op_types_to_quantize=list(_TYPES),
        extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    made = quantizer.model.model
    wide = {tensor.name for tensor in made.graph.initializer if tensor.data_type == onnx.TensorProto.INT32}
    for node in made.graph.node:  # of biases: a zero for each channel, which is what ONNX takes where there is none
        if node.op_type == "DequantizeLinear" and node.input[0] in wide and len(node.input) > 2:
            del node.input[2]
    _correct_biases(made, onnx.load_from_string(content), {name: found.means for name, found in statistics.items()})
    drop_unused(made.graph)
    how = f"int8 weights a channel ({bits} bits used), uint8 maps, {len(images)} images"
    onnx.helper.set_model_props(made, {**metadata, QUANTIZATION: how})
    return bytes(made.SerializeToString())


class MapStatistics(NamedTuple):
    """Between which values a map lies, without what only few images reach, and the mean of each of its channels."""

    low: np.float32
    high: np.float32
    means: NDArray[np.float64]


def map_statistics(content: bytes, images: Sequence[Pixels]) -> dict[str, MapStatistics]:
    """What values the maps of a model have on these images.

    Each image has its lowest and its highest value in a map. The range is that which holds `COVERED` of the lowest
    and as many of the highest: a wider one would make every image's steps coarser for the sake of few.

    Args:
        content: of a file of `ulsam.export`.
        images: at the model's size.

    Returns:
        For whatever operations with 8-bit forms take and output, by its name.
    """
    import onnx

    model = onnx.load_from_string(content)
    opened = runtime.open_model(content, "the model")
    fixed = {tensor.name for tensor in model.graph.initializer}
    inside = [node for node in model.graph.node if node.op_type in _TYPES and not _is_others(node)]
    maps = {name for node in inside for name in (*node.input, *node.output)}
    outer = {value.name for value in (*model.graph.input, *model.graph.output)}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(maps - fixed - outer - {""}))
    session = runtime.open_session(model.SerializeToString())
    names = [output.name for output in session.get_outputs()]
    extremes: dict[str, list[NDArray[Any]]] = {}
    means: dict[str, list[NDArray[Any]]] = {}
    for start in progress(range(0, len(images), _BATCH), desc="ranges", unit="batch"):
        feed = opened.feed(np.stack(images[start : start + _BATCH]))
        for name, values in (*feed.items(), *zip(names, session.run(names, feed), strict=True)):
            if values.dtype == np.float32 and values.ndim:
                by_image = values.reshape(len(values), -1)
                extremes.setdefault(name, []).append(np.stack([by_image.min(1), by_image.max(1)]))
                channels = values.mean(tuple(range(2, values.ndim)), dtype=np.float64)
                means.setdefault(name, []).append(channels.reshape(len(values), -1))
    found = {}
    for name, each in extremes.items():
        low, high = np.concatenate(each, 1)
        ends = np.float32(np.quantile(low, 1 - COVERED)), np.float32(np.quantile(high, COVERED))
        found[name] = MapStatistics(*ends, np.concatenate(means[name]).mean(0))
    return found


def _correct_biases(model: Any, original: Any, means: Mapping[str, NDArray[np.float64]]) -> None:
    """Add to each bias of the quantized model what its channel's mean loses as the weights are rounded, in place.

    The loss is the sum of what each weight loses times the mean of what it multiplies, which at the borders of a map is
    an approximation. Where a channel is the small difference of large products it may be as large as the channel's
    range: in MobileNet-V2 one such channel makes most of the damage of 8 bits. Bias correction of Nagel et al. 2019
    (arXiv 1906.04721, section 4.2), with means from images.
    """
    from onnx.numpy_helper import from_array, to_array

    before = {tensor.name: to_array(tensor) for tensor in original.graph.initializer}
    sources = {node.name: node for node in original.graph.node}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    makes = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    for node in model.graph.node:
        numbers = {entry.name: entry.i for entry in node.attribute}
        by_rows = node.op_type == "Conv" or (node.op_type == "Gemm" and numbers.get("transB"))  # one for each output
        if not by_rows or len(node.input) < 3 or not {*node.input[1:3]} <= makes.keys():
            continue  # nothing was rounded, or there is no bias
        source, rounded, bias = sources[node.name], makes[node.input[1]], makes[node.input[2]]
        scale = to_array(tensors[rounded.input[1]]).astype(np.float64)
        values = to_array(tensors[rounded.input[0]])
        lost = before[source.input[1]] - values * scale.reshape(-1, *[1] * (values.ndim - 1))
        lost = lost.reshape(*lost.shape[:2], -1).sum(-1)  # [channels out, channels in of a group]
        groups = numbers.get("group", 1)
        inputs = means[source.input[0]].reshape(groups, -1).repeat(len(lost) // groups, axis=0)
        steps = (lost * inputs).sum(1) / to_array(tensors[bias.input[1]])
        tensor = tensors[bias.input[0]]
        changed = np.clip(to_array(tensor) + np.rint(steps), -(2**31), 2**31 - 1).astype(np.int32)
        tensor.CopyFrom(from_array(changed, tensor.name))


def _is_others(node: Any) -> bool:
    """Whether this is a product of something other than a ULSAM layer."""
    return node.op_type == "Mul" and ATTENTION not in node.name


def _content(model: nn.Module | str | os.PathLike[str], spec: ModelSpec | None) -> bytes:
    """What an exported file holds, or would hold for a model."""
    if not isinstance(model, nn.Module) and os.fspath(model).endswith(".onnx"):
        check_readable(model, "exported model")
        return Path(model).read_bytes()
    return engine_of(*model_and_spec(model, spec)).files[".onnx"]


def _read(images: AnyImages, model: runtime.Model, max_images: int, title: str) -> Iterator[tuple[Pixels, int]]:
    """So many of the images at the model's size, the same ones each time, and the model's number of their classes."""
    if isinstance(images, StreamImages):
        raise UlsamError("images cannot be picked from a stream of shards: name an image folder, or torch/... data")
    found = class_numbers(images.classes, model.classes)
    if unknown := [name for name in images.classes if name not in found]:
        raise UlsamError(f"the model knows no class {unknown[0]!r}; it has {', '.join(model.classes[:8])}, ...")
    number_of = [found[name] for name in images.classes]
    for number in progress(pick(len(images), max_images), desc=title, unit="image"):
        try:
            pixels, label = _fetch(images, number, model)
        except UnreadableImage:
            continue  # training and ulsam eval name them
        yield pixels, number_of[label]


def _fetch(images: MapImages, number: int, model: runtime.Model) -> tuple[Pixels, int]:
    pixels, label = images.fetch(number, model.preprocessing.reduction, model.preprocessing.channels)
    return model.preprocessing.crop(pixels), label


def _measured(
    before: runtime.Model, after: runtime.Model, images: Iterator[tuple[Pixels, int]], **facts: Any
) -> Quantized:
    """Both models' answers on the same images; ``facts`` are the rest of `Quantized`."""
    outcomes = []
    for pixels, label in images:
        outcomes.append((*(int(model.logits(pixels[None]).argmax()) for model in (before, after)), label))
    if not outcomes:
        raise UlsamError("none of the images to measure on could be read")
    old, new, labels = np.array(outcomes).T
    change = (new == labels).astype(float) - (old == labels)
    return Quantized(
        images=len(outcomes),
        top1=float((new == labels).mean()),
        top1_before=float((old == labels).mean()),
        same=float((old == new).mean()),
        error=float(change.std()) / math.sqrt(len(outcomes)),
        **facts,
    )


def _time_ratio(before: runtime.Model, after: runtime.Model) -> float:
    """The time of one image, over that of the other model, in turn."""
    pixels = np.zeros((1, *before.preprocessing.size, before.preprocessing.channels), np.uint8)
    calls = {"before": functools.partial(before.logits, pixels), "after": functools.partial(after.logits, pixels)}
    return time_in_turn(calls, seconds=1.0, max_turns=200)["after"].ratio
