"""What trained nets cost once they are shipped: top-1, file size and latency, in float32 and in 8-bit integers.

Every final net of a comparison is exported to ONNX and quantised with ranges from training pictures. Each file is
measured on the pictures on which the comparison measured the net: what int8 costs is paired by seed and picture. Then
the files of the first seed run in turn in one process under ONNX Runtime, on the same pictures: a figure is the median
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
from ulsam.benchmarking.report import figures
from ulsam.comparison.grid import Run
from ulsam.comparison.latency import processor
from ulsam.comparison.paths import without_paths
from ulsam.comparison.statistics import difference
from ulsam.comparison.store import Store
from ulsam.data.loading import eval_loader
from ulsam.data.pictures import Pixels
from ulsam.errors import UlsamError
from ulsam.evaluate import ALONE, evaluate, outcomes
from ulsam.exporting import export
from ulsam.exporting.module import load_exported
from ulsam.files import write_atomic
from ulsam.models import load
from ulsam.quantization import quantize
from ulsam.timing import times_in_turn
from ulsam.train import parts

ROOT = Path(__file__).parents[1]
MOST_TURNS = 20_000
PRECISIONS = ("float32", "int8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compared", help="folder of a finished comparison")
    parser.add_argument("name", help="of the result, results/deployed_NAME.json")
    parser.add_argument("--seeds", type=int, help="measure so many of each arm's final nets (default: all)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=30, help="for each batch size and number of threads")
    args = parser.parse_args(argv)
    if args.seeds is not None and args.seeds < 1:
        parser.error(f"--seeds takes 1 or more, not {args.seeds}")
    store = Store(args.compared)
    arms = {}
    with tempfile.TemporaryDirectory() as folder:
        files: dict[tuple[str, str], Path] = {}
        for arm, runs in finals(store, args.seeds).items():
            found = {run.config.seed: shipped(run, store, Path(folder, f"{run.arm.slug}-{run.name}")) for run in runs}
            arms[arm] = summary(found)
            files |= {(arm, precision): found[runs[0].config.seed][precision]["file"] for precision in PRECISIONS}
            print(f"{arm}: {arms[arm]['int8']['minus_float32']['mean']:+.4f} by int8", flush=True)
        times = [
            {"batch": batch, "threads": threads, "nets": timed(files, batch, threads, args.seconds)}
            for batch in args.batches
            for threads in args.threads
        ]
    result = {
        "what": "exported nets in float32 and int8: top-1 on test pictures, bytes of the file, seconds of a batch",
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


def finals(store: Store, most: int | None) -> dict[str, list[Run]]:
    """The final runs of each arm, the first ``most`` seeds.

    Raises:
        UlsamError: one is not finished, or left no model file.
    """
    grid = store.grid()
    found = {}
    for arm in grid.arms:
        found[arm.name] = grid.finals(arm, store.look)[:most]
        if not found[arm.name] or not all(
            (store.folder(run) / "model.safetensors").exists() for run in found[arm.name]
        ):
            raise UlsamError(f"not all final runs of {arm.name} are finished: go on with ulsam compare")
    return found


def shipped(run: Run, store: Store, stem: Path) -> dict[str, dict[str, Any]]:
    """Export and quantise the net of a run; both files, with their answers on the pictures of the run's own measure."""
    files = dict(zip(PRECISIONS, (Path(f"{stem}.onnx"), Path(f"{stem}-int8.onnx")), strict=True))
    _, pictures, _ = parts.open_pictures(run.config)
    model, recipe = load(store.folder(run) / "model.safetensors")
    paths = [path for path, _ in pictures.samples]  # type: ignore[union-attr]  # of an image folder
    export(model, recipe, files["float32"], pictures=paths)
    quantize(files["float32"], run.config.data, files["int8"], measure=300)
    found = {precision: {"file": file, **answers(file, pictures)} for precision, file in files.items()}
    return {**found, "pytorch": dict(store.look(run) or {})}


def answers(file: Path, pictures: Any) -> dict[str, Any]:
    """Top-1 of an exported net, and which pictures it gets right."""
    net, recipe, transform = load_exported(file)
    batches = eval_loader(pictures, transform, batch_size=32, workers=0, device=ALONE.device)
    scores = evaluate(net, batches, len(recipe.classes), world=ALONE, channels_last=False, progress=file.stem)
    told = {"top1": scores.top1, "pictures": scores.pictures}
    return {"split": None, "scores": told, "outcomes": outcomes(scores, pictures), "bytes": file.stat().st_size}


def summary(found: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """What the nets of an arm, by seed, score in each precision, and what export and int8 cost."""
    told: dict[str, Any] = {}
    for precision, before in (("float32", "pytorch"), ("int8", "float32")):
        nets, others = ({seed: net[which] for seed, net in found.items()} for which in (precision, before))
        change = difference(nets, others)
        assert change is not None
        first = next(iter(nets.values()))
        told[precision] = {
            "seeds": list(nets),
            "top1": [net["scores"]["top1"] for net in nets.values()],
            "pictures": first["scores"]["pictures"],
            "bytes": first["bytes"],
            f"minus_{before}": dataclasses.asdict(change),
        }
    return told


def timed(files: Mapping[tuple[str, str], Path], batch: int, threads: int, seconds: float) -> dict[str, Any]:
    """What each file takes for a batch, all in turn."""
    calls = {key: call(file, batch, threads) for key, file in files.items()}
    times = times_in_turn(calls, seconds, MOST_TURNS)
    first = next(iter(times))
    nets: dict[str, dict[str, Any]] = {}
    for (arm, precision), taken in times.items():
        nets.setdefault(arm, {})[precision] = figures(taken, times[first])
    for arm, told in nets.items():
        told["times_faster"] = 1 / figures(times[arm, "int8"], times[arm, "float32"])["ratio"]
    return nets


def call(file: Path, batch: int, threads: int) -> Callable[[], Any]:
    """A function that runs the file on random pictures."""
    net = runtime.load(file, threads=threads)
    images: Pixels = np.random.default_rng(0).integers(0, 256, (batch, *net.preprocessing.size, 3), dtype=np.uint8)
    return lambda: net.logits(images)


if __name__ == "__main__":
    main()
