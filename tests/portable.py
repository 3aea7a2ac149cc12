"""What a user does on Windows, one thing after the other; `test_portable.py` runs it as if it were there.

Each step raises where it fails. The last line of the output is JSON: what the steps found.
"""

import dataclasses
import json
import os
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ulsam
from stopping import stop_after
from tiny import SETTINGS, draw_splits
from ulsam.apps.serve import serve
from ulsam.base.errors import Interrupted
from ulsam.cli import main
from ulsam.deploy.bench_process import Process
from ulsam.deploy.bench_worker import Case
from ulsam.study.comparison_folder import ComparisonFolder
from ulsam.study.launch import lock_run, reason_of, start_process
from ulsam.training.config import TrainConfig
from ulsam.training.train import resume, train

RECIPE = {**SETTINGS, "layout": "contiguous", "amp": "none", "compile": "none", "epochs": 1}


def steps(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"lacks": [hasattr(os, "fork"), hasattr(signal, "SIGCHLD")]}
    data = draw_splits(root / "data")
    config = TrainConfig(**{**RECIPE, "data": str(data)})

    elsewhere = root / "arms" / "base" / "seed-0"  # a run of a comparison, in a process of its own
    elsewhere.parent.mkdir(parents=True)
    lock = lock_run(elsewhere)
    assert lock is not None
    process = start_process(elsewhere, dataclasses.replace(config, cache="true"))

    layer = ulsam.ULSAM(16, groups=4)
    assert layer(torch.randn(2, 16, 7, 9)).shape == (2, 16, 7, 9)
    edited, _ = ulsam.build(ulsam.ModelSpec("mobilenetv2_050", ("a", "b"), input_size=(3, 32, 32)))
    ulsam.replace(edited, "14", groups=4)

    run = root / "run"
    try:
        with stop_after(1):
            train(config, run)
    except Interrupted:
        found["stopped"] = True
    found["top1"] = resume(run)["scores"]["top1"]
    model, exported = str(run / "model.safetensors"), str(root / "model.onnx")
    found["eval"] = main(["eval", model, str(data), "--workers", "1"])  # a reading process, which is spawned
    found["predict"] = main(["predict", model, str(data / "val" / "class0")])
    found["export"] = main(["export", model, "--out", exported])
    found["onnx"] = main(["predict", exported, str(data / "val" / "class0")])

    with ComparisonFolder(root / "comparison").locked():
        pass
    np.save(root / "images.npy", np.zeros((1, 32, 32, 3), np.uint8))
    files = (str(root / name) for name in ("images.npy", "logits.npy"))
    with Process("model", Case("onnxruntime", exported, *files, threads=1, fold=True)) as one:
        assert one.time() > 0

    def end(url: str) -> None:
        threading.Timer(0.1, signal.raise_signal, [signal.SIGINT]).start()

    found["served"] = serve(exported, port=0, ready=end)
    process.wait()
    lock.release()
    found["elsewhere"] = [reason_of(process.returncode, elsewhere), (elsewhere / "summary.json").is_file()]
    return found


if __name__ == "__main__":
    warnings.filterwarnings("error", module="ulsam[.]", category=EncodingWarning)  # which is not UTF-8 there
    print(json.dumps(steps(Path(sys.argv[1]))))
