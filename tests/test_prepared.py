"""A model that no spec builds, trained as it is: its files, resuming it, and what is refused."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from stopping import stop_after
from tiny import SETTINGS, draw_splits
from ulsam.base.errors import Interrupted, UlsamError
from ulsam.cli import main
from ulsam.data import loading
from ulsam.model.build import build
from ulsam.surgery.cost import cost
from ulsam.training import parts
from ulsam.training.config import TrainConfig
from ulsam.training.train import resume, train

FILES = ["checkpoint.pt", "config.yaml", "curves.png", "metrics.csv", "summary.json", "weights.safetensors"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 training and 15 validation images of 3 colors."""
    return draw_splits(tmp_path_factory.mktemp("data"), noise=30)


def config(data: Path, **settings: Any) -> TrainConfig:
    return TrainConfig.from_mapping({**SETTINGS, "data": str(data), "lr": 0.05, **settings})


def narrow(seed: int = 0, width: int = 6) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(width, 3),
    )


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "unbroken"
    train(config(data, ema=0.5), run, model=narrow())
    return run


@pytest.fixture
def stopped(data: Path, tmp_path: Path) -> Path:
    """Stopped by Ctrl-C in the second of its 8 updates."""
    call = re.escape(f"; resume with: ulsam.resume({str(tmp_path / 'run')!r}, model=...)")
    with stop_after(1), pytest.raises(Interrupted, match=rf"stopped in epoch 1, step 2{call}"):
        train(config(data, ema=0.5), tmp_path / "run", model=narrow())
    return tmp_path / "run"


def test_its_files(unbroken: Path) -> None:
    assert sorted(os.listdir(unbroken)) == FILES
    with safe_open(unbroken / "weights.safetensors", "pt") as file:
        assert not file.metadata()
    narrow().load_state_dict(load_file(unbroken / "weights.safetensors"))
    summary = json.loads((unbroken / "summary.json").read_text())
    counted = cost(narrow(), (3, 32, 32))
    assert summary["prepared"] is True
    assert (summary["cost"]["params"], summary["cost"]["macs"]) == (counted.params, counted.macs)
    assert summary["base_cost"]["params"] > 50_000
    assert summary["spec"]["classes"] == ["class0", "class1", "class2"]


def test_it_starts_from_the_weights_that_it_has(data: Path, tmp_path: Path) -> None:
    model = narrow()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    summary = train(config(data, epochs=1, lr=1e-9), tmp_path / "run", model=model)
    after = load_file(tmp_path / "run" / "weights.safetensors")
    for name in ("0.weight", "6.weight", "6.bias"):
        torch.testing.assert_close(after[name], before[name], atol=1e-7, rtol=0)
    assert summary["prepared"] is True


def test_a_specs_model_ends_in_the_weights_of_its_own_run(data: Path, tmp_path: Path) -> None:
    """Handed over as it is built, it is trained as `train` trains it."""
    chosen = config(data, ema=0.5)
    train(chosen, tmp_path / "own")
    loading.seed_all(chosen.seed)
    model, _ = build(parts.spec_of_run(chosen, ["class0", "class1", "class2"]))
    train(chosen, tmp_path / "prepared", model=model)
    own = load_file(tmp_path / "own" / "model.safetensors")
    prepared = load_file(tmp_path / "prepared" / "weights.safetensors")
    assert own.keys() == prepared.keys()
    assert all(torch.equal(value, prepared[name]) for name, value in own.items())


def test_a_stopped_run_resumes_to_the_same_weights(stopped: Path, unbroken: Path) -> None:
    resume(stopped, model=narrow(seed=7))  # its own weights do not matter
    assert (stopped / "weights.safetensors").read_bytes() == (unbroken / "weights.safetensors").read_bytes()
    assert sorted(os.listdir(stopped)) == FILES


def test_killed_before_its_first_update_it_resumes_from_the_weights_it_had(
    data: Path, unbroken: Path, tmp_path: Path
) -> None:
    def power_cut(*_: Any) -> None:
        raise SystemError

    handle = register_optimizer_step_pre_hook(power_cut)
    try:
        with pytest.raises(SystemError):
            train(config(data, ema=0.5), tmp_path / "run", model=narrow())
    finally:
        handle.remove()
    assert sorted(os.listdir(tmp_path / "run")) == [".lock", "checkpoint.pt", "config.yaml"]
    resume(tmp_path / "run", model=narrow(seed=7))
    assert (tmp_path / "run" / "weights.safetensors").read_bytes() == (unbroken / "weights.safetensors").read_bytes()


def test_what_cannot_be_resumed(stopped: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UlsamError, match=r"the checkpoint in .* is not of this run: .*size mismatch for 0\.weight"):
        resume(stopped, model=narrow(width=8))
    with pytest.raises(UlsamError, match=r"the checkpoint in .* is not of this run: "):
        resume(stopped, model=nn.Sequential(*narrow(), nn.BatchNorm1d(3)))
    capsys.readouterr()
    assert main(["train", "--resume", str(stopped)]) == 2
    assert capsys.readouterr().err == (
        f"ulsam: error: {stopped} trains a prepared model: resume from Python, "
        f"ulsam.resume({str(stopped)!r}, model=...)\n"
    )
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.yaml").write_text((stopped / "config.yaml").read_text())
    with pytest.raises(
        UlsamError, match=r"plain trains the model of its settings, not a prepared one: leave model out"
    ):
        resume(plain, model=narrow())


@pytest.mark.parametrize(
    ("settings", "model", "message"),
    [
        (
            {"edits": ["insert blocks.2"]},
            narrow(),
            "a prepared model is trained as it is: leave edits out of its settings",
        ),
        ({"weights": "a.pt"}, narrow(), "a prepared model is trained as it is: leave weights out"),
        ({"drop_rate": 0.1}, narrow(), "a prepared model is trained as it is: leave drop_rate out"),
        ({}, narrow()[:-1], r"the prepared model outputs \[1, 6\] for an image; \[1, 3\] is right here"),
        ({}, narrow()[:1], r"the prepared model outputs \[1, 6, 15, 15\] for an image"),
        ({}, narrow()[3:], r"Sequential does not run on one image of \[3, 32, 32\]"),
        ({"ulsam_lr": 2}, narrow(), "`ulsam_lr` has nothing to act on"),
    ],
)
def test_what_cannot_be_trained(
    settings: dict[str, Any], model: nn.Module, message: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UlsamError, match=f"^{message}"):
        train(config(data, **settings), tmp_path / "run", model=model)
    assert not (tmp_path / "run").exists()
