"""What trained models cost once they are shipped: top-1, file size and latency, in float32 and in 8-bit integers.

Every final model of a comparison is exported to ONNX and quantized with ranges from training images. Each file is
measured on the images on which the comparison measured the model: what int8 costs is paired by seed and image. Then
the files of the first seed run in turn in one process under ONNX Runtime, on the same images: a figure is the median
over the turns, and its ratio is to the first arm in float32. Two minutes for times, ten for answers; nothing else may
run. results/deployed_NAME.json holds every figure, and tables.py writes them into docs/deploy.md.

    python benchmarks/deployed.py runs/cub100 cub100
    python benchmarks/deployed.py runs/grocery81 grocery81
    python benchmarks/tables.py
"""

import argparse
import dataclasses
import json
import os
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from ulsam import runtime
from ulsam.base.errors import UlsamError
from ulsam.base.files import write_atomic
from ulsam.base.provenance import processor
from ulsam.base.timing import figures, times_in_turn
from ulsam.data.images import Pixels
from ulsam.data.loading import eval_loader
from ulsam.deploy.export import export
from ulsam.deploy.exported_module import load_exported
from ulsam.deploy.quantize import quantize
from ulsam.model.build import load
from ulsam.study.comparison_folder import ComparisonFolder
from ulsam.study.grid import Run
from ulsam.study.paths import without_paths
from ulsam.study.statistics import difference
from ulsam.training import parts
from ulsam.training.evaluate import ALONE, evaluate_batches, outcomes

ROOT = Path(__file__).parents[1]
MAX_TURNS = 20_000
PRECISIONS = ("float32", "int8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compared", help="folder of a finished comparison")
    parser.add_argument("name", help="of the result, results/deployed_NAME.json")
    parser.add_argument("--seeds", type=int, help="measure only this many of each arm's final models (default: all)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=30, help="for each batch size and number of threads")
    args = parser.parse_args(argv)
    if args.seeds is not None and args.seeds < 1:
        parser.error(f"--seeds takes 1 or more, not {args.seeds}")
    comparison = ComparisonFolder(args.compared)
    arms = {}
    with tempfile.TemporaryDirectory() as folder:
        files: dict[tuple[str, str], Path] = {}
        for arm, runs in finals(comparison, args.seeds).items():
            found = {
                run.config.seed: shipped(run, comparison, Path(folder, f"{run.arm.slug}-{run.name}")) for run in runs
            }
            arms[arm] = summary(found)
            files |= {(arm, precision): found[runs[0].config.seed][precision]["file"] for precision in PRECISIONS}
            print(f"{arm}: {arms[arm]['int8']['minus_float32']['mean']:+.4f} by int8", flush=True)
        times = [
            {"batch": batch, "threads": threads, "models": timed(files, batch, threads, args.seconds)}
            for batch in args.batches
            for threads in args.threads
        ]
    result = {
        "what": "exported models in float32 and int8: top-1 on test images, bytes of the file, seconds of a batch",
        "command": f"python benchmarks/deployed.py {args.compared} {args.name}",
        "arms": arms,
        "times": times,
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "versions": {
            "onnxruntime": onnxruntime.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }
    write_atomic(ROOT / "results" / f"deployed_{args.name}.json", json.dumps(without_paths(result), indent=1) + "\n")


def finals(comparison: ComparisonFolder, most: int | None) -> dict[str, list[Run]]:
    """The final runs of each arm, the first ``most`` seeds.

    Raises:
        UlsamError: one is not finished, or left no model file.
    """
    grid = comparison.grid()
    found = {}
    for arm in grid.arms:
        found[arm.name] = grid.finals(arm, comparison.outcome)[:most]
        if not found[arm.name] or not all(
            (comparison.folder(run) / "model.safetensors").exists() for run in found[arm.name]
        ):
            raise UlsamError(f"not all final runs of {arm.name} are finished: continue with ulsam compare")
    return found


def shipped(run: Run, comparison: ComparisonFolder, stem: Path) -> dict[str, dict[str, Any]]:
    """Export and quantize the model of a run; both files, with their answers on the images of the run's own measure."""
    files = dict(zip(PRECISIONS, (Path(f"{stem}.onnx"), Path(f"{stem}-int8.onnx")), strict=True))
    _, images, _ = parts.open_images(run.config)
    model, spec = load(comparison.folder(run) / "model.safetensors")
    paths = [path for path, _ in images.samples]  # type: ignore[union-attr]  # of an image folder
    export(model, files["float32"], spec=spec, images=paths)
    quantize(files["float32"], run.config.data, files["int8"], measure=300)
    found = {precision: {"file": file, **answers(file, images)} for precision, file in files.items()}
    return {**found, "pytorch": dict(comparison.outcome(run) or {})}


def answers(file: Path, images: Any) -> dict[str, Any]:
    """Top-1 of an exported model, and which images it gets right."""
    model, spec, transform = load_exported(file)
    batches = eval_loader(images, transform, batch_size=32, workers=0, device=ALONE.device)
    scores = evaluate_batches(model, batches, len(spec.classes), world=ALONE, channels_last=False, progress=file.stem)
    entry = {"top1": scores.top1, "images": scores.images}
    return {"split": None, "scores": entry, "outcomes": outcomes(scores, images), "bytes": file.stat().st_size}


def summary(found: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """What the models of an arm, by seed, score in each precision, and what export and int8 cost."""
    result: dict[str, Any] = {}
    for precision, before in (("float32", "pytorch"), ("int8", "float32")):
        models, others = ({seed: model[which] for seed, model in found.items()} for which in (precision, before))
        change = difference(models, others)
        assert change is not None
        first = next(iter(models.values()))
        result[precision] = {
            "seeds": list(models),
            "top1": [model["scores"]["top1"] for model in models.values()],
            "images": first["scores"]["images"],
            "bytes": first["bytes"],
            f"minus_{before}": dataclasses.asdict(change),
        }
    return result


def timed(files: Mapping[tuple[str, str], Path], batch: int, threads: int, seconds: float) -> dict[str, Any]:
    """What each file takes for a batch, all in turn."""
    calls = {key: call(file, batch, threads) for key, file in files.items()}
    times = times_in_turn(calls, seconds, MAX_TURNS)
    first = next(iter(times))
    models: dict[str, dict[str, Any]] = {}
    for (arm, precision), taken in times.items():
        models.setdefault(arm, {})[precision] = figures(taken, times[first])
    for arm, entry in models.items():
        entry["times_faster"] = 1 / figures(times[arm, "int8"], times[arm, "float32"])["ratio"]
    return models


def call(file: Path, batch: int, threads: int) -> Callable[[], Any]:
    """A function that runs the file on random images."""
    model = runtime.load(file, threads=threads)
    images: Pixels = np.random.default_rng(0).integers(0, 256, (batch, *model.preprocessing.size, 3), dtype=np.uint8)
    return lambda: model.logits(images)


if __name__ == "__main__":
    main()
