"""Distilled runs: the teacher left alone, resuming, and what is refused."""

import copy
import dataclasses
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distilling import ALONE, CLASSES, EDITS, PLACES, SIZE, config, save_teacher, spec
from stopping import stop_after
from tiny import SETTINGS, TINY_MODEL, Warm, draw_splits, options
from ulsam.base.errors import Interrupted, UlsamError
from ulsam.model.build import build, load, save
from ulsam.training import probe
from ulsam.training.checkpoint import read_checkpoint
from ulsam.training.config import TrainConfig
from ulsam.training.distill import open_teacher
from ulsam.training.loop import Trainer
from ulsam.training.machine import why_not_compiled
from ulsam.training.train import resume, train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 training and 15 validation images of 3 colors."""
    return draw_splits(tmp_path_factory.mktemp("data"), noise=30)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "teacher.safetensors")


# the run


def test_the_teacher_is_left_alone(data: Path, teacher: Path, tmp_path: Path) -> None:
    before = teacher.read_bytes()
    chosen = config(data, teacher=str(teacher), distill_features=1.0, ema=0.5, edits=EDITS, lr=0.01)
    trainer = Trainer(chosen, tmp_path, ALONE)
    trainer.prepare()
    assert trainer.teacher is not None
    assert trainer.training_step.distiller is not None
    working = trainer.training_step.distiller.teacher
    state = copy.deepcopy(working.state_dict())
    hooks = {name: len(module._forward_hooks) for name, module in trainer.model.named_modules()}
    summary = trainer.fit()
    assert not working.training
    assert working.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in working.state_dict().items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in working.parameters())
    assert {name: len(module._forward_hooks) for name, module in trainer.model.named_modules()} == hooks
    assert trainer.ema is not None
    assert {name: len(module._forward_hooks) for name, module in trainer.ema.module.named_modules()} == hooks
    assert teacher.read_bytes() == before
    assert summary["teacher"]["places"] == PLACES
    assert summary["teacher"]["spec"]["base"] == TINY_MODEL
    assert read_checkpoint(tmp_path)["teacher"] == summary["teacher"]["sha256"]  # type: ignore[index]
    _, its = load(tmp_path / "model.safetensors")  # a model file as any other
    assert its.classes == CLASSES


def test_the_probe_times_the_teacher_too(data: Path, teacher: Path) -> None:
    its = spec()
    student, _ = build(its)
    chosen = config(data, teacher=str(teacher), layout="contiguous")
    found = open_teacher(chosen, its, student)
    assert found is not None
    calls = []
    found.model.register_forward_hook(lambda *_: calls.append(1))  # a copy of the model keeps it
    probe.training_step(chosen, student, SIZE, torch.device("cpu"), found)()
    assert len(calls) == 1
    resolved = probe.resolve_auto(dataclasses.replace(chosen, layout="auto"))
    assert resolved.teacher == str(teacher)


@pytest.mark.slow
@pytest.mark.skipif(why_not_compiled() is not None, reason="no C++ compiler")
def test_a_compiled_run_is_taught_the_same(data: Path, teacher: Path, tmp_path: Path) -> None:
    settings = {"teacher": str(teacher), "distill_features": 1.0, "edits": EDITS, "lr": 2e-3, "epochs": 2, "ema": 0.5}
    eager = train(config(data, **settings), tmp_path / "eager")
    compiled = train(config(data, **{**settings, "compile": "inductor"}), tmp_path / "compiled")
    for ours, plain in zip(compiled["epochs"], eager["epochs"], strict=True):
        assert ours["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-3)
        assert ours["val_loss"] == pytest.approx(plain["val_loss"], rel=1e-2)
    load(tmp_path / "compiled" / "model.safetensors")


@pytest.mark.slow
def test_two_processes_are_taught_as_one(interpreter: Warm, data: Path, tmp_path: Path) -> None:
    """At a learning rate of nothing both see the mean loss of the same images, but for the batches' own scales."""
    its = spec(base="test_convnext")  # without BatchNorm
    model, _ = build(its)
    nn.init.normal_(model.head.fc.weight, std=0.2)
    save(model, its, tmp_path / "teacher.safetensors")
    settings = {"model": "test_convnext", "batch_size": 4, "lr": 1e-8, "layout": "contiguous"}
    chosen = config(data, teacher=str(tmp_path / "teacher.safetensors"), distill_features=0.5, **settings)
    one = train(chosen, tmp_path / "one")
    (tmp_path / "run.yaml").write_text(chosen.to_yaml())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    words = ["train", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "two")]
    pids = [
        interpreter.start(words, tmp_path / f"log{rank}", env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    assert [interpreter.ask(wait=pid) for pid in pids] == [0, 0], (tmp_path / "log0").read_text()
    two = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert two["versions"]["processes"] == "2"
    assert two["epochs"][0]["train_loss"] == pytest.approx(one["epochs"][0]["train_loss"], rel=0.02)
    load(tmp_path / "two" / "model.safetensors")


# resuming


FULL = {"epochs": 2, "lr": 0.01, "mixup": 0.3, "drop_rate": 0.2, "ema": 0.5, "distill_features": 0.5, "ulsam_lr": 3.0}


@pytest.fixture(scope="module")
def unbroken(data: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "unbroken"
    train(config(data, teacher=str(teacher), edits=EDITS, **FULL), run)
    return run


@pytest.mark.slow
def test_a_stopped_run_resumes_with_the_same_teacher_alone(
    data: Path, teacher: Path, unbroken: Path, tmp_path: Path, logged: Callable[[], str]
) -> None:
    run, mine = tmp_path / "run", Path(shutil.copy(teacher, tmp_path / "mine.safetensors"))
    with stop_after(5), pytest.raises(Interrupted, match="stopped in epoch 2, step 2"):
        train(config(data, teacher=str(mine), edits=EDITS, **FULL), run)
    whole = mine.read_bytes()
    its = spec(std=(0.2, 0.2, 0.2))
    save(build(its)[0], its, mine)
    with pytest.raises(UlsamError, match=r"^the teacher's file is not the one that this run was started with: put"):
        resume(run)
    mine.unlink()
    with pytest.raises(UlsamError, match=r"^no model file .*mine\.safetensors$"):
        resume(run)
    with pytest.raises(UlsamError, match=r"distill was 0.5 and cannot be changed"):
        resume(run, {"distill": 0.6})
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(whole)
    logged()
    summary = resume(run, {"teacher": str(moved)})
    assert "warning" not in logged()
    assert (run / "model.safetensors").read_bytes() == (unbroken / "model.safetensors").read_bytes()
    assert summary["scores"] == json.loads((unbroken / "summary.json").read_text())["scores"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes as Linux lists them")
def test_a_killed_run_resumes_to_the_same_weights(
    interpreter: Warm, data: Path, teacher: Path, unbroken: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    settings = {**SETTINGS, "size": 64, "amp": "none", "compile": "none", **FULL, "save_seconds": 0}
    edits = ["--insert", "blocks.3", "--replace", "blocks.4.0.se"]
    pid = interpreter.start(
        ["train", str(data), "--teacher", str(teacher), *edits, "--out", str(run), *options(settings)], log
    )
    end = time.monotonic() + 60
    while not (run / "checkpoint.pt").exists():
        assert time.monotonic() < end, log.read_text()
    assert interpreter.kill(pid) == -signal.SIGKILL, log.read_text()
    assert not (run / "summary.json").exists()
    assert interpreter.run(["train", "--resume", str(run)], log) == 0, log.read_text()
    assert (run / "model.safetensors").read_bytes() == (unbroken / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_checkpoint_from_before_these_settings_resumes(data: Path, tmp_path: Path) -> None:
    chosen = config(data, epochs=2, lr=0.01)
    train(chosen, tmp_path / "unbroken")
    run = tmp_path / "run"
    with stop_after(5), pytest.raises(Interrupted):
        train(chosen, run)
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    new = ("teacher", "distill", "distill_temperature", "distill_features", "ulsam_lr")
    state["settings"] = {name: value for name, value in state["settings"].items() if name not in new}
    torch.save(
        {name: value for name, value in state.items() if name not in ("teacher", "prepared")}, run / "checkpoint.pt"
    )
    resume(run)
    assert (run / "model.safetensors").read_bytes() == (tmp_path / "unbroken" / "model.safetensors").read_bytes()


# refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distill": 0.5}, "`distill` needs a teacher: name the model file of a trained model"),
        ({"distill_temperature": 4}, "`distill_temperature` needs a teacher"),
        ({"distill_features": 0}, "`distill_features` needs a teacher"),
        ({"teacher": "a", "distill": 1.5}, "`distill` must lie between 0 and 1, not 1.5"),
        ({"teacher": "a", "distill_temperature": 0}, "`distill_temperature` must be above 0, not 0.0"),
        ({"teacher": "a", "distill_features": -1}, "`distill_features` must be 0 or more, not -1.0"),
        (
            {"teacher": "a", "distill": 0},
            "`distill` and `distill_features` are both 0: the teacher would teach nothing",
        ),
        ({"ulsam_lr": 0}, "`ulsam_lr` must be above 0, not 0.0"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UlsamError, match=f"^{message}"):
        TrainConfig.from_mapping({"data": "birds", **settings})


def test_a_run_without_a_teacher_gets_none_when_it_resumes(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(TrainConfig("birds").to_yaml())
    with pytest.raises(UlsamError, match=r"own settings: teacher was None and cannot be changed$"):
        resume(tmp_path, {"teacher": str(teacher)})


def test_a_diverged_run_names_the_weight_of_its_maps(data: Path, teacher: Path, tmp_path: Path) -> None:
    trainer = Trainer(config(data, teacher=str(teacher), distill_features=1e38, lr=1e3), tmp_path, ALONE)
    trainer.prepare()
    with pytest.raises(UlsamError, match=r"or `amp=none`, or a lower `distill_features`$"):
        trainer.fit()


def test_the_defaults_of_a_teacher_are_written_down(teacher: Path) -> None:
    given = TrainConfig("birds", teacher="a.safetensors")
    assert (given.distill, given.distill_temperature, given.distill_features) == (0.5, 4.0, 0.0)
    assert dataclasses.replace(given, lr=0.1).distill == 0.5
    plain = TrainConfig("birds")
    assert (plain.distill, plain.distill_temperature, plain.distill_features) == (None, None, None)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("class0", "class1"), "it knows 2 classes, the data has 3"),
        (("class0", "class2", "class1"), "its class 1 is 'class2', that of the data is 'class1'"),
    ],
)
def test_a_teacher_of_other_classes(classes: tuple[str, ...], message: str, data: Path, tmp_path: Path) -> None:
    its = spec(classes=classes)
    save(build(its)[0], its, tmp_path / "other.safetensors")
    with pytest.raises(UlsamError, match=rf"other\.safetensors cannot teach: {message}$"):
        train(config(data, teacher=str(tmp_path / "other.safetensors")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# the learning rate of ULSAM layers


@pytest.mark.parametrize("opt", ["sgd", "adamw", "lion"])
def test_ulsam_layers_move_at_their_own_rate(opt: str, data: Path, tmp_path: Path) -> None:
    """After one update from the same weights, theirs have moved three times as far, the others as far as ever."""
    moved: list[dict[str, Tensor]] = []
    for scale in (1.0, 3.0):
        chosen = config(data, opt=opt, lr=0.1, ulsam_lr=scale, edits=EDITS, weight_decay=0.0)
        trainer = Trainer(chosen, tmp_path / f"{opt}{scale}", ALONE)
        trainer.prepare()
        before = copy.deepcopy(dict(trainer.model.named_parameters()))
        batches = trainer._begin_epoch()
        trainer._update(batches, False, False)
        moved.append({name: (p - before[name]).detach() for name, p in trainer.model.named_parameters()})
    ours = {name for name in moved[0] if "pointwise" in name or ("depthwise" in name and "conv" not in name)}
    ours = {name for name in ours if name.startswith(("blocks.4.0.se.", "blocks.3.0.ulsam."))}
    assert len(ours) == 4
    assert max(float(moved[0][name].abs().max()) for name in ours) > 1e-6
    for name, step in moved[0].items():
        factor = 3.0 if name in ours else 1.0
        torch.testing.assert_close(moved[1][name], factor * step, rtol=1e-2, atol=1e-6)


def test_a_rate_for_layers_that_are_not_there(data: Path, tmp_path: Path) -> None:
    for settings in ({}, {"edits": ["insert blocks.3"], "freeze": ["blocks.3"]}, {"edits": ["remove blocks.4.0.se"]}):
        with pytest.raises(UlsamError, match=r"^`ulsam_lr` has nothing to act on: this model has no ULSAM layer"):
            Trainer(config(data, ulsam_lr=2.0, **settings), tmp_path, ALONE).prepare()
    assert os.listdir(tmp_path) == []
