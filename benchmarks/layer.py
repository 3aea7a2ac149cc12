"""The layer's time against the released module's loop over groups, a copy of the tensor, and torch.compile.

All contenders are timed in turn, in one process, on the same tensor; a figure is a ratio of medians. Each makes its own
output, the copy too (`clone`). The loop is written from the paper's description: what the authors released runs the
groups one after the other.

    python benchmarks/layer.py                   # the table; 90 seconds on two cores; results/layer.json with AVX-512,
                                                 # results/layer_avx2.json on a processor with AVX2
    python benchmarks/layer.py --bf16            # in bfloat16, results/layer_bf16.json
    ULSAM_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/layer.py
                                                 # as a processor with AVX2 would
    python benchmarks/layer.py --compile         # beside torch.compile of the definition, results/layer_compile.json
"""

import argparse
import copy
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from turns import medians

from ulsam import ULSAM
from ulsam.base.provenance import processor
from ulsam.layer.ops import cpu, reference, which_backend

SWITCHES = ("ULSAM_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")  # with which one processor stands for another
SHAPES = [(96, 14), (160, 7), (320, 7), (512, 14), (1024, 7)]
BATCHES = [1, 32]
GROUPS = [4, 16]
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
FORMS = ["equations", "released"]


class Subspace(nn.Module):
    """One subspace of the released module, or (bare) of the paper's equations."""

    def __init__(self, channels: int, bare: bool) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 1, groups=channels, bias=not bare)
        self.depthwise_norm = nn.Identity() if bare else nn.BatchNorm2d(channels)
        self.relu = nn.Identity() if bare else nn.ReLU()
        self.pool = nn.MaxPool2d(3, stride=1, padding=1)
        self.pointwise = nn.Conv2d(channels, 1, 1, bias=not bare)
        self.pointwise_norm = nn.Identity() if bare else nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.pool(self.relu(self.depthwise_norm(self.depthwise(x))))
        h = self.relu(self.pointwise_norm(self.pointwise(h)))
        return x * h.flatten(2).softmax(-1).view_as(h) + x


class Loop(nn.Module):
    """The subspaces one after the other, then joined."""

    def __init__(self, channels: int, groups: int, form: str) -> None:
        super().__init__()
        size = channels // groups
        self.subspaces = nn.ModuleList(Subspace(size, form == "equations") for _ in range(groups))

    def forward(self, x: Tensor) -> Tensor:
        parts = x.chunk(len(self.subspaces), 1)
        return torch.cat([subspace(part) for subspace, part in zip(self.subspaces, parts, strict=True)], 1)


def inference(x: Tensor, groups: int, form: str, with_compile: bool, seconds: float) -> dict[str, float]:
    channels = x.shape[1]
    layer = ULSAM(channels, groups, form=form).eval().fold()  # type: ignore[arg-type]
    loop = Loop(channels, groups, form).eval().to(x.dtype, memory_format=torch.channels_last)
    contenders: dict[str, Callable[[], Any]] = {
        "copy": lambda: x.clone(),
        "ours": lambda: layer(x),
        "loop": lambda: loop(x),
    }
    if with_compile:
        torch.compiler.reset()
        scale, shift, weight, bias, norms, eps = layer._operands()
        definition = torch.compile(reference.subspace_attention, fullgraph=True, dynamic=False)
        relu = form != "equations"
        contenders["compile"] = lambda: definition(x, scale, shift, weight, bias, norms, groups, relu, eps)
    with torch.no_grad():
        return medians(contenders, seconds)


def training(x: Tensor, groups: int, form: str, seconds: float) -> dict[str, float]:
    channels = x.shape[1]
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    dy = torch.randn_like(x)
    layer = ULSAM(channels, groups, form=form)  # type: ignore[arg-type]
    loop = Loop(channels, groups, form).to(x.dtype)

    def step(module: nn.Module) -> Callable[[], Any]:
        leaves = [x, *module.parameters()]
        return lambda: torch.autograd.grad(module(x), leaves, dy)

    return medians({"ours": step(layer), "loop": step(loop)}, seconds)


def extra_memory(x: Tensor, groups: int, form: str) -> float:
    """The most that forward and backward hold at once beyond x, y and their gradients, as a share of x."""
    layer = ULSAM(x.shape[1], groups, form=form)  # type: ignore[arg-type]
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    dy = torch.randn_like(x)
    shown = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # the profiler's own remarks
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            y = layer(x)
            gradients = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    os.dup2(shown, 2)
    os.close(shown)
    held = most = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return (most - y.nbytes - gradients[0].nbytes) / x.nbytes


def error(x: Tensor, groups: int, form: str) -> float:
    """The largest difference of y to that of float64, over y's largest value."""
    layer = ULSAM(x.shape[1], groups, form=form)  # type: ignore[arg-type]
    with torch.no_grad():
        y, exact = layer(x), copy.deepcopy(layer).double()(x.double())
    return float((y.double() - exact).abs().max() / exact.abs().max())


