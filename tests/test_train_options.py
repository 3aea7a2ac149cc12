"""The settings of a run, each by its effect on the training."""

import copy
import dataclasses
import math
import platform
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.data import Mixup
from torch import Tensor, nn

from tiny import SETTINGS, TINY_MODEL, draw_splits
from training_runs import config, same, weights
from ulsam.base.distributed import World
from ulsam.base.errors import UlsamError
from ulsam.data import loading
from ulsam.layer.ulsam import ULSAM
from ulsam.model.build import build, load, save
from ulsam.study.arms import Arm
from ulsam.study.compare import compare, report
from ulsam.training.loop import Trainer
from ulsam.training.train import train

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An easy set: 36 training and 15 validation images of 3 colors."""
    return draw_splits(tmp_path_factory.mktemp("data"), noise=30)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the model with a head of its own."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("weights") / "start.safetensors"
    save_file(timm.create_model(TINY_MODEL, num_classes=7).state_dict(), path)
    return path


def trainer_of(data: Path, run: Path, **settings: Any) -> Trainer:
    run.mkdir()
    trainer = Trainer(config(data, amp="none", **settings), run, ALONE)
    trainer.prepare()
    return trainer


# options


def test_freeze_keeps_weights_and_statistics(data: Path, start: Path, tmp_path: Path) -> None:
    frozen = ("conv_stem", "bn1", "blocks.0", "blocks.1")
    train(config(data, weights=str(start), freeze=list(frozen), ema=0.5), tmp_path / "run")
    before, after = load_file(start), weights(tmp_path / "run")
    kept = {name for name in before if name.startswith(tuple(part + "." for part in frozen))}
    assert {name.rpartition(".")[2] for name in kept} >= {"weight", "bias", "running_mean", "running_var"}
    moved = {name for name in before if before[name].shape != after[name].shape or not before[name].equal(after[name])}
    assert moved == set(before) - kept


@pytest.mark.slow
def test_a_run_in_a_thread(data: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(train, config(data, epochs=1, workers=1), tmp_path / "thread").result()
    train(config(data, epochs=1, workers=1), tmp_path / "main")
    assert same(weights(tmp_path / "thread"), weights(tmp_path / "main"))


FAULTS = """
import resource, sys, torch
from ulsam.cli import main
from ulsam.training.config import TrainConfig, read_config
from ulsam.training.train import train

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
train(TrainConfig.from_mapping(read_config(sys.argv[1])), sys.argv[2])
faults()
library = faults()
assert main(["train", "--config", sys.argv[1], "--out", sys.argv[3]]) == 0
faults()
print("faults", before, library, faults())
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is another one")
def test_the_command_keeps_the_memory_that_it_frees_and_the_library_does_not(data: Path, tmp_path: Path) -> None:
    """Kept: large tensors that are freed and made again are not fetched from the kernel anew, page by page."""
    settings = tmp_path / "config.yaml"
    settings.write_text(config(data, epochs=1).to_yaml())
    found = subprocess.run(
        [sys.executable, "-c", FAULTS, settings, tmp_path / "library", tmp_path / "command"],
        capture_output=True,
        text=True,
        check=True,
    )
    before, library, command = map(int, found.stdout.rpartition("faults")[2].split())
    assert before > 100 and library * 2 > before and command * 10 < before


def test_no_weight_decay_on_norms_biases_and_ulsam(data: Path, tmp_path: Path) -> None:
    edits = ["insert blocks.2 g=4", "insert blocks.3 g=4 form=released"]
    for opt in ("sgd", "adamw", "lamb"):
        trainer = trainer_of(data, tmp_path / opt, opt=opt, weight_decay=0.03, edits=edits)
        decay = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
        assert decay.keys() == {id(parameter) for parameter in trainer.model.parameters()}
        spared = set()
        for module in trainer.model.modules():
            if isinstance(module, ULSAM | nn.BatchNorm2d):
                spared |= {id(parameter) for parameter in module.parameters()}
        spared |= {id(p) for name, p in trainer.model.named_parameters() if name.endswith("bias")}
        assert {key for key, value in decay.items() if value == 0} == spared
        assert {value for key, value in decay.items() if key not in spared} == {0.03}


def test_accumulation_equals_a_larger_batch(data: Path, tmp_path: Path) -> None:
    common = {"model": "test_convnext", "opt": "adamw", "lr": 1e-3, "smoothing": 0.0, "epochs": 2}
    train(config(data, batch_size=12, **common), tmp_path / "large")
    train(config(data, batch_size=6, accumulate=2, **common), tmp_path / "small")
    large, small = weights(tmp_path / "large"), weights(tmp_path / "small")
    assert not any("running_mean" in name for name in large)
    for name in large:
        torch.testing.assert_close(small[name], large[name], atol=2e-4, rtol=2e-3)


