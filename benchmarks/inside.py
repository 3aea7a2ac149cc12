"""Where the time of an attention layer goes in a whole model at batch 1, and when it is called again and again by
itself.

    python benchmarks/inside.py     # results/inside.json; 20 seconds on two cores

The layer is inserted at 17:1 of MobileNet-V2, released form, folded. Its parts are timed where they are
called, so the clock's own time is in them. In the model, what the layer needs has left the caches since its last call.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import ulsam
from ulsam.base.provenance import processor
from ulsam.layer.ops import cpu

CALLS = 500


def main() -> None:
    torch.manual_seed(0)
    model = timm.create_model("mobilenetv2_100")
    ulsam.insert(model, "17:1", form="released")
    model = ulsam.fold(model)
    found: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            began = time.perf_counter()
            result = call(*arguments)
            found.setdefault(name, []).append(time.perf_counter() - began)
            return result

        return run

    assert cpu.LIBRARY is not None
    cpu.LIBRARY.ulsam_run = timed("kernels", cpu.LIBRARY.ulsam_run)  # type: ignore[assignment]
    cpu.empty_like = timed("output_memory", cpu.empty_like)  # type: ignore[assignment]
    layer = next(module for module in model.modules() if isinstance(module, ulsam.ULSAM))
    layer.forward = timed("layer", layer.forward)  # type: ignore[method-assign]
    inputs: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    x = torch.randn(1, 3, 224, 224).contiguous(memory_format=torch.channels_last)

    def medians(module: nn.Module, given: torch.Tensor) -> dict[str, float]:
        found.clear()
        for _ in range(CALLS):
            module(given)
        middle = {name: statistics.median(times) for name, times in found.items()}
        whole = middle.pop("layer")
        return {**middle, "python": whole - sum(middle.values()), "total": whole}

    with torch.inference_mode():
        model(x)
        handle.remove()
        result = {
            "what": "median seconds of a call, MobileNet-V2 at batch 1, 224 px, ULSAM inserted at 17:1, folded",
            "command": "python benchmarks/inside.py",
            "machine": {"processor": processor(), "threads": torch.get_num_threads()},
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "seconds": {"in_the_model": medians(model, x), "by_itself": medians(layer, inputs[0])},
        }
    Path("results/inside.json").write_text(json.dumps(result, indent=1) + "\n")
    for place, parts in result["seconds"].items():
        print(place, {name: f"{1e6 * seconds:.1f} us" for name, seconds in parts.items()})


if __name__ == "__main__":
    main()
