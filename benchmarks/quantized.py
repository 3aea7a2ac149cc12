"""`ulsam quantize` beside NNCF on the same model and the same calibration images: top-1, size and latency.

Three ways to int8: ulsam's, NNCF's quantization after training, and NNCF's accuracy control, which takes layers back to
float32 until no more than half a point is lost. A file runs in ONNX Runtime, OpenVINO, or both. NNCF's accuracy control
sees 400 of the test images. Every model is measured on others of them, paired by image. Then all run in turn on one
thread, one image at a time. The time is the processor's, so that other work on the machine adds little to it. OpenVINO
computes in float32 what is not in int8. A call adds a model to results/quantized.json, in four minutes where nothing
else runs. NNCF is no extra of ulsam: pip install nncf.

    python benchmarks/quantized.py grocery81_slim75 mobilenetv2_100.grocery81_slim75 grocery81
    python benchmarks/tables.py
"""

import argparse
import dataclasses
import functools
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nncf
import numpy as np
import onnx
import onnxruntime
import openvino
from nncf.quantization.advanced_parameters import AdvancedAccuracyRestorerParameters
from numpy.typing import NDArray

from ulsam import runtime
from ulsam.base.class_names import class_numbers
from ulsam.base.files import write_atomic
from ulsam.base.provenance import processor
from ulsam.base.timing import figures, in_turn
from ulsam.data.images import Pixels
from ulsam.data.opening import open_data
from ulsam.deploy.export import engine_of
from ulsam.deploy.quantize import quantize_graph
from ulsam.model.build import load
from ulsam.study.statistics import difference
from ulsam.training.sample import pick

ROOT = Path(__file__).parents[1]
CALIBRATE = 256
SEEN = 400  # test images, by NNCF's accuracy control
MAX_LOST = 0.005  # by it
CONTROL = AdvancedAccuracyRestorerParameters(ranking_subset_size=64, max_num_iterations=10)  # or it takes an hour
FIRST = "float32, ONNX Runtime"
OPENVINO = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 1}

Run = Callable[[Pixels], NDArray[Any]]


class Made(NamedTuple):
    """A model in an engine: RGB bytes [B, H, W, 3] -> logits [B, classes], and the bytes of its files."""

    run: Run
    bytes: int


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the row in the table")
    parser.add_argument("model", help="model file, or the name of a trained model")
    parser.add_argument("data", help="image folder with train and test")
    parser.add_argument("--images", type=int, default=1500, help="test images to measure on")
    parser.add_argument("--seconds", type=float, default=40, help="for the times of all files together")
    args = parser.parse_args(argv)
    content = engine_of(*load(args.model)).files[".onnx"]
    model = runtime.open_model(content, args.model, 1)
    train, test, _ = open_data(args.data, val_split="test")
    calibration = [pixels for pixels, _ in read(train, model, pick(len(train), CALIBRATE))]
    seen = read(test, model, pick(len(test), SEEN))
    others = read(test, model, pick(len(test), args.images, apart_from=SEEN))
    ways, kept = made(content, calibration, seen)
    answers = {name: right(way.run, others) for name, way in ways.items()}
    pixels = others[0][0][None]
    calls = {name: functools.partial(processor_seconds, way.run, pixels) for name, way in ways.items()}
    turns = list(in_turn(calls, args.seconds, 5000))
    times = {name: [turn[name] for turn in turns] for name in ways}
    entry = {
        "command": f"python benchmarks/quantized.py {args.name} {Path(args.model).name} {Path(args.data).name}",
        "images": len(others),
        "accuracy_control": {"images": len(seen), "max_lost": MAX_LOST, "kept_in_float32": kept},
        "ways": {
            name: {
                "top1": float(answers[name].mean()),
                "minus_float32": dataclasses.asdict(change(answers[name], answers[FIRST])),
                "bytes": way.bytes,
                **figures(times[name], times[FIRST]),
            }
            for name, way in ways.items()
        },
    }
    print(json.dumps(entry, indent=1))
    file = ROOT / "results" / "quantized.json"
    models = json.loads(file.read_text())["models"] if file.exists() else {}
    result = {
        "what": "int8 by ulsam and by NNCF: top-1 on test images, bytes of the files, processor seconds of an image",
        "models": {**models, args.name: entry},
        "calibration_images": CALIBRATE,
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "versions": {
            "nncf": nncf.__version__,
            "openvino": openvino.__version__.partition("-")[0],
            "onnxruntime": onnxruntime.__version__,
            "python": platform.python_version(),
        },
    }
    write_atomic(file, json.dumps(result, indent=1) + "\n")