def test_the_saved_weights_are_the_average(data: Path, tmp_path: Path) -> None:
    trainer = trainer_of(data, tmp_path / "run", ema=0.6, epochs=2)
    history: list[dict[str, Tensor]] = []
    trainer.optimizer.register_step_post_hook(lambda *_: history.append(copy.deepcopy(trainer.model.state_dict())))
    trainer.fit()
    assert len(history) == 8
    average = history[0]
    for step, now in enumerate(history[1:], start=1):
        decay = min(0.6, 1 - (1 + step) ** (-2 / 3))
        average = {
            name: decay * average[name] + (1 - decay) * value if value.is_floating_point() else value
            for name, value in now.items()
        }
    saved = weights(tmp_path / "run")
    for name, value in average.items():
        torch.testing.assert_close(saved[name], value, atol=1e-5, rtol=1e-4)
    assert not same(saved, history[-1])


def test_learning_rate_warms_up_and_falls_as_a_cosine(data: Path, tmp_path: Path) -> None:
    trainer = trainer_of(data, tmp_path / "run", lr=0.2, min_lr=0.01, warmup_epochs=1, epochs=3)
    rates: list[float] = []
    trainer.optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    trainer.fit()
    updates = 3 * 4
    cosine = [0.01 + 0.19 * (1 + math.cos(math.pi * step / (updates + 1))) / 2 for step in range(1, updates + 1)]
    assert rates == pytest.approx([0.2 / 4 * step for step in (1, 2, 3)] + cosine[3:])


@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.4}, {"cutmix": 1.0}])
def test_loss_is_the_cross_entropy_with_soft_targets(mixing: dict[str, float], data: Path, tmp_path: Path) -> None:
    trainer = trainer_of(data, tmp_path / "run", batch_size=36, smoothing=0.3, **mixing)
    model = copy.deepcopy(trainer.model).train()
    batch = next(iter(trainer.loader))
    images, targets = batch.images, F.one_hot(batch.labels, 3) * 0.7 + 0.1
    if mixing:
        mix = Mixup(mixing.get("mixup", 0), mixing.get("cutmix", 0), label_smoothing=0.3, num_classes=3)
        loading.seed_all(0, 2, 0, 0, 0)
        images, targets = mix(images, batch.labels)
        assert not torch.equal(targets.sort().values, (F.one_hot(batch.labels, 3) * 0.7 + 0.1).sort().values)
    expected = -(targets * model(images).log_softmax(1)).sum(1).mean().item()
    summary = trainer.fit()
    assert summary["epochs"][0]["train_loss"] == pytest.approx(expected, abs=1e-4)


def test_layout_and_precision(data: Path, tmp_path: Path) -> None:
    plain = train(config(data, lr=2e-3, layout="contiguous"), tmp_path / "plain")
    last = train(config(data, lr=2e-3, layout="channels_last"), tmp_path / "last")
    full = train(config(data, batch_size=36), tmp_path / "full")
    half = train(config(data, batch_size=36, amp="bf16"), tmp_path / "half")
    for name, value in weights(tmp_path / "plain").items():
        torch.testing.assert_close(weights(tmp_path / "last")[name], value, atol=1e-3, rtol=1e-2)
    assert last["scores"]["loss"] == pytest.approx(plain["scores"]["loss"], rel=1e-2)
    assert half["config"]["amp"] == "bf16"
    assert half["epochs"][0]["train_loss"] != full["epochs"][0]["train_loss"]
    assert half["epochs"][0]["train_loss"] == pytest.approx(full["epochs"][0]["train_loss"], rel=0.05)
    assert all(value.dtype != torch.bfloat16 for value in weights(tmp_path / "half").values())


def test_gradients_are_clipped(data: Path, tmp_path: Path) -> None:
    norms: dict[float | None, list[float]] = {}
    for clip in (None, 0.05):
        found = norms[clip] = []
        trainer = trainer_of(data, tmp_path / str(clip), clip_grad=clip)

        def note(optimizer: torch.optim.Optimizer, *_: Any, found: list[float] = found) -> None:
            grads = [p.grad.norm() for group in optimizer.param_groups for p in group["params"]]
            found.append(float(torch.stack(grads).norm()))

        trainer.optimizer.register_step_pre_hook(note)
        trainer.fit()
    assert min(norms[None]) > 0.1
    assert norms[0.05] == pytest.approx([0.05] * 4, rel=1e-3)


