"""What a net costs once it is shipped: accuracy, file size and latency, exported to ONNX and quantised to int8.

Each model file is exported and quantised on the training pictures of DATA, and all files are measured on its test
pictures by `ulsam.runtime`. Then they run in turn in one process under ONNX Runtime, on the same pictures: a figure is
the median over the turns, and its ratio is to the first model in float32. Runs of 2 minutes; nothing else may run.

    python benchmarks/deployed.py cub100 DATA base=runs/base.safetensors ulsam=runs/ulsam.safetensors
"""

import argparse
import json
import platform
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from layer import processor

from ulsam import runtime
from ulsam.cli import main as ulsam
from ulsam.comparison.paths import without_paths
from ulsam.data.sources import open_split
from ulsam.exporting import export
from ulsam.models import load
from ulsam.quantization import quantize
from ulsam.timing import times_in_turn

MOST_TURNS = 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the result, results/deployed_NAME.json")
    parser.add_argument("data", help="image folder with train/ and test/")
    parser.add_argument("models", nargs="+", metavar="NAME=FILE", help="model files; the first is the reference")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=30, help="for each batch size and number of threads")
    parser.add_argument("--calibrate", type=int, default=256)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files: dict[str, Path] = {}
        nets = {}
        for name, model in (word.split("=", 1) for word in args.models):
            whole, small = (Path(folder, f"{name}{suffix}.onnx") for suffix in ("", "-int8"))
            paths = [path for path, _ in open_split(args.data, "test").samples]  # type: ignore[union-attr]
            parity = export(*load(model), whole, pictures=paths)
            found = quantize(whole, args.data, small, calibrate=args.calibrate)
            files |= {name: whole, f"{name} int8": small}
            nets[name] = {"parity": str(parity), "same_class_in_int8": found.same, "calibrated_on": found.calibrated}
        rows = {name: measured(file, args.data, Path(folder, "scores.json")) for name, file in files.items()}
        times = [
            {"batch": batch, "threads": threads, "nets": timed(files, batch, threads, args.seconds)}
            for batch in args.batches
            for threads in args.threads
        ]
    result = {
        "what": "exported nets in float32 and int8: top-1 on the test pictures, bytes of the file, seconds a batch",
        "command": f"python benchmarks/deployed.py {args.name} DATA NAME=FILE ...",
        "nets": nets,
        "files": rows,
        "times": times,
        "machine": {"processor": processor()},
        "versions": {
            "onnxruntime": onnxruntime.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }
    text = json.dumps(without_paths(result), indent=1) + "\n"
    Path("results", f"deployed_{args.name}.json").write_text(text)
    print(text)


def measured(file: Path, data: str, scores: Path) -> dict[str, Any]:
    """Top-1 of an exported file on the test pictures, by `ulsam eval`, and its size."""
    words = ["eval", str(file), data, "--split", "test", "--workers", "0", "--json", str(scores)]
    if ulsam(words):
        raise SystemExit(f"ulsam {' '.join(words)} failed")
    found = json.loads(scores.read_text())["scores"]
    kept = {key: found[key] for key in ("pictures", "top1", "top1_interval_95", "top5", "loss")}
    return {**kept, "bytes": file.stat().st_size}


def timed(files: dict[str, Path], batch: int, threads: int, seconds: float) -> dict[str, Any]:
    """Median and 95th percentile of the seconds that each file takes for a batch, all in turn."""
    calls = {name: call(file, batch, threads) for name, file in files.items()}
    taken = times_in_turn(calls, seconds, MOST_TURNS)
    first = statistics.median(next(iter(taken.values())))
    return {
        name: {
            "seconds": statistics.median(values),
            "seconds_p95": float(np.quantile(values, 0.95)),
            "ratio": statistics.median(values) / first,
            "turns": len(values),
        }
        for name, values in taken.items()
    }


def call(file: Path, batch: int, threads: int) -> Callable[[], Any]:
    """A function that runs the file on random pictures."""
    net = runtime.load(file, threads=threads)
    images = np.random.default_rng(0).integers(0, 256, (batch, *net.preprocessing.size, 3), dtype=np.uint8)
    return lambda: net.logits(images)


if __name__ == "__main__":
    main()