def geometric_mean(values: list[float]) -> float:
    return statistics.geometric_mean(values) if values else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--seconds", type=float, default=0.4, help="for each case")
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    environment = {name: os.environ[name] for name in SWITCHES if name in os.environ}
    instructions = cpu.ISA_NAMES[cpu.chosen_isa() or cpu.LIBRARY.ulsam_isa()] if cpu.LIBRARY else None
    kernels = "" if instructions == "AVX-512" else f"_{str(instructions).lower()}"
    out = "layer" + kernels + "_bf16" * args.bf16 + "_compile" * args.compile
    torch.manual_seed(0)
    rows = []
    print(f"{'case':34} {'loop/ours':>18} {'ours/copy':>10} {'ours':>10}  {'training loop/ours':>18}")
    for channels, size in SHAPES:
        for batch in BATCHES:
            for layout, memory_format in LAYOUTS.items():
                x = torch.randn(batch, channels, size, size).relu().to(dtype).contiguous(memory_format=memory_format)
                for groups in GROUPS:
                    for form in FORMS:
                        row: dict[str, Any] = {
                            "shape": [batch, channels, size, size],
                            "kib": x.nbytes // 1024,
                            "layout": layout,
                            "groups": groups,
                            "form": form,
                            "backend": which_backend(x)[0],
                            "inference_seconds": inference(x, groups, form, args.compile, args.seconds),
                            "training_seconds": training(x, groups, form, args.seconds),
                            "extra_memory": extra_memory(x, groups, form),
                            "error": error(x, groups, form),
                        }
                        rows.append(row)
                        found, step = row["inference_seconds"], row["training_seconds"]
                        case = f"{batch} x {channels} x {size} x {size} {layout[:4]} g={groups} {form[:3]}"
                        print(
                            f"{case:34} {found['loop'] / found['ours']:18.1f} {found['ours'] / found['copy']:10.2f} "
                            f"{1e6 * found['ours']:7.0f} us  {step['loop'] / step['ours']:18.1f}",
                            flush=True,
                        )
    summary = summarize(rows)
    for form, figures in summary.items():
        for name, value in figures.items():
            print(f"{form:12} {name:30} {value:8.3g}")
    result = {
        "what": "seconds a call, medians of turns; loop: the groups one after the other, as the released module does",
        "command": " ".join(["python benchmarks/layer.py", *sys.argv[1:]]),
        "dtype": str(dtype).removeprefix("torch."),
        "machine": {"processor": processor(), "threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "instructions": instructions,
        "environment": environment,
        "summary": summary,
        "cases": rows,
    }
    Path(f"results/{out}.json").write_text(json.dumps(result, indent=1) + "\n")


def summarize(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The figures of each form; means are geometric.

    How many times faster it is than the loop; its time over a copy's, from 256 KiB on; microseconds of a call below
    that; memory beyond x, y and their gradients, of x; error against float64; torch.compile's time over its own.
    """

    def ratios(over: str, under: str, step: str = "inference_seconds", **wanted: Any) -> list[float]:
        chosen = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
        return [row[step][over] / row[step][under] for row in chosen if over in row[step]]

    large = [row for row in rows if row["kib"] >= 256]
    small = [row for row in rows if row["kib"] < 256]
    out: dict[str, dict[str, float]] = {}
    for form in FORMS:
        figures = out[form] = {}
        found = ratios("loop", "ours", form=form)
        figures["inference_speedup_mean"] = geometric_mean(found)
        figures["inference_speedup_min"] = min(found)
        found = ratios("loop", "ours", "training_seconds", form=form)
        figures["training_speedup_mean"] = geometric_mean(found)
        figures["training_speedup_min"] = min(found)
        for layout in LAYOUTS:
            found = [
                row["inference_seconds"]["ours"] / row["inference_seconds"]["copy"]
                for row in large
                if row["form"] == form and row["layout"] == layout
            ]
            figures[f"over_copy_{layout}_mean"] = geometric_mean(found)
            figures[f"over_copy_{layout}_max"] = max(found)
        figures["small_microseconds_max"] = max(
            1e6 * row["inference_seconds"]["ours"] for row in small if row["form"] == form
        )
        for groups in GROUPS:
            memory = max(row["extra_memory"] for row in large if row["form"] == form and row["groups"] == groups)
            figures[f"extra_memory_g{groups}_max"] = memory
        figures["error_max"] = max(row["error"] for row in rows if row["form"] == form)
        if found := ratios("compile", "ours", form=form):
            figures["compile_over_ours_mean"] = geometric_mean(found)
            figures["compile_over_ours_min"] = min(found)
    return out


if __name__ == "__main__":
    main()
