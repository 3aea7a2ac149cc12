"""What attention layers add to a whole model's latency, against the same model without them.

All models are folded (`ulsam.fold`), channels_last, float32, and run in turn in one process. For each edit the model
with those blocks simply taken out is the physical limit; an inserted layer is compared with the base model, beside a
mere copy of the map at its place. A figure is the median of the paired differences, a turn each, over the base model's
median time, with a bootstrapped 95 % interval.

    python benchmarks/network.py                 # results/network.json; 5 minutes on two cores
    python benchmarks/network.py --compile       # half of the edits under torch.compile; results/network_compile.json
"""

import argparse
import functools
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from turns import interval

import ulsam
from ulsam.base.provenance import processor
from ulsam.base.timing import times_in_turn

MAX_TURNS = 20_000

#: name: base model, edit, place, and how many layers it makes
CASES = {
    "replace 14": ("mobilenetv2_100", "replace", "14", 1),
    "replace 17": ("mobilenetv2_100", "replace", "17", 1),
    "replace 14,17": ("mobilenetv2_100", "replace", "14,17", 2),
    "replace 13,14,16,17": ("mobilenetv2_100", "replace", "13,14,16,17", 4),
    "insert 17:1": ("mobilenetv2_100", "insert", "17:1", 1),
    "insert 5:1": ("mobilenetv2_100", "insert", "5:1", 1),
    "a copy at 17:1": ("mobilenetv2_100", "copy", "17:1", 1),
    "a copy at 5:1": ("mobilenetv2_100", "copy", "5:1", 1),
}

COMPILED = ("replace 14,17", "replace 13,14,16,17", "insert 17:1")  # each takes minutes to compile


class Copy(nn.Module):
    """The least that a layer which makes a new map can do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()


def build(base: str, kind: str | None, at: str, form: str) -> nn.Module:
    model = timm.create_model(base)
    if kind == "remove":
        ulsam.remove(model, at)
    elif kind:
        getattr(ulsam, kind.replace("copy", "insert"))(model, at, form=form)
    model = ulsam.fold(model)
    for name, module in list(model.named_modules()):
        if kind == "copy" and isinstance(module, ulsam.ULSAM):
            model.set_submodule(name, Copy())
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--seconds", type=float, default=60, help="for each batch size")
    parser.add_argument("--form", default="released", choices=["equations", "released"])
    args = parser.parse_args()
    torch.manual_seed(0)
    models: dict[str, nn.Module] = {"base": build("mobilenetv2_100", None, "", args.form)}
    cases = {name: case for name, case in CASES.items() if name in COMPILED or not args.compile}
    for name, (base, kind, at, _) in cases.items():
        models[name] = build(base, kind, at, args.form)
        if kind == "replace":
            models[name.replace("replace", "remove")] = build(base, "remove", at, args.form)
    rows = []
    for batch in (1, 32):
        torch.compiler.reset()
        run = {name: torch.compile(model, fullgraph=True) if args.compile else model for name, model in models.items()}
        x = torch.randn(batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)
        calls = {name: functools.partial(model, x) for name, model in run.items()}
        times = times_in_turn(calls, args.seconds, MAX_TURNS)
        base = statistics.median(times["base"])
        for name, (_, kind, _, layers) in cases.items():
            without = name.replace("replace", "remove") if kind == "replace" else "base"
            added = [(a - b) / base / layers for a, b in zip(times[name], times[without], strict=True)]
            low, high = interval(added)
            row: dict[str, Any] = {
                "edit": name,
                "batch": batch,
                "seconds": statistics.median(times[name]),
                "seconds_without": statistics.median(times[without]),
                "base_seconds": base,
                "added_by_each_layer": statistics.median(added),
                "added_interval_95": [low, high],
                "turns": len(added),
            }
            rows.append(row)
            print(
                f"batch {batch:3} {name:22} each layer adds {100 * row['added_by_each_layer']:+.2f} % of the base "
                f"(95 %: {100 * low:+.2f} to {100 * high:+.2f}); time / base {row['seconds'] / base:.3f}, "
                f"blocks taken out {row['seconds_without'] / base:.3f}",
                flush=True,
            )
    result = {
        "what": "latency of folded MobileNet-V2, float32, channels_last, 224 px; a layer as a share of the base model",
        "command": "python benchmarks/network.py" + (" --compile" if args.compile else ""),
        "form": args.form,
        "machine": {"processor": processor(), "threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()},
        "cases": rows,
    }
    name = "network_compile" if args.compile else "network"
    Path(f"results/{name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