def test_weights_with_another_head_start_a_new_one(
    data: Path, start: Path, tmp_path: Path, logged: Callable[[], str]
) -> None:
    trainer = trainer_of(data, tmp_path / "run", weights=str(start), edits=["insert blocks.2"])
    notes = [line for line in logged().splitlines() if line.startswith("note ")]
    assert len(notes) == 2
    assert "classifier.weight: [7, 256] there, [3, 256] here: skipped, starts fresh" in notes[0]
    own = trainer.model.state_dict()
    assert all(own[name].equal(value) for name, value in load_file(start).items() if "classifier" not in name)
    train(config(data, weights=str(start), lr=1e-9), tmp_path / "slow")
    assert weights(tmp_path / "slow")["conv_stem.weight"].allclose(load_file(start)["conv_stem.weight"], atol=1e-6)


@pytest.mark.parametrize("folder", [False, True])
def test_a_model_file_is_trained_further(data: Path, start: Path, tmp_path: Path, folder: bool) -> None:
    """Its architecture, edits, image and weights are taken: as if each were named."""
    settings: dict[str, Any] = {"size": 32, "mean": [0.4] * 3, "crop_pct": 0.9, "model_args": {"act_layer": "relu"}}
    train(config(data, weights=str(start), edits=["insert blocks.1 g=4"], **settings), tmp_path / "first")
    file = tmp_path / "first" / "model.safetensors"
    own: dict[str, Any] = {"seed": 1, "std": [0.3] * 3, "size": None}
    edits = ["insert blocks.2 g=8"]
    train(config(data, model=str(file.parent if folder else file), edits=edits, **own), tmp_path / "short")
    own |= {"weights": str(file), "edits": ["insert blocks.1 g=4", *edits], **settings}
    train(config(data, **own), tmp_path / "long")
    assert same(weights(tmp_path / "short"), weights(tmp_path / "long"))
    assert load(tmp_path / "short" / "model.safetensors")[1] == load(tmp_path / "long" / "model.safetensors")[1]
    assert {str(edit) for edit in load(tmp_path / "short" / "model.safetensors")[1].edits} == set(own["edits"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": "start.safetensors"}, r"model.safetensors, which has its weights: leave `weights` and"),
        ({"pretrained": True}, r"model.safetensors, which has its weights: leave `weights` and `pretrained` out$"),
        ({"model_args": {"in_chans": 1}, "in_chans": 3}, r"`in_chans` is 3, and 1 in `model_args`"),
    ],
)
def test_a_model_file_and_other_settings_exclude_each_other(
    settings: dict[str, Any], message: str, data: Path, tmp_path: Path
) -> None:
    train(config(data), tmp_path / "first")
    with pytest.raises(UlsamError, match=message):
        config(data, model=str(tmp_path / "first" / "model.safetensors"), **settings)


def test_a_file_of_weights_alone_is_no_model_to_train(data: Path, start: Path) -> None:
    with pytest.raises(UlsamError, match=r"start.safetensors holds weights without a spec: name timm's model"):
        config(data, model=str(start))


def test_an_arm_may_be_a_model_file(data: Path, start: Path, tmp_path: Path) -> None:
    """It brings its own weights and architecture, whatever the other arms have, and the shared size."""
    own: dict[str, Any] = {"mean": [0.4] * 3, "model_args": {"act_layer": "relu"}, "size": 48}
    train(config(data, weights=str(start), edits=["insert blocks.1 g=4"], **own), tmp_path / "first")
    shared = config(data, weights=str(start), ulsam_lr=5.0, mean=[0.1] * 3, model_args={"act_layer": "silu"})
    arm = Arm.parse(f"mine: model={tmp_path / 'first'}; insert blocks.2").with_model_file(shared)
    found = arm.config(shared)
    assert found.weights == str(tmp_path / "first" / "model.safetensors")
    assert found.edits == ["insert blocks.1 g=4", "insert blocks.2 g=4"]
    assert (found.model, found.model_args, found.mean, found.size) == (TINY_MODEL, own["model_args"], [0.4] * 3, 32)
    assert found.ulsam_lr == 5.0
    base = Arm.parse("base").with_model_file(shared).config(shared)
    assert (base.weights, base.ulsam_lr, base.mean) == (str(start), 1.0, [0.1] * 3)
    for text in ("x: model=null", "x: model=5", "x: model="):
        with pytest.raises(UlsamError, match=r"^the arm 'x': "):
            Arm.parse(text).with_model_file(shared).config(shared)
    with pytest.raises(UlsamError, match=r"^the arm 'x': no model file runs/gone"):
        Arm.parse("x: model=runs/gone").with_model_file(shared)


@pytest.mark.slow
def test_a_comparison_of_model_files_is_reported_without_them(data: Path, tmp_path: Path) -> None:
    train(config(data, edits=["insert blocks.1 g=4"]), tmp_path / "first")
    arms = ["base", f"mine: model={tmp_path / 'first'}; insert blocks.2"]
    quick = {name: value for name, value in SETTINGS.items() if name != "data"} | {"epochs": 1, "amp": "none"}
    packed = tmp_path / "published.jsonl.gz"
    made = compare(data, arms, tmp_path / "out", seeds=1, settings=quick, publish=packed)
    shutil.rmtree(tmp_path / "first")
    again = report(tmp_path / "again", start_from=packed)
    assert [arm["top1"] for arm in again["arms"]] == [arm["top1"] for arm in made["arms"]]
    assert again["arms"][1]["edits"] == ["insert blocks.1 g=4", "insert blocks.2 g=4"]