def read(images: Any, model: runtime.Model, numbers: Iterable[int]) -> list[tuple[Pixels, int]]:
    """These images at the model's size, and the model's numbers of their classes."""
    number_of = class_numbers(images.classes, model.classes)
    look, found = model.preprocessing, []
    for number in numbers:
        pixels, label = images.fetch(number, look.reduction, look.channels)
        found.append((look.crop(pixels), number_of[images.classes[label]]))
    return found


def made(
    content: bytes, calibration: Sequence[Pixels], seen: Sequence[tuple[Pixels, int]]
) -> tuple[dict[str, Made], int]:
    """Every way to int8 in its engines, float32 first; and how many layers NNCF's accuracy control left in float32."""
    metadata = runtime.open_model(content, "it").metadata
    whole = onnx.load_from_string(content)
    core = openvino.Core()
    (name,) = [put.name for put in whole.graph.input]
    ours = {bits: quantize_graph(content, calibration, metadata, bits=bits) for bits in (8, 7)}
    by_name = nncf.Dataset(calibration, lambda pixels: {name: pixels[None]})
    by_place = nncf.Dataset(calibration, lambda pixels: pixels[None])
    theirs = nncf.quantize(whole, by_name, subset_size=len(calibration)).SerializeToString()
    plain = nncf.quantize(core.read_model(content), by_place, subset_size=len(calibration))
    controlled = nncf.quantize_with_accuracy_control(
        core.read_model(content),
        by_place,
        nncf.Dataset(seen, lambda pair: pair[0][None]),
        validated,
        max_drop=MAX_LOST,
        subset_size=len(calibration),
        advanced_accuracy_restorer_parameters=CONTROL,
    )
    ways = {
        FIRST: in_onnxruntime(content),
        "ulsam, ONNX Runtime": in_onnxruntime(ours[8]),
        "ulsam, 7 bits, ONNX Runtime": in_onnxruntime(ours[7]),
        "NNCF, ONNX Runtime": in_onnxruntime(theirs),
        "float32, OpenVINO": in_openvino(core.read_model(content)),
        "ulsam, OpenVINO": in_openvino(core.read_model(ours[8])),
        "NNCF, OpenVINO": in_openvino(plain),
        "NNCF with accuracy control, OpenVINO": in_openvino(controlled),
    }
    return ways, quantizers(plain) - quantizers(controlled)


def validated(model: Any, pairs: Iterable[tuple[Pixels, int]]) -> tuple[float, list[float]]:
    """Top-1, and whether each answer is right: what NNCF's accuracy control asks for."""
    found = [float(model(pixels[None])[0].argmax() == label) for pixels, label in pairs]
    return float(np.mean(found)), found


def quantizers(model: Any) -> int:
    """The maps and weights that a model of OpenVINO quantizes."""
    return sum(part.get_type_name() == "FakeQuantize" for part in model.get_ops())


def in_onnxruntime(content: bytes) -> Made:
    session = runtime.open_session(content, 1)
    (name,) = [put.name for put in session.get_inputs()]
    return Made(lambda pixels: session.run(None, {name: pixels})[0], len(content))


def in_openvino(model: Any) -> Made:
    with tempfile.TemporaryDirectory() as folder:
        openvino.save_model(model, Path(folder, "model.xml"), compress_to_fp16=False)
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
    compiled = openvino.Core().compile_model(model, "CPU", OPENVINO)
    return Made(lambda pixels: compiled(pixels)[0], size)


def processor_seconds(run: Run, pixels: Pixels) -> float:
    """The time that all threads compute for a call: what else runs on the machine adds little to it."""
    began = time.process_time()
    run(pixels)
    return time.process_time() - began


def right(run: Run, images: Sequence[tuple[Pixels, int]]) -> NDArray[Any]:
    """Which images a model names right, one at a time."""
    return np.array([int(run(pixels[None])[0].argmax()) == label for pixels, label in images])


def change(after: NDArray[Any], before: NDArray[Any]) -> Any:
    """The difference of two models' top-1, paired by image."""

    def run(found: NDArray[Any]) -> dict[str, Any]:
        outcomes = {"images": len(found), "right": np.packbits(found).tobytes().hex(), "names": "test"}
        return {
            "split": None,
            "scores": {"top1": float(found.mean()), "images": len(found)},
            "outcomes": outcomes,
        }

    return difference({0: run(after)}, {0: run(before)})


if __name__ == "__main__":
    main()
