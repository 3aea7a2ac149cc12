"""Distillation: its losses against naive ones, the places of the maps, the teacher left alone, and resuming."""

import copy
import dataclasses
import json
import math
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
from safetensors.torch import load_file
from timm.data import Mixup
from torch import Tensor, nn

from stopping import stop_after
from tiny import SETTINGS, TINY_MODEL, Warm, draw_splits, options
from ulsam.base.distributed import World
from ulsam.base.errors import Interrupted, UlsamError
from ulsam.data import loading
from ulsam.model.build import build, load, save
from ulsam.model.spec import Edit, ModelSpec
from ulsam.surgery import edit as surgery
from ulsam.surgery.trace import trace
from ulsam.training import probe
from ulsam.training.checkpoint import read_checkpoint
from ulsam.training.config import TrainConfig
from ulsam.training.distill import FeatureCapture, feature_loss, open_teacher, shared_places, soft_target_loss
from ulsam.training.loop import Trainer
from ulsam.training.machine import why_not_compiled
from ulsam.training.step import TrainingStep
from ulsam.training.train import resume, train

ALONE = World(0, 1, torch.device("cpu"))
CLASSES = ("class0", "class1", "class2")
SIZE = (3, 64, 64)
EDITS = ["insert blocks.3", "replace blocks.4.0.se"]
PLACES = ["blocks.3.0", "blocks.4.0.se", "bn2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 training and 15 validation images of 3 colors."""
    return draw_splits(tmp_path_factory.mktemp("data"), noise=30)


def spec(*edits: str, base: str = TINY_MODEL, classes: tuple[str, ...] = CLASSES, **rest: Any) -> ModelSpec:
    return ModelSpec(base, classes, tuple(map(Edit.parse, edits)), input_size=SIZE, **rest)


def update_norms(model: nn.Module, images: Tensor) -> None:
    """Give the BatchNorms the statistics of these images, as training would."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the plain mean
    model.train()(images)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file, of images normalized in another way than the students'."""
    torch.manual_seed(3)
    its = spec(mean=(0.4, 0.5, 0.6), std=(0.3, 0.2, 0.25))
    model, _ = build(its)
    update_norms(model, torch.randn(32, *SIZE))
    nn.init.normal_(model.classifier.weight, std=0.2)
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save(model, its, path)
    return path


def config(data: Path | str, **settings: Any) -> TrainConfig:
    settings = {**SETTINGS, "data": str(data), "epochs": 1, "size": 64, "amp": "none", "compile": "none", **settings}
    return TrainConfig.from_mapping(settings)


def weights(run: Path, name: str = "model") -> dict[str, Tensor]:
    return load_file(run / f"{name}.safetensors")


# the losses


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_targets_by_hand(temperature: float) -> None:
    logits, teacher_logits = torch.randn(5, 7, dtype=torch.float64), 3 * torch.randn(5, 7, dtype=torch.float64)
    total = 0.0
    for mine, its in zip(logits.tolist(), teacher_logits.tolist(), strict=True):
        p, q = (
            [math.exp(v / temperature) / sum(math.exp(w / temperature) for w in row) for v in row]
            for row in (its, mine)
        )
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    loss = soft_target_loss(logits, teacher_logits, temperature)
    assert loss.item() == pytest.approx(temperature**2 * total / 5, rel=1e-5)


def test_gradient_of_the_soft_targets() -> None:
    """Equation 2 of the paper, times T^2: T * (softmax(mine / T) - softmax(its / T)) for each image."""
    logits, teacher_logits = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4)
    soft_target_loss(logits, teacher_logits, 4.0).backward()
    expected = 4 * ((logits / 4).softmax(1) - (teacher_logits / 4).softmax(1)) / 6
    torch.testing.assert_close(logits.grad, expected.detach())


def test_feature_loss_depends_on_no_size() -> None:
    mine, its = torch.randn(2, 2, 8, 5, 5)
    share = float(((mine - its) ** 2).sum() / (its**2).sum())
    assert feature_loss([mine], [its]).item() == pytest.approx(share, rel=1e-5)
    assert feature_loss([100 * mine], [100 * its]).item() == pytest.approx(share, rel=1e-5)
    assert feature_loss([mine.repeat(1, 3, 2, 2)], [its.repeat(1, 3, 2, 2)]).item() == pytest.approx(share, rel=1e-5)
    pair = feature_loss([mine, its], [its, its])
    assert pair.item() == pytest.approx(share / 2, rel=1e-5)


