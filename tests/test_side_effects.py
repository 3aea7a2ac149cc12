"""Importing the package and calling it leave the process as it was."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models import register_model
from torch import nn

import ulsam
from tiny import SETTINGS, draw_splits
from ulsam.base.threads import cpu_threads
from ulsam.deploy.classifier import open_classifier

STATE = """
import importlib, json, logging, os, pkgutil, random, signal, sys, warnings
import numpy, timm, torch
from torch.nn.modules import module

def state():
    return [
        dict(os.environ), torch.get_num_threads(), str(torch.get_default_dtype()), torch.is_grad_enabled(),
        torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark, torch.get_rng_state().sum().item(),
        hash(random.getstate()), hash(numpy.random.get_state()[1].tobytes()), len(warnings.filters),
        [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)],
        [len(getattr(module, name)) for name in dir(module) if name.startswith("_global_") and "hooks" in name],
        [len(logging.getLogger(name).handlers) for name in (None, "ulsam")], sys.excepthook is sys.__excepthook__,
    ]
"""
IMPORTS = (
    STATE
    + """
import fastapi, matplotlib.figure, torchvision  # these change what they like
before = state()
import ulsam
skipped = ("__main__", "attached", "kernels", "sitecustomize", "bench_worker", "ray_launcher", "ultralytics")
names = [found.name for found in pkgutil.walk_packages(ulsam.__path__, "ulsam.")]
for name in names:
    if not name.endswith(skipped):
        importlib.import_module(name)
assert len(names) > 100
print(json.dumps([before, state()]))
"""
)


@pytest.mark.slow
def test_importing_every_module_changes_and_reads_nothing() -> None:
    wrong = {"ULSAM_BACKEND": "no such backend", "ULSAM_ISA": "no such set", "TRITON_INTERPRET": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], env={**environment, **wrong}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    before, after = json.loads(done.stdout.splitlines()[-1])
    assert after == before


@pytest.mark.slow
def test_the_environment_is_read_when_it_is_needed() -> None:
    code = (
        "import os, torch; from ulsam.layer.ops import which_backend; os.environ['ULSAM_BACKEND'] = 'reference'; "
        "print(which_backend(torch.ones(1, 8, 4, 4)))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "ULSAM_BACKEND"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "('reference', 'asked for')\n"


TRAINS = (
    STATE
    + """
import ulsam
settings = json.loads(sys.argv[1])
torch.manual_seed(7), random.seed(7), numpy.random.seed(7)
before = state()
ulsam.train(sys.argv[2], sys.argv[3], **settings)
print(json.dumps([before, state()]))
"""
)


@pytest.mark.slow
def test_training_leaves_the_process_as_it_was(tmp_path: Path) -> None:
    data = draw_splits(tmp_path / "data")
    threads = 2 if torch.get_num_threads() != 2 else 1
    settings = {**SETTINGS, "epochs": 1, "threads": threads, "seed": 3, "mixup": 0.2, "workers": 1}
    words = [json.dumps(settings), str(data), str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-c", TRAINS, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, after = json.loads(done.stdout.splitlines()[-1])
    assert after == before


def test_a_failed_training_leaves_threads_and_generators_too(tmp_path: Path) -> None:
    data = draw_splits(tmp_path / "data")
    with cpu_threads(2):
        torch.manual_seed(5), random.seed(5), np.random.seed(5)
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
        with pytest.raises(ulsam.UlsamError, match="the loss is"):
            ulsam.train(data, tmp_path / "run", **{**SETTINGS, "lr": 1e30})
        assert torch.get_num_threads() == 2
        after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


def test_using_a_model_leaves_the_process_as_it_was(tmp_path: Path) -> None:
    data, file = draw_splits(tmp_path / "data"), tmp_path / "model.safetensors"
    spec = ulsam.make_spec(
        SETTINGS["model"], ["class0", "class1", "class2"], [ulsam.Edit("insert", "blocks.2", 4)], size=32
    )
    ulsam.save(ulsam.build(spec)[0], spec, file)
    image = str(next(data.glob("val/*/*.png")))
    opened = open_classifier(file, threads=2 if torch.get_num_threads() != 2 else 1)
    uses: dict[str, Callable[[], object]] = {
        "load": lambda: ulsam.load(file),
        "evaluate": lambda: ulsam.evaluate(file, data, workers=0),
        "predict": lambda: list(ulsam.predict(file, [image])),
        "other threads": lambda: opened.logits(np.zeros((1, 32, 32, 3), np.uint8)),
        "explain": lambda: ulsam.explain(file, image),
        "inspect": lambda: ulsam.inspect(ulsam.load(file)[0], [torch.zeros(1, 3, 32, 32)]),
        "cost": lambda: ulsam.cost(ulsam.load(file)[0], (3, 32, 32)),
        "export": lambda: ulsam.export(file, tmp_path / "model.onnx"),
    }
    names: dict[str, Any] = {}
    exec(STATE, names)
    for name, use in uses.items():
        before = names["state"]()
        use()
        after = names["state"]()
        before[0] = {**before[0], "ORT_DISABLE_TELEMETRY": "1"}  # as `ulsam.runtime` says
        after[0].setdefault("ORT_DISABLE_TELEMETRY", "1")
        assert after == before, name


@pytest.mark.slow
def test_opening_a_model_does_not_limit_other_threads(tmp_path: Path) -> None:
    """What is refused while a file is opened, a spec of far too many parameters, another thread may build."""
    made = []

    @register_model
    def test_door_busy(pretrained: bool = False, **options: Any) -> nn.Module:
        def build() -> int:
            with torch.device("meta"):
                return len(list(nn.ModuleList(nn.Linear(1, 1) for _ in range(15_000)).parameters()))

        with ThreadPoolExecutor(1) as pool:
            made.append(pool.submit(build).result())
        return timm.create_model("test_efficientnet", **options)

    spec = ulsam.ModelSpec("test_door_busy", ("a", "b"), input_size=(3, 32, 32))
    model, _ = ulsam.build(spec)
    ulsam.save(model, spec, tmp_path / "model.safetensors")
    made.clear()
    assert ulsam.load(tmp_path / "model.safetensors")[1] == spec
    assert made == [30_000] * len(made) and made
