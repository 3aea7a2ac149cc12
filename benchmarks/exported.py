"""What attention layers add to the latency of an exported model, against the same model without them.

As benchmarks/network.py, under ONNX Runtime on one thread: models with random weights, folded and exported, run in turn
in one process; a replacing layer is compared with the model whose blocks were simply taken out, an inserted one against
the base model. Two sessions of one file may differ by a percent, so all are made anew twenty times (for batches four
times), in shuffled order. A figure of one such round is the median of the paired differences, a turn each, over the
base model's median time; the result holds the rounds' median and quartiles. Four minutes, in which nothing else
may run; results/exported.json.

    python benchmarks/exported.py
"""

import argparse
import json
import platform
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import timm
import torch
from network import CASES, build
from torch import nn

from ulsam import runtime
from ulsam.base.provenance import processor
from ulsam.base.timing import times_in_turn
from ulsam.deploy.onnx_graph import onnx_graph

ROOT = Path(__file__).parents[1]
PIXELS = 160
ROUNDS = {1: 20, 32: 4}  # of each batch size
EDITS = ("replace 14,17", "replace 13,14,16,17", "insert 17:1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="for each form and batch size")
    args = parser.parse_args()
    rows = []
    for form in ("equations", "released"):
        files = exported(form)
        for batch, rounds in ROUNDS.items():
            for row in measured(files, batch, args.seconds, rounds):
                rows.append({"form": form, "pixels": PIXELS, "batch": batch, **row})
                print(rows[-1], flush=True)
    result = {
        "what": "latency of exported MobileNet-V2, float32, ONNX Runtime, one thread; each layer's share of the base's",
        "command": "python benchmarks/exported.py",
        "machine": {"processor": processor()},
        "versions": {
            "onnxruntime": onnxruntime.__version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "python": platform.python_version(),
        },
        "cases": rows,
    }
    (ROOT / "results" / "exported.json").write_text(json.dumps(result, indent=1) + "\n")


def exported(form: str) -> dict[str, bytes]:
    """The ONNX files: the base model, each edit, and each place with its blocks taken out."""
    models = {"base": build("mobilenetv2_100", None, "", form)}
    for name in EDITS:
        base, kind, at, _ = CASES[name]
        models[name] = build(base, kind, at, form)
        if kind == "replace":
            models[name.replace("replace", "remove")] = build(base, "remove", at, form)
    example = torch.zeros(2, 3, PIXELS, PIXELS)

    def file(model: nn.Module) -> bytes:
        graph = onnx_graph(model.to(memory_format=torch.contiguous_format), example, {0: "batch"})
        return bytes(graph.SerializeToString())

    return {name: file(model) for name, model in models.items()}


def measured(files: dict[str, bytes], batch: int, seconds: float, rounds: int) -> list[dict[str, Any]]:
    """One row an edit."""
    x = np.random.default_rng(0).standard_normal((batch, 3, PIXELS, PIXELS), np.float32)
    order, shuffle = list(files), random.Random(0).shuffle
    found = []
    for _ in range(rounds):
        shuffle(order)
        found.append(times_in_turn({name: call(files[name], x) for name in order}, seconds / rounds, 20_000))
    rows = []
    for name in EDITS:
        without = name.replace("replace", "remove") if name.startswith("replace") else "base"
        added = [_added(times, name, without) / CASES[name][3] for times in found]
        rows.append(
            {
                "edit": name,
                "seconds": _seconds(found, name),
                "seconds_without": _seconds(found, without),
                "base_seconds": _seconds(found, "base"),
                "added_by_each_layer": statistics.median(added),
                "of_rounds": added,
                "turns": sum(len(times["base"]) for times in found),
            }
        )
    return rows


def _added(times: dict[str, list[float]], name: str, without: str) -> float:
    """What a model takes longer than another, in one round, as a share of the base model's time."""
    differences = [a - b for a, b in zip(times[name], times[without], strict=True)]
    return statistics.median(differences) / statistics.median(times["base"])


def _seconds(rounds: list[dict[str, list[float]]], name: str) -> float:
    return statistics.median(seconds for times in rounds for seconds in times[name])


def call(file: bytes, x: np.ndarray) -> Callable[[], Any]:
    """A function that runs the model on one thread."""
    session = runtime.open_session(file, threads=1)
    (name,) = [put.name for put in session.get_inputs()]
    return lambda: session.run(None, {name: x})


if __name__ == "__main__":
    main()
