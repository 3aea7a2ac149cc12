"""The training step with freed memory kept by the process, as `ulsam train` does it, and handed back, as glibc does.

MobileNet-V2 at 160 px, batch 32, channels_last, one thread. The allocator is a process's own, so each case is a
process, and the processes take turns.

    python benchmarks/allocation.py     # results/allocation.json; 3 minutes
"""

import json
import platform
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from turns import seconds_of

from ulsam.base.provenance import processor
from ulsam.model.build import build, make_spec
from ulsam.training import probe
from ulsam.training.config import TrainConfig
from ulsam.training.machine import keep_freed_memory

ROUNDS, SKIPPED, TIMED = 3, 2, 10
CASES = [(amp, compiled) for amp in ("none", "bf16") for compiled in ("none", "inductor")]


def measure(kept: bool, amp: Any, compiled: Any) -> dict[str, float]:
    if kept:
        keep_freed_memory()
    torch.set_num_threads(1)
    model, _ = build(make_spec("mobilenetv2_100", [str(n) for n in range(100)], size=160))
    config = TrainConfig("none", size=160, batch_size=32, layout="channels_last", amp=amp, compile=compiled, threads=1)
    take = probe.training_step(config, model, (3, 160, 160), torch.device("cpu"))
    seconds = [seconds_of(take) for _ in range(SKIPPED + TIMED)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
    return {"seconds": statistics.median(seconds[SKIPPED:]), "peak_bytes": peak}


def main() -> None:
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(ROUNDS):
        for amp, compiled in CASES:
            for way in ("handed_back", "kept"):
                case = json.dumps([way == "kept", amp, compiled])
                out = subprocess.run([sys.executable, __file__, case], capture_output=True, text=True, check=True)
                found.setdefault(f"{amp}, {compiled}, {way}", []).append(json.loads(out.stdout))
    cases = []
    for amp, compiled in CASES:
        back, kept = (found[f"{amp}, {compiled}, {way}"] for way in ("handed_back", "kept"))
        ratios = [one["seconds"] / other["seconds"] for one, other in zip(back, kept, strict=True)]
        cases.append(
            {
                "amp": amp,
                "compile": compiled,
                "seconds": {"handed_back": [one["seconds"] for one in back], "kept": [one["seconds"] for one in kept]},
                "times_faster": statistics.median(ratios),
                "times_faster_of_each_round": ratios,
                "peak_bytes": {
                    "handed_back": statistics.median(one["peak_bytes"] for one in back),
                    "kept": statistics.median(one["peak_bytes"] for one in kept),
                },
            }
        )
        print(f"{amp} {compiled}: {statistics.median(ratios):.2f} times faster", [f"{ratio:.2f}" for ratio in ratios])
    result = {
        "what": "training step of MobileNet-V2, 160 px, batch 32, channels_last, one thread",
        "command": "python benchmarks/allocation.py",
        "cases": cases,
        "versions": {"torch": torch.__version__, "libc": " ".join(platform.libc_ver()), "kernel": platform.release()},
        "processor": processor(),
    }
    Path("results/allocation.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(*json.loads(sys.argv[1]))))
    else:
        main()
