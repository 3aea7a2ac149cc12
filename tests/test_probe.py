"""The probe: what it chooses, when it does not run, and that a run is the same with it and without."""

import copy
import dataclasses
import os
import random
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from stopping import stop_after
from tiny import SETTINGS, TINY_MODEL, draw_splits, options
from ulsam.base.distributed import World
from ulsam.base.errors import Interrupted, UlsamError
from ulsam.cli import main
from ulsam.model.build import build, load
from ulsam.model.spec import Edit, ModelSpec
from ulsam.training import machine
from ulsam.training.checkpoint import read_checkpoint
from ulsam.training.config import TrainConfig, read_config
from ulsam.training.loop import Trainer
from ulsam.training.probe import Setup, TakeStep, choose, probe, resolve_auto, setup_candidates, time_steps, undecided
from ulsam.training.train import resume, train

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
NO_COMPILER = "there is no C++ compiler 'no-such-compiler' (CXX names another)"
PLAIN, LAST = Setup("contiguous"), Setup("channels_last")
PLAIN_BF16, LAST_BF16 = Setup("contiguous", "bf16"), Setup("channels_last", "bf16")
SIZE = (3, 32, 32)
MANY = 100_000  # updates an epoch: a run that is worth a probe


def config(data: str | Path = "data", **settings: Any) -> TrainConfig:
    return TrainConfig.from_mapping({**SETTINGS, "data": str(data), "epochs": 1, **settings})


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build(ModelSpec(TINY_MODEL, ("a", "b", "c"), (Edit.parse("insert blocks.2 g=4"),), input_size=SIZE))[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_splits(tmp_path_factory.mktemp("data"), noise=30)


class Timer:
    """A measuring function with given times; notes what it was asked for."""

    def __init__(self, times: Mapping[Setup, float]) -> None:
        self.times = times
        self.asked: list[list[Setup]] = []

    def __call__(self, take: Mapping[Setup, TakeStep], steps: int) -> dict[Setup, float]:
        self.asked.append(list(take))
        return {setup: self.times[setup] for setup in take if setup in self.times}


# the choice


@pytest.mark.parametrize(
    ("times", "best"),
    [
        ({PLAIN: 1.0, LAST: 0.5, PLAIN_BF16: 0.8, LAST_BF16: 0.3}, LAST_BF16),
        ({PLAIN: 1.0, LAST: 0.5, PLAIN_BF16: 0.8, LAST_BF16: 0.49}, LAST),  # 2 % are noise
        ({PLAIN: 1.0, LAST: 0.96}, PLAIN),
        ({PLAIN: 1.0, LAST: 0.94}, LAST),
        ({PLAIN: 1.0, LAST: 2.0, PLAIN_BF16: 0.7, LAST_BF16: 0.68}, PLAIN_BF16),
        ({PLAIN: 1.0, LAST: 0.97, PLAIN_BF16: 0.94}, PLAIN_BF16),
        ({LAST_BF16: 7.0}, LAST_BF16),
    ],
)
def test_the_fastest_wins_by_a_margin(times: dict[Setup, float], best: Setup) -> None:
    assert choose(times) == best


def be_a_machine(
    monkeypatch: pytest.MonkeyPatch, *, bf16: bool, used: bool = True, compiler: str = sys.executable
) -> None:
    """With bfloat16 in hardware or not, which oneDNN uses or not, and with a program in the compiler's place."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: used)
    monkeypatch.setenv("CXX", compiler)


@pytest.mark.parametrize(("bf16", "used"), [(True, True), (True, False), (False, True)])
def test_bf16_is_a_candidate_where_the_processor_has_it(
    bf16: bool, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_a_machine(monkeypatch, bf16=bf16, used=used)
    found = setup_candidates(config(), CPU)
    assert found == ([PLAIN, LAST, PLAIN_BF16, LAST_BF16] if bf16 and used else [PLAIN, LAST])


@pytest.mark.slow  # a process that imports torch
def test_a_limit_on_the_instruction_set_counts() -> None:
    code = "import torch; from ulsam.training.machine import has_bf16; assert not has_bf16(torch.device('cpu'))"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"})


@pytest.mark.parametrize(
    ("given", "asked", "chosen"),
    [
        ({}, [PLAIN, LAST, PLAIN_BF16, LAST_BF16], LAST_BF16),
        ({"amp": "none"}, [PLAIN, LAST], LAST),
        ({"layout": "contiguous"}, [PLAIN, PLAIN_BF16], PLAIN_BF16),
        ({"compile": "none"}, [PLAIN, LAST, PLAIN_BF16, LAST_BF16], LAST_BF16),
        ({"compile": "inductor", "amp": "bf16"}, [PLAIN_BF16, LAST_BF16], Setup("channels_last", "bf16", "inductor")),
        ({"layout": "contiguous", "amp": "none"}, [PLAIN], PLAIN),
    ],
)
def test_what_is_given_is_not_probed(
    given: dict[str, str], asked: list[Setup], chosen: Setup, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_a_machine(monkeypatch, bf16=True)
    if len(asked) == 1 and machine.why_not_compiled():
        pytest.skip(f"nothing is left to time: {machine.why_not_compiled()}")
    timer = Timer({PLAIN: 1e-3, LAST: 8e-4, PLAIN_BF16: 7e-4, LAST_BF16: 5e-4})
    resolved, lines = probe(config(**given), model, SIZE, MANY, ALONE, timer)
    assert timer.asked == [asked]
    assert (resolved.layout, resolved.amp, resolved.compile) == dataclasses.astuple(chosen)
    assert dataclasses.replace(resolved, layout="auto", amp="auto", compile="auto") == dataclasses.replace(
        config(), layout="auto", amp="auto", compile="auto"
    )
    assert all(f"--{name}" not in lines[-1] for name in given)
    assert f"{dataclasses.replace(chosen, compile='none')}: " in lines[0]


@pytest.mark.parametrize("bf16", [True, False])
def test_nothing_is_probed_where_all_is_given_or_the_run_is_short(
    bf16: bool, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_a_machine(monkeypatch, bf16=bf16)
    timer = Timer({})
    given = config(layout="contiguous", amp="none", compile="none")
    assert probe(given, model, SIZE, MANY, ALONE, timer) == (given, [])
    resolved, lines = probe(config(), model, SIZE, 300, ALONE, timer)
    assert (resolved.layout, resolved.amp, resolved.compile) == ("channels_last", "none", "none")
    assert lines == [
        "probe   none for a run of 300 steps: channels_last float32 eager; to choose: `layout` `amp` `compile`"
    ]
    assert probe(config(layout="contiguous"), model, SIZE, 300, ALONE, timer)[0].layout == "contiguous"
    assert timer.asked == []


def test_nothing_is_probed_where_the_machine_leaves_no_choice(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_a_machine(monkeypatch, bf16=False, compiler="no-such-compiler")
    timer = Timer({})
    resolved, lines = probe(config(layout="contiguous", compile="none"), model, SIZE, MANY, ALONE, timer)
    assert (resolved.layout, resolved.amp, resolved.compile) == ("contiguous", "none", "none")
    only = "probe   none: this machine leaves no choice but contiguous float32 eager"
    assert lines == [f"{only}; to choose: `amp`"]
    resolved, lines = probe(config(layout="contiguous"), model, SIZE, MANY, ALONE, timer)
    assert (resolved.layout, resolved.amp, resolved.compile) == ("contiguous", "none", "none")
    assert lines == [f"{only}, as {NO_COMPILER}; to choose: `amp` `compile`"]
    assert timer.asked == []


def test_what_does_not_fit_into_the_memory_is_left_out(model: nn.Module) -> None:
    resolved, lines = probe(config(amp="none"), model, SIZE, MANY, ALONE, Timer({LAST: 1e-3}))
    assert resolved.layout == "channels_last"
    assert "contiguous float32 eager does not fit into the memory" in lines[0]
    with pytest.raises(UlsamError, match=r"^the memory is full: use a smaller `batch_size`"):
        probe(config(), model, SIZE, MANY, ALONE, Timer({}))

    def full() -> None:
        raise torch.OutOfMemoryError

    assert list(time_steps({PLAIN: full, LAST: lambda: None}, MANY)) == [LAST]


@pytest.mark.parametrize(("seconds", "steps", "times"), [(0.001, MANY, 16), (0.02, 30, 4)])
def test_the_probe_is_short(seconds: float, steps: int, times: int) -> None:
    """A step that is not timed, then 15 that are; 3 where more would be a notable part of the run."""
    taken = 0

    def take() -> None:
        nonlocal taken
        taken += 1
        time.sleep(seconds)

    time_steps({PLAIN: take}, steps)
    assert taken == times


def test_compilation_is_tried_where_it_can_pay(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    be_a_machine(monkeypatch, bf16=False)
    given = config(amp="none")
    short = probe(given, model, SIZE, MANY, ALONE, Timer({PLAIN: 1e-2, LAST: 1e-2}))[1][-1]
    assert "not compiled: it takes a minute or more, which a run of about 16 min 40 s does not earn back" in short
    monkeypatch.setenv("CXX", "no-such-compiler")
    resolved, lines = probe(given, model, SIZE, MANY, ALONE, Timer({PLAIN: 1.0, LAST: 1.0}))
    assert resolved.compile == "none"
    assert f"not compiled: {NO_COMPILER}" in lines[-1]


# no trace


def test_it_leaves_no_trace(model: nn.Module) -> None:
    torch.manual_seed(1)
    random.seed(2)
    np.random.seed(3)
    before = copy.deepcopy(model.state_dict())
    kinds = {name: (value.stride(), value.dtype) for name, value in model.state_dict().items()}
    flags = [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy(), torch.get_num_threads()
    resolved, lines = probe(config(drop_rate=0.3, freeze=["conv_stem"]), model, SIZE, 2000, ALONE)
    assert not undecided(resolved)
    assert " ms a step" in lines[0]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    assert torch.get_num_threads() == states[3]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: (value.stride(), value.dtype) for name, value in model.state_dict().items()} == kinds
    assert [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()] == flags


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many images as make a run worth a probe."""
    return draw_splits(tmp_path_factory.mktemp("many"), train=120, noise=30)


def long_enough(many: Path, **settings: Any) -> TrainConfig:
    """540 steps, and two candidates."""
    return config(many, **{"epochs": 3, "batch_size": 2, "amp": "none", **settings})


@pytest.mark.slow
def test_a_probed_run_ends_in_the_weights_of_one_with_given_settings(
    many: Path, tmp_path: Path, logged: Callable[[], str]
) -> None:
    probed = train(long_enough(many, drop_rate=0.2, ema=0.5), tmp_path / "probed")
    assert logged().count("probe   ") == 2
    chosen = {name: probed["config"][name] for name in ("layout", "amp", "compile")}
    assert "auto" not in chosen.values()
    given = train(long_enough(many, drop_rate=0.2, ema=0.5, **chosen), tmp_path / "given")
    repeated = ["train", "--config", str(tmp_path / "probed" / "config.yaml"), "--out", str(tmp_path / "repeated")]
    assert main(repeated) == 0
    assert "probe " not in logged()
    assert given["config"] == probed["config"] == read_config(tmp_path / "repeated" / "config.yaml")
    first, second, third = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("probed", "given", "repeated")
    )
    assert first == second == third