def test_the_classifier_of_a_model_file_goes_with_its_classes(
    data: Path, tmp_path: Path, logged: Callable[[], str]
) -> None:
    """Of the same classes in another order it is put into this one; of others it starts fresh, and the run says so."""
    train(config(data), tmp_path / "first")
    file = tmp_path / "first" / "model.safetensors"
    before = weights(tmp_path / "first")["classifier.weight"]
    model, spec = load(file)
    order = ("class2", "class0", "class1")
    save(model, dataclasses.replace(spec, classes=order), tmp_path / "moved.safetensors")
    made, notes = build(spec, weights=tmp_path / "moved.safetensors")
    assert notes == []
    assert [spec.classes.index(name) for name in order] == [2, 0, 1]
    assert made.classifier.weight.equal(before[[1, 2, 0]])  # the file's rows are of class2, class0 and class1
    save(model, dataclasses.replace(spec, classes=("cat", "class1", "dog")), tmp_path / "others.safetensors")
    logged()
    trainer = trainer_of(data, tmp_path / "run", model=str(tmp_path / "others.safetensors"))
    assert "classifier.weight: of other classes there: skipped, starts fresh" in logged()
    assert not trainer.model.classifier.weight.isclose(before).any(1).any()


def test_how_a_model_file_was_trained_is_not_taken(data: Path, tmp_path: Path) -> None:
    train(config(data, drop_rate=0.4, drop_path=0.2), tmp_path / "first")
    found = config(data, model=str(tmp_path / "first"))
    assert (found.drop_rate, found.drop_path, found.model_args) == (0.0, 0.0, {})
    assert trainer_of(data, tmp_path / "run", model=str(tmp_path / "first")).model.drop_rate == 0.0


def test_a_model_file_for_other_channels(data: Path, tmp_path: Path) -> None:
    train(config(data, in_chans=1), tmp_path / "gray")
    found = config(data, model=tmp_path.joinpath("gray", "model.safetensors").as_posix())
    assert (found.channels, found.mean) == (1, [pytest.approx(0.449, abs=0.01)])
    with pytest.raises(UlsamError, match=r"does not fit this model: conv_stem.weight: \[24, 1, 3, 3\] there"):
        train(config(data, model=str(tmp_path / "gray"), in_chans=3), tmp_path / "none")
    train(config(data), tmp_path / "color")
    made = trainer_of(data, tmp_path / "run", model=str(tmp_path / "color"), in_chans=1)
    assert made.config.mean is None and len(made.spec.mean) == 1
    assert made.model.conv_stem.weight.allclose(weights(tmp_path / "color")["conv_stem.weight"].sum(1, keepdim=True))


def test_training_further_says_what_was_trained_on_before(
    data: Path, tmp_path: Path, logged: Callable[[], str]
) -> None:
    flat = tmp_path / "flat"
    shutil.copytree(data / "train", flat)
    train(config(flat, val_fraction=0.5, seed=3), tmp_path / "first")
    logged()
    train(config(flat, model=str(tmp_path / "first")), tmp_path / "second")
    assert re.search(r"note .*model.safetensors was trained on \d+ of the \d+ images that are held out here", logged())


def test_a_path_that_is_no_model_file(data: Path) -> None:
    with pytest.raises(UlsamError, match=r"^no model file runs/typo"):
        config(data, model="runs/typo")


def test_dropout_reaches_the_model(data: Path, tmp_path: Path) -> None:
    summary = train(config(data, drop_rate=0.4, drop_path=0.2, model_args={"act_layer": "relu"}), tmp_path / "run")
    model, _ = load(tmp_path / "run" / "model.safetensors")
    assert model.drop_rate == 0.4
    assert summary["spec"]["model_args"] == {"act_layer": "relu", "drop_rate": 0.4, "drop_path_rate": 0.2}
    assert any(getattr(module, "drop_prob", 0) for module in model.modules())


def test_balanced_sampling(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    for index in range(1, 12):
        (tmp_path / "data" / "train" / "class1" / f"{index:03}.png").unlink()
    trainer = trainer_of(tmp_path / "data", tmp_path / "run", sampler="balanced", batch_size=5)
    drawn: Counter[int] = Counter()
    for epoch in range(6):
        trainer.order.epoch = epoch  # type: ignore[union-attr]
        drawn.update(label for batch in trainer.loader for label in batch.labels.tolist())
    assert min(drawn.values()) > 0.7 * max(drawn.values())