@pytest.mark.parametrize(
    "settings", [{}, {"mixup": 0.4}, {"distill": 0.0}, {"distill": 1.0, "smoothing": 0.0}], ids=str
)
def test_the_step_is_that_of_the_formula(
    settings: dict[str, Any], data: Path, teacher: Path, tmp_path: Path, logged: Callable[[], str]
) -> None:
    """Loss and gradients against those written out with plain models, on images that the teacher normalizes anew."""
    chosen = config(data, teacher=str(teacher), distill_features=0.7, batch_size=12, edits=EDITS, **settings)
    trainer = Trainer(chosen, tmp_path, ALONE)
    trainer.prepare()
    log = logged()
    weight = chosen.distill
    assert weight is not None
    assert (
        f"teacher {TINY_MODEL}; edits: none; soft targets weigh {weight:g}, at temperature 4; maps weigh 0.7, at "
        in log
    )
    student = copy.deepcopy(trainer.model).train()
    batch = next(iter(trainer.loader))
    images, labels = batch.images, batch.labels
    if trainer.mixing:
        loading.seed_all(1)
        images, labels = Mixup(0.4, label_smoothing=0.1, num_classes=3)(images, labels)
    trainer.training_step.train()
    smoothing = 0.0 if trainer.mixing else chosen.smoothing
    loss = trainer.training_step.add_gradients(images, labels, smoothing=smoothing)

    master, its = load(teacher)
    mine, theirs = trainer.spec, its
    pixels = images * torch.tensor(mine.std).view(3, 1, 1) + torch.tensor(mine.mean).view(3, 1, 1)
    its_images = (pixels - torch.tensor(theirs.mean).view(3, 1, 1)) / torch.tensor(theirs.std).view(3, 1, 1)
    maps: list[dict[str, Tensor]] = [{}, {}]
    for found, model in zip(maps, (student, master), strict=True):
        for place in PLACES:
            model.get_submodule(place).register_forward_hook(
                lambda _, __, out, place=place, found=found: found.update({place: out})
            )
    logits, its_logits = student(images), master(its_images).detach()
    targets = labels if trainer.mixing else nn.functional.one_hot(labels, 3) * (1 - smoothing) + smoothing / 3
    hard = -(targets * logits.log_softmax(1)).sum(1).mean()
    p = (its_logits / 4).softmax(1)
    soft = 16 * (p * (p.log() - (logits / 4).log_softmax(1))).sum(1).mean()
    shares = [(maps[0][k] - maps[1][k].detach()).square().mean() / maps[1][k].detach().square().mean() for k in PLACES]
    expected = (1 - weight) * hard + weight * soft + 0.7 * sum(shares) / 3
    expected.backward()  # type: ignore[no-untyped-call]
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    for (name, ours), plain in zip(trainer.model.named_parameters(), student.parameters(), strict=True):
        assert ours.grad is not None, name
        assert plain.grad is not None, name
        torch.testing.assert_close(ours.grad, plain.grad, rtol=2e-3, atol=2e-3 * float(plain.grad.abs().max()) + 1e-7)


def test_a_student_like_its_teacher_has_nothing_to_learn(data: Path, tmp_path: Path) -> None:
    """In eval mode, where both compute the same, both distillation losses are 0 and so is their gradient."""
    its = spec()
    model, _ = build(its)
    save(model, its, tmp_path / "teacher.safetensors")
    chosen = config(data, teacher=str(tmp_path / "teacher.safetensors"), distill=1.0, distill_features=1.0)
    chosen = dataclasses.replace(chosen, layout="contiguous")
    training = TrainingStep(chosen, model.eval(), 1, ALONE, open_teacher(chosen, its, model))
    loss = training.add_gradients(torch.randn(4, *SIZE), torch.zeros(4, dtype=torch.long), smoothing=0.0)
    assert loss == pytest.approx(0, abs=1e-5)


# where maps are compared


@pytest.mark.parametrize(
    ("edits", "places"),
    [
        ([], ["bn2"]),
        (["replace blocks.4.0.se"], ["blocks.4.0.se", "bn2"]),
        (["remove blocks.4.0.se"], ["blocks.4.0.se", "bn2"]),
        (["insert blocks.3"], ["blocks.3.0", "bn2"]),
        (EDITS, PLACES),
    ],
)
def test_places_are_those_of_the_edits_and_the_last_map(edits: list[str], places: list[str]) -> None:
    flows = trace(build(spec())[0], SIZE)
    assert shared_places(build(spec(*edits))[0], flows, SIZE) == places


