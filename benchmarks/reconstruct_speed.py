"""How long reconstruction takes: blocks 13, 14, 16 and 17 of MobileNet-V2 removed or replaced by ULSAM, 512 images.

500 steps a place, two places, features cached, channels_last. Weights and images are random: the time is the same.
bfloat16 is beside float32, by autocast.

    python benchmarks/reconstruct_speed.py     # results/reconstruct_speed.json; 5 minutes on two cores
"""

import contextlib
import time
from typing import Any

import timm
import torch

import ulsam
from ulsam.base.files import write_json
from ulsam.base.provenance import processor

EDITS = {"remove": ulsam.remove, "ULSAM": ulsam.replace}


def main() -> None:
    rows: list[dict[str, Any]] = []
    for size in (112, 160):
        batches = list(torch.randn(512, 3, size, size).split(32))
        for name, edit in EDITS.items():
            for dtype in ("float32", "bfloat16"):
                torch.manual_seed(0)
                model = edit(timm.create_model("mobilenetv2_100"), [13, 14, 16, 17])
                half = torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()
                began = time.perf_counter()
                with half:
                    ulsam.reconstruct(model, batches)
                rows.append({"size": size, "edit": name, "dtype": dtype, "seconds": time.perf_counter() - began})
                print(rows[-1], flush=True)
    write_json(
        "results/reconstruct_speed.json",
        {
            "what": "seconds of reconstruction, two places of 500 steps, 512 images",
            "command": "python benchmarks/reconstruct_speed.py",
            "machine": {"processor": processor(), "threads": torch.get_num_threads()},
            "versions": {"torch": torch.__version__, "timm": timm.__version__},
            "cases": rows,
        },
    )


if __name__ == "__main__":
    main()
