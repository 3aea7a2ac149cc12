"""The layer's time against channels, height and width, and batch, and a figure of it.

    python benchmarks/sweep.py     # results/sweep.json, docs/speed.png; a minute on two cores

All contenders take turns in one process, as in layer.py; the layer is the released form with g = 4, folded, in
channels_last, without gradients.
"""

import json
import platform
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from layer import Loop
from torch import nn
from turns import medians

from ulsam import ULSAM
from ulsam.base.provenance import processor
from ulsam.layer.ops import reference

GROUPS = 4
#: what varies, its values, and the shape at each
SWEEPS: dict[str, tuple[list[int], Any]] = {
    "channels": ([16, 32, 64, 128, 256, 512, 1024, 2048], lambda n: (8, n, 14, 14)),
    "height and width": ([1, 2, 4, 7, 14, 28, 56, 112], lambda n: (1, 96, n, n)),
    "batch": ([1, 2, 4, 8, 16, 32, 64, 128, 256], lambda n: (n, 160, 7, 7)),
}
NAMES = {"loop": "loop over the groups", "definition": "definition, plain PyTorch", "ours": "ULSAM", "copy": "copy"}
LINES = {"loop": ("#d55e00", "--"), "definition": ("#cc79a7", "-."), "ours": ("#0072b2", "-"), "copy": ("#666666", ":")}


def measure(shape: tuple[int, ...]) -> dict[str, float]:
    x = torch.randn(*shape).relu().contiguous(memory_format=torch.channels_last)
    layer = ULSAM(shape[1], GROUPS, form="released").eval().fold()
    loop: nn.Module = Loop(shape[1], GROUPS, "released").eval().to(memory_format=torch.channels_last)
    scale, shift, weight, bias, norms, eps = layer._operands()

    def definition() -> object:
        return reference.subspace_attention(x, scale, shift, weight, bias, norms, GROUPS, True, eps)

    with torch.inference_mode():
        calls = {"copy": x.clone, "ours": lambda: layer(x), "loop": lambda: loop(x), "definition": definition}
        return medians(calls, 1.0)


def draw(result: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(1, len(SWEEPS), figsize=(11, 3.6), sharey=True, constrained_layout=True)
    for axis, sweep in zip(axes, result["sweeps"], strict=True):
        points = sweep["points"]
        for name, title in NAMES.items():
            color, style = LINES[name]
            times = [1e6 * point["seconds"][name] for point in points]
            axis.loglog([point["value"] for point in points], times, style, color=color, label=title, marker="o", ms=3)
        axis.set_xlabel(f"{sweep['varies']} (of {sweep['of']})")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("microseconds a call")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    torch.manual_seed(0)
    sweeps = []
    for varies, (values, shape_at) in SWEEPS.items():
        points = [{"value": value, "shape": shape_at(value), "seconds": measure(shape_at(value))} for value in values]
        of = " x ".join("n" if value == 3 else str(value) for value in shape_at(3))
        sweeps.append({"varies": varies, "of": of, "points": points})
        for point in points:
            times = ", ".join(f"{name} {1e6 * seconds:.1f} us" for name, seconds in point["seconds"].items())
            print(f"{varies} {point['value']}: {times}", flush=True)
    result = {
        "what": "seconds a call, medians of turns, released form folded, g = 4, channels_last, float32",
        "command": "python benchmarks/sweep.py",
        "machine": {"processor": processor(), "threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "sweeps": sweeps,
    }
    Path("results/sweep.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, Path("docs/speed.png"))


if __name__ == "__main__":
    main()