@pytest.mark.parametrize("size", [(3, 64, 64), (3, 32, 32)], ids=str)
@pytest.mark.parametrize(
    ("base", "edits", "places"),
    [
        ("mobilenetv2_035", [], ["bn2"]),
        ("mobilenetv2_035", ["replace 17"], ["blocks.5.2", "bn2"]),  # a map of one pixel, at 32 px
        ("mobilenetv3_small_050", [], ["blocks"]),  # whose head is convolutions behind the pooling
        ("resnet18", [], ["layer4"]),
        ("resnet18", ["replace layer4.1"], ["layer4.1"]),  # which is what layer4 outputs
        ("resnet18", ["replace layer4.1.bn2"], ["layer4.1.bn2", "layer4"]),
        ("regnetx_002", ["replace s4.b7"], ["s4.b7"]),  # which s4 and final_conv, an identity, hand on
    ],
)
def test_the_last_map_is_found_at_any_size_and_counted_once(
    base: str, edits: list[str], places: list[str], size: tuple[int, int, int]
) -> None:
    flows = trace(build(spec(base=base))[0], size)
    assert shared_places(build(spec(*edits, base=base))[0], flows, size) == places


def test_a_place_that_the_teacher_lacks_is_left_out() -> None:
    wider = trace(build(spec(base="mobilenetv2_100"))[0], SIZE)
    narrow = build(spec("remove 14", base="mobilenetv2_035"))[0]
    assert shared_places(narrow, wider, SIZE) == ["bn2"]  # 1280 channels at any width up to 1
    with pytest.raises(UlsamError, match=r"the teacher has none at blocks.4.0.se, bn2: leave distill_features out, or"):
        shared_places(build(spec("remove blocks.4.0.se"))[0], wider, SIZE)


def test_a_map_behind_an_inserted_layer_is_the_layers() -> None:
    its = spec("insert blocks.3")
    model = build(its)[0].eval()
    tapped, x = FeatureCapture(model, ["blocks.3.0"]), torch.randn(1, *SIZE)
    with tapped.listening(), torch.no_grad():
        _, (found,) = tapped(x)
    plain = surgery.undo(copy.deepcopy(model))
    with torch.no_grad():
        before = plain.blocks[:4](plain.bn1(plain.conv_stem(x)))
        torch.testing.assert_close(found, model.blocks[3][0].ulsam(before))
    assert not torch.equal(found, before)


def test_a_map_is_what_its_place_puts_out_whatever_follows_in_place() -> None:
    """ResNet adds the shortcut to the output of bn2, and applies its ReLU, in place."""
    model = build(spec(base="resnet18"))[0].eval()
    block, x = model.layer1[0], torch.randn(1, 64, 16, 16)
    tapped = FeatureCapture(block, ["bn2"])
    with tapped.listening(), torch.no_grad():
        nn.init.constant_(block.bn2.bias, -0.3)
        _, (found,) = tapped(x)
        by_hand = block.bn2(block.conv2(block.act1(block.bn1(block.conv1(x)))))
    torch.testing.assert_close(found, by_hand)


def test_at_a_convolution_the_teacher_keeps_its_batchnorm(data: Path, teacher: Path) -> None:
    base = spec()
    student = surgery.insert(build(base)[0], "blocks.3.0.se.conv_expand", 2, input_size=SIZE)
    found = open_teacher(config(data, teacher=str(teacher), distill_features=1.0), base, student)
    assert found is not None
    assert found.places == ("blocks.3.0.se.conv_expand", "bn2")
    assert found.notes == ("the teacher is not folded: a feature map is taken at a convolution",)
    assert isinstance(found.model.bn1, nn.BatchNorm2d)


def test_a_place_inside_a_norm_that_is_folded_away(data: Path, teacher: Path) -> None:
    """timm's BatchNorm with an activation in it: what is left of it keeps its names."""
    its = spec()
    student = surgery.insert(build(its)[0], "blocks.3.0.bn1.act", 2, input_size=SIZE)
    found = open_teacher(config(data, teacher=str(teacher), distill_features=1.0), its, student)
    assert found is not None
    assert found.notes == ()
    x, (plain, _) = torch.randn(1, *SIZE), load(teacher)
    maps = []
    for model in (found.model, plain):
        tapped = FeatureCapture(model, ["blocks.3.0.bn1.act"])
        with tapped.listening(), torch.no_grad():
            maps += tapped(x)[1]
    assert isinstance(plain.blocks[3][0].bn1, nn.BatchNorm2d)
    assert not isinstance(found.model.blocks[3][0].bn1, nn.BatchNorm2d)
    torch.testing.assert_close(maps[0], maps[1], rtol=1e-4, atol=1e-5)


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