def test_a_candidate_that_runs_out_of_memory_late_is_left_out() -> None:
    turns = iter(range(100))

    def greedy() -> None:
        if next(turns) == 2:
            raise torch.OutOfMemoryError

    assert list(time_steps({Setup("contiguous"): greedy, Setup(): lambda: None}, 1000)) == [Setup()]


def test_one_probe_serves_a_comparison(many: Path, logged: Callable[[], str]) -> None:
    torch.manual_seed(1)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    resolved = resolve_auto(long_enough(many))
    assert logged().count("probe   ") == 2
    assert "auto" not in (resolved.layout, resolved.amp, resolved.compile)
    assert resolve_auto(resolved) == resolved
    assert logged() == ""
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


# resuming


def test_a_resumed_run_does_not_probe(many: Path, tmp_path: Path, logged: Callable[[], str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    trainer = Trainer(long_enough(many), run, ALONE)
    trainer.prepare()
    (run / "config.yaml").write_text(trainer.config.to_yaml())
    trainer.save()
    assert "auto" not in read_checkpoint(run)["settings"].values()  # type: ignore[index]
    assert logged().count("probe   ") == 2
    with stop_after(1), pytest.raises(Interrupted):
        resume(run)
    assert read_checkpoint(run)["position"]["updates"] == 2  # type: ignore[index]
    assert read_config(run / "config.yaml") == dataclasses.asdict(trainer.config)
    assert "probe " not in logged()


def test_a_run_does_not_change_its_choice(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    trainer = Trainer(config(data), run, ALONE)
    trainer.prepare()
    (run / "config.yaml").write_text(trainer.config.to_yaml().replace("layout: channels_last", "layout: auto"))
    with pytest.raises(UlsamError, match=r"config.yaml was changed: layout is auto, but the run had chosen; put it"):
        resume(run)
    (run / "config.yaml").write_text(trainer.config.to_yaml())
    with pytest.raises(UlsamError, match=r"layout was channels_last and cannot be changed"):
        resume(run, {"layout": "contiguous"})


# what the machine lacks


def test_bf16_without_hardware_is_allowed_and_reported(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    be_a_machine(monkeypatch, bf16=False)
    resolved, lines = probe(config(amp="bf16"), model, SIZE, 10, ALONE)
    assert resolved.amp == "bf16"
    assert lines[0] == "note    cpu has no bfloat16 in hardware here: `amp=none` may be faster than bf16"


def test_compilation_without_a_compiler_is_one_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert machine.why_not_compiled()
    words = ["train", str(data), "--out", str(tmp_path / "run"), *options({**SETTINGS, "compile": "inductor"})]
    assert main(words) == 2
    assert capsys.readouterr().err == (
        f"ulsam: error: --compile inductor: {NO_COMPILER}; install it, or use --compile none\n"
    )
    assert not (tmp_path / "run").exists()


def test_compilation_needs_the_headers_of_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert machine.why_not_compiled() == f"there is no {tmp_path / 'Python.h'}, which python3-dev or the like brings"
    (tmp_path / "Python.h").touch()
    assert machine.why_not_compiled() is None


# compiled


@pytest.mark.slow
@pytest.mark.skipif(machine.why_not_compiled() is not None, reason="no C++ compiler")
def test_a_compiled_run(data: Path, tmp_path: Path) -> None:
    settings = {"epochs": 3, "lr": 2e-3, "ema": 0.5, "edits": ["insert blocks.2 g=4"], "layout": "channels_last"}
    eager = train(config(data, **settings, amp="none", compile="none"), tmp_path / "eager")
    compiled = train(config(data, **settings, amp="none", compile="inductor"), tmp_path / "compiled")
    for ours, plain in zip(compiled["epochs"], eager["epochs"], strict=True):
        assert ours["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-3)
        assert ours["val_loss"] == pytest.approx(plain["val_loss"], rel=1e-2)
    plain_weights, weights = (load_file(tmp_path / name / "model.safetensors") for name in ("eager", "compiled"))
    assert weights.keys() == plain_weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, plain_weights[name], atol=1e-3, rtol=1e-2)
    state = read_checkpoint(tmp_path / "compiled")
    assert state is not None
    assert state["model"].keys() == state["ema"].keys() == weights.keys()
    load(tmp_path / "compiled" / "model.safetensors")
