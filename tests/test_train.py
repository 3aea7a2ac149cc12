"""What a run does and leaves behind: its files, its options, and what it does about bad images and numbers."""

import copy
import csv
import dataclasses
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import Mixup
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from stopping import stop_after
from tiny import SETTINGS, TINY_MODEL, draw, draw_shards, draw_splits, options
from ulsam import __version__
from ulsam.base.distributed import World
from ulsam.base.errors import Interrupted, UlsamError
from ulsam.cli import main
from ulsam.data import loading
from ulsam.data.images import read_image
from ulsam.layer.ulsam import ULSAM
from ulsam.model.build import load
from ulsam.surgery.cost import cost
from ulsam.training.checkpoint import read_checkpoint
from ulsam.training.config import TrainConfig
from ulsam.training.evaluate import spec_transform, wilson
from ulsam.training.loop import Trainer
from ulsam.training.machine import why_not_compiled
from ulsam.training.train import resume, train

ALONE = World(0, 1, torch.device("cpu"))
FILES = ["checkpoint.pt", "config.yaml", "curves.png", "metrics.csv", "model.safetensors", "summary.json"]


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


def config(data: Path, **settings: Any) -> TrainConfig:
    return TrainConfig.from_mapping({**SETTINGS, "data": str(data), "epochs": 1, "lr": 0.05, **settings})


def trainer_of(data: Path, run: Path, **settings: Any) -> Trainer:
    run.mkdir()
    trainer = Trainer(config(data, amp="none", **settings), run, ALONE)
    trainer.prepare()
    return trainer


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model.safetensors")


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# the files of a run


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from the command line."""
    run = tmp_path_factory.mktemp("runs") / "trained"
    settings = {**SETTINGS, "epochs": 8, "lr": 0.01, "val_every": 3, "rand_augment": "rand-m5-n1"}
    words = ["train", str(data), "--insert", "blocks.2", "--groups", "8", "--out", str(run), *options(settings)]
    assert main(words) == 0
    return run


def test_a_run_leaves_its_files(trained: Path) -> None:
    assert sorted(os.listdir(trained)) == FILES
    with Image.open(trained / "curves.png") as curves:
        curves.load()
        assert curves.width > 300
    state = read_checkpoint(trained)
    assert state is not None
    assert state["position"]["epoch"] == 8


def test_metrics(trained: Path) -> None:
    rows = list(csv.DictReader((trained / "metrics.csv").open()))
    summary = json.loads((trained / "summary.json").read_text())
    assert [row["epoch"] for row in rows] == list("12345678")
    assert [row["epoch"] for row in rows if row["val_top1"]] == ["3", "6", "8"]
    assert all(float(row["images_per_second"]) > 0 for row in rows)
    assert [float(row["train_loss"]) for row in rows] == [row["train_loss"] for row in summary["epochs"]]
    assert float(rows[-1]["val_top1"]) == summary["scores"]["top1"]


def test_an_easy_set_is_learnt(trained: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    losses = [row["train_loss"] for row in summary["epochs"]]
    assert max(losses[4:]) < 0.7 * losses[0]
    assert summary["scores"]["top1"] >= 0.9


def test_scores_are_those_of_the_saved_model(trained: Path, data: Path) -> None:
    scores = json.loads((trained / "summary.json").read_text())["scores"]
    model, spec = load(trained / "model.safetensors")
    assert any(isinstance(module, ULSAM) for module in model.modules())
    transform = spec_transform(spec)
    right: Counter[str] = Counter()
    loss = 0.0
    for label, name in enumerate(spec.classes):
        for path in (data / "val" / name).iterdir():
            with torch.no_grad():
                logits = model(transform(read_image(path))[None])[0].double()
            right[name] += int(logits.argmax()) == label
            loss += float(logits.logsumexp(0) - logits[label])
    total = sum(right.values())
    assert spec.classes == ("class0", "class1", "class2")
    assert scores["images"] == 15
    assert scores["top1"] == total / 15
    assert scores["top5"] == 1.0
    assert scores["loss"] == pytest.approx(loss / 15, abs=1e-5)
    assert scores["top1_interval_95"] == list(wilson(total, 15))
    assert scores["per_class"] == {name: {"images": 5, "top1": right[name] / 5} for name in spec.classes}


def test_summary_states_cost_versions_and_command(trained: Path, data: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    opened, spec = load(trained / "model.safetensors")
    for entry, model in (
        (summary["cost"], opened),
        (summary["base_cost"], timm.create_model(TINY_MODEL, num_classes=3)),
    ):
        counted = cost(model, (3, 32, 32))
        assert [entry[key] for key in ("params", "macs", "activations")] == [
            counted.params,
            counted.macs,
            counted.activations,
        ]
        assert entry["input_size"] == [3, 32, 32]
    assert summary["cost"]["params"] > summary["base_cost"]["params"]
    assert summary["spec"] == json.loads(spec.to_json())
    assert summary["spec"]["edits"] == ["insert blocks.2 g=8"]
    assert summary["images"] == {"train": 36, "val": 15}
    assert summary["unreadable"] == {"train": [], "val": []}
    assert summary["config"] == yaml.safe_load((trained / "config.yaml").read_text())
    versions = summary["versions"]
    assert versions["ulsam"] == __version__
    assert versions["torch"] == torch.__version__
    assert versions["timm"] == timm.__version__
    assert (versions["threads"], versions["processes"], versions["device"]) == ("1", "1", "cpu")
    assert summary["command"]


def test_config_repeats_the_run_bit_for_bit(trained: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert main(["train", "--config", str(trained / "config.yaml"), "--out", str(again)]) == 0
    assert (again / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    assert (again / "config.yaml").read_bytes() == (trained / "config.yaml").read_bytes()


def test_options_come_before_the_config(trained: Path, tmp_path: Path) -> None:
    words = ["--epochs", "1", "--seed", "3", "--insert", "blocks.1"]
    assert main(["train", "--config", str(trained / "config.yaml"), "--out", str(tmp_path / "run"), *words]) == 0
    settings = json.loads((tmp_path / "run" / "summary.json").read_text())["config"]
    assert (settings["epochs"], settings["seed"], settings["lr"]) == (1, 3, 0.01)
    assert settings["edits"] == ["insert blocks.1 g=4"]
    assert not same(weights(tmp_path / "run"), weights(trained))


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


# bad images


def bomb() -> bytes:
    """A PNG of 60000 x 60000 pixels in a few bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


BROKEN = ["bomb.png", "corrupt.jpg", "truncated.jpg", "zero.png"]


@pytest.fixture(scope="module")
def bad_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One image of every odd kind among ordinary ones; those of `BROKEN` cannot be read, one of val neither."""
    root = draw_splits(tmp_path_factory.mktemp("bad"), train=12, val=5)
    folder = root / "train" / "class1"
    image = Image.effect_noise((48, 48), 60)
    rgb = image.convert("RGB")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    Image.new("I;16", (40, 40), 30000).save(folder / "sixteen.png")
    rgb.quantize(16).save(folder / "palette.gif")
    rgb.save(folder / "animated.gif", save_all=True, append_images=[rgb.rotate(90)])
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.save(folder / "rotated.jpg", exif=exif)
    rgb.save(folder / "misnamed.jpg", format="PNG")
    rgb.save(folder / "truncated.jpg", quality=95)
    whole = (folder / "truncated.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "corrupt.jpg").write_bytes(b"\xff\xd8\xff" + b"nonsense" * 20)
    (folder / "zero.png").touch()
    (folder / "bomb.png").write_bytes(bomb())
    (root / "val" / "class0" / "000.png").write_bytes(b"nonsense")
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_training_continues_past_bad_images(
    workers: int, bad_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = options({**SETTINGS, "workers": workers, "batch_size": 2, "epochs": 2})
    assert main(["train", str(bad_data), "--out", str(tmp_path / "run"), *words]) == 0
    out, err = capfd.readouterr()
    unreadable = [line for line in err.splitlines() if line.startswith("unreadable ")]
    names = sorted(Path(line.removeprefix("unreadable ").partition(": ")[0]).name for line in unreadable)
    assert names == sorted([*BROKEN, "000.png"])  # each once, though there were two epochs
    assert "note    5 images could not be read; they are named above and in summary.json" in out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [Path(name).name for name in summary["unreadable"]["train"]] == BROKEN
    assert [Path(name).name for name in summary["unreadable"]["val"]] == ["000.png"]
    assert summary["scores"]["images"] == 14
    assert summary["scores"]["unreadable"] == 1
    assert summary["scores"]["per_class"]["class0"]["images"] == 4


def test_too_many_bad_images_stop_the_run(bad_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UlsamError, match=r"more than 3 images cannot be read \(named above\): see `max_unreadable`"):
        train(config(bad_data, max_unreadable=0.05, batch_size=2), tmp_path / "run")


def test_nothing_but_bad_images(tmp_path: Path) -> None:
    draw(tmp_path / "data", 5)
    for path in (tmp_path / "data").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UlsamError, match=r"12 training images in a row cannot be read"):
        train(config(tmp_path / "data", max_unreadable=1.0), tmp_path / "run")


def test_a_resumed_run_remembers_bad_images(bad_data: Path, tmp_path: Path) -> None:
    with stop_after(22), pytest.raises(Interrupted):  # 23 updates an epoch
        train(config(bad_data, batch_size=2), tmp_path / "run")
    summary = resume(tmp_path / "run")
    assert [Path(name).name for name in summary["unreadable"]["train"]] == BROKEN


# numbers that are not finite


def test_a_loss_that_is_not_finite_stops_the_run(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = {"lr": 1e30, "warmup_epochs": 0, "save_seconds": 0, "epochs": 2}
    with pytest.raises(
        UlsamError, match=r"^diverged: the loss is (nan|inf) in epoch 1, step \d, at learning rate \d\S*e\+29: "
    ):
        train(config(data, **settings), run)
    state = read_checkpoint(run)
    assert state is not None
    assert 1 <= state["position"]["batch"] < 4
    assert sorted(os.listdir(run)) == [".lock", "checkpoint.pt", "config.yaml"]


def test_outputs_that_are_not_finite_stop_the_run(data: Path, tmp_path: Path) -> None:
    settings = {"lr": 1e38, "warmup_epochs": 0, "batch_size": 36}  # one update, then the model is measured
    with pytest.raises(UlsamError, match=r"^diverged: .* in epoch 1, step 1, at learning rate \S*e\+37: try a lower"):
        train(config(data, **settings), tmp_path / "run")


# the folder of a run, and resuming it


@pytest.fixture(scope="module")
def stopped(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 epochs with 4 updates each, stopped after the sixth."""
    run = tmp_path_factory.mktemp("runs") / "stopped"
    with (
        stop_after(5),
        pytest.raises(Interrupted, match=r"stopped in epoch 2, step 2; resume with: ulsam.resume"),
    ):
        train(config(data, epochs=2, ema=0.5), run)
    return run


@pytest.fixture
def copied(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "copied"))


def edit_checkpoint(run: Path, **entries: Any) -> None:
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    torch.save({**state, **entries}, run / "checkpoint.pt")


def test_a_stopped_run_ends_as_an_unbroken_one(
    data: Path, copied: Path, tmp_path: Path, logged: Callable[[], str]
) -> None:
    train(config(data, epochs=2, ema=0.5), tmp_path / "unbroken")
    (copied / ".checkpoint.pt.123.part").write_bytes(b"left by a killed process")
    logged()
    moved = Path(shutil.copytree(data, tmp_path / "moved"))
    summary = resume(copied, {"data": str(moved), "workers": 1, "epochs": 2})
    out = logged()
    assert "resume  in epoch 2, after 2 of its batches" in out
    assert "warning" not in out
    assert sorted(os.listdir(copied)) == FILES
    assert (copied / "model.safetensors").read_bytes() == (tmp_path / "unbroken" / "model.safetensors").read_bytes()
    assert summary["config"]["data"] == str(moved)
    unbroken = json.loads((tmp_path / "unbroken" / "summary.json").read_text())
    assert summary["scores"] == unbroken["scores"]
    timing = ("seconds", "images_per_second")
    for row, other in zip(summary["epochs"], unbroken["epochs"], strict=True):
        assert {key: row[key] for key in row if key not in timing} == {k: other[k] for k in other if k not in timing}


COMPILED = pytest.param(
    {"compile": "inductor", "drop_rate": 0.3},
    marks=[pytest.mark.slow, pytest.mark.skipif(why_not_compiled() is not None, reason="no C++ compiler")],
)


@pytest.mark.parametrize("settings", [{"amp": "bf16"}, {"layout": "contiguous"}, COMPILED], ids=str)
def test_so_it_does_in_any_precision_layout_and_form(settings: dict[str, Any], data: Path, tmp_path: Path) -> None:
    chosen = config(data, epochs=2, ema=0.5, edits=["insert blocks.2 g=4"], **settings)
    train(chosen, tmp_path / "unbroken")
    with stop_after(5), pytest.raises(Interrupted, match="stopped in epoch 2, step 2"):
        train(chosen, tmp_path / "run")
    resume(tmp_path / "run")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "unbroken"))


@pytest.mark.slow
def test_a_run_without_a_checkpoint_starts_again(data: Path, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(trained / "config.yaml", tmp_path / "run")
    resume(tmp_path / "run")
    assert same(weights(tmp_path / "run"), weights(trained))


def test_a_run_killed_at_its_very_end_is_finished(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "checkpoint.pt", "metrics.csv"):
        shutil.copy(trained / name, run)
    resume(run)
    assert sorted(os.listdir(run)) == FILES
    assert (run / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    assert (run / "metrics.csv").read_bytes() == (trained / "metrics.csv").read_bytes()


def test_a_changed_environment_is_a_warning(copied: Path, logged: Callable[[], str]) -> None:
    state = read_checkpoint(copied)
    assert state is not None
    edit_checkpoint(copied, environment={**state["environment"], "torch": "1.0", "threads": "7", "device": "cuda"})
    resume(copied)
    warnings = [line for line in logged().splitlines() if line.startswith("warning ")]
    assert [
        line.removesuffix("; the weights will not be bit for bit those of an unbroken run") for line in warnings
    ] == [
        f"warning torch: 1.0 before, {torch.__version__} now",
        "warning threads: 7 before, 1 now",
        "warning device: cuda before, cpu now",
    ]


@pytest.mark.slow
def test_a_stream_resumes_from_the_start_of_an_epoch(data: Path, tmp_path: Path, logged: Callable[[], str]) -> None:
    pytest.importorskip("webdataset")
    (tmp_path / "shards").mkdir()
    root = draw_shards(tmp_path / "shards", data / "train")
    stream = {"data_dir": str(root), "class_names": str(root / "names.txt"), "workers": 1}
    settings = config(Path("wds/birds"), **stream, epochs=2, save_seconds=0, random_erasing=0.5)
    train(settings, tmp_path / "unbroken")
    assert "note    a stream of shards: epochs are whole batches" in logged()
    with stop_after(8), pytest.raises(Interrupted, match=r"stopped in epoch 2, step 3; resume with"):
        train(settings, tmp_path / "run")
    summary = resume(tmp_path / "run")
    assert "resume  in epoch 2, after 0 of its batches" in logged()
    assert same(weights(tmp_path / "run"), weights(tmp_path / "unbroken"))
    assert summary["images"] == {"train": 44, "val": 14}
    assert summary["scores"]["images"] == 14
    (root / "names.txt").write_text("robin\nwren\n")
    with pytest.raises(UlsamError, match="class number 2, but the 2 classes are numbered from 0: check `class_names`"):
        train(settings, tmp_path / "short")


@pytest.mark.filterwarnings("error:This DataLoader will create")
def test_a_stream_with_fewer_shards_than_workers(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    root = draw_shards(tmp_path, data / "train")
    stream = {"data_dir": str(root), "class_names": str(root / "names.txt"), "workers": 6}
    with pytest.raises(UlsamError, match="has ended before its epoch: use no more `workers` than shards"):
        train(config(Path("wds/birds"), **stream, batch_size=4), tmp_path / "run")


def test_an_image_less_is_a_warning(copied: Path, data: Path, tmp_path: Path, logged: Callable[[], str]) -> None:
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "train" / "class0" / "000.png").unlink()
    resume(copied, {"data": str(tmp_path / "data")})
    log = logged()
    assert re.search(r"warning training images: 36 \(names \w{8}\) before, 35 \(names \w{8}\) now", log)


def test_another_image_is_a_warning(copied: Path, data: Path, tmp_path: Path, logged: Callable[[], str]) -> None:
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "train" / "class0" / "000.png").rename(tmp_path / "data" / "train" / "class0" / "0000.png")
    resume(copied, {"data": str(tmp_path / "data")})
    assert re.search(r"warning training images: 36 \(names \w{8}\) before, 36 ", logged())


@pytest.mark.parametrize("change", ["size", "time"])
def test_an_image_that_was_exchanged_is_a_warning(
    change: str, copied: Path, data: Path, tmp_path: Path, logged: Callable[[], str]
) -> None:
    shutil.copytree(data, tmp_path / "data")
    resume(shutil.copytree(copied, tmp_path / "same"), {"data": str(tmp_path / "data")})
    assert "warning" not in logged()
    one = tmp_path / "data" / "train" / "class0" / "000.png"
    time = one.stat().st_mtime
    if change == "size":
        one.write_bytes(one.read_bytes() + b"x")
    os.utime(one, (time, time + 60 * (change == "time")))
    resume(copied, {"data": str(tmp_path / "data")})
    digests = r"sizes (\w{8}), times (\w{8})"
    found = re.search(f"warning image files: {digests} before, {digests} now; the weights", logged())
    assert found and (found[1] != found[3], found[2] != found[4]) == (change == "size", change == "time")


@pytest.mark.parametrize("change", [{"lr": 0.1}, {"edits": ["insert blocks.2"]}, {"epochs": 3}, {"opt": "adamw"}])
def test_edited_settings_are_refused(change: dict[str, Any], copied: Path) -> None:
    settings = yaml.safe_load((copied / "config.yaml").read_text())
    (copied / "config.yaml").write_text(yaml.safe_dump({**settings, **change}))
    ((name, now),) = change.items()
    with pytest.raises(
        UlsamError, match=re.escape(f"config.yaml was changed: {name} was {settings[name]} and is {now}")
    ):
        resume(copied)


def test_an_error_in_measuring_loses_no_training(bad_data: Path, tmp_path: Path) -> None:
    shutil.copytree(bad_data, tmp_path / "data")
    for path in (tmp_path / "data" / "val" / "class2").iterdir():
        path.write_bytes(b"")
    settings = config(tmp_path / "data", batch_size=2, epochs=2)
    with pytest.raises(UlsamError, match="more than 3 images cannot be read"):
        train(settings, tmp_path / "run")
    state = read_checkpoint(tmp_path / "run")
    assert state is not None
    assert (state["position"]["epoch"], state["position"]["batch"]) == (0, 23)
    summary = resume(tmp_path / "run", {"max_unreadable": 1.0})
    train(dataclasses.replace(settings, max_unreadable=1.0), tmp_path / "unbroken")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "unbroken"))
    assert summary["scores"] == json.loads((tmp_path / "unbroken" / "summary.json").read_text())["scores"]


# of the 4 batches of epoch 2 and the 4 of epoch 3
@pytest.mark.slow
@pytest.mark.parametrize("moment", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_stopped_in_measuring_it_measures_when_it_resumes(moment: int, data: Path, tmp_path: Path) -> None:
    settings = config(data, epochs=3, batch_size=4, ema=0.5, val_every=2)
    train(settings, tmp_path / "unbroken")
    measured = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal measured
        if isinstance(module, nn.Linear) and not module.training and len(inputs[0]) > 1:  # a batch of validation
            measured += 1
            if measured == moment:
                signal.raise_signal(signal.SIGINT)

    handle = register_module_forward_pre_hook(count)
    try:
        where = r"stopped in the measurement of epoch [23]; resume with: ulsam.resume"
        with pytest.raises(Interrupted, match=where):
            train(settings, tmp_path / "run")
    finally:
        handle.remove()
    assert measured == moment  # at once, not after the other batches
    summary = resume(tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (
        tmp_path / "unbroken" / "model.safetensors"
    ).read_bytes()
    unbroken = json.loads((tmp_path / "unbroken" / "summary.json").read_text())
    assert summary["scores"] == unbroken["scores"]
    assert [row["val_loss"] for row in summary["epochs"]] == [row["val_loss"] for row in unbroken["epochs"]]


def refuse(message: str, run: Path, **overrides: Any) -> None:
    """The run is not resumed, for a reason given in one line, and nothing of it changes."""
    before = {path: path.read_bytes() for path in run.glob("*.*")}
    with pytest.raises(UlsamError, match=message) as caught:
        resume(run, overrides)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in run.glob("*.*")} == before


def test_what_cannot_be_resumed(copied: Path, trained: Path, data: Path, tmp_path: Path) -> None:
    refuse(r"nowhere is not the folder of a run: there is no config.yaml", tmp_path / "nowhere")
    refuse(r"val is not the folder of a run", data / "val")
    refuse(r"trained is finished: its result is in .*summary.json", trained)
    refuse(r"a resumed run keeps its own settings: lr was 0.05 and cannot be changed", copied, lr=0.1)
    refuse(
        r"a resumed run keeps its own settings: edits was \[\] and cannot be changed", copied, edits=["insert blocks.2"]
    )
    refuse(r"no such folder: nowhere", copied, data="nowhere")
    other = draw_splits(tmp_path / "other")
    for split in ("train", "val"):
        (other / split / "class1").rename(other / split / "wren")
    refuse(r"the data has other classes than this run", copied, data=str(other))
    state = read_checkpoint(copied)
    assert state is not None
    edit_checkpoint(copied, environment={**state["environment"], "processes": "4"})
    refuse(r"this run has 4 process\(es\), not 1", copied)
    edit_checkpoint(copied, environment=state["environment"], model={})
    refuse(r"the checkpoint in .* is not of this run: .*Missing key", copied)
    edit_checkpoint(copied, model=state["model"], position={"step": 1})
    refuse(r"the checkpoint in .* is not of this run", copied)
    edit_checkpoint(copied, position=state["position"], optimizer={"state": state["optimizer"]["state"]})
    refuse(r"the checkpoint in .* is not of this run: ", copied)
    edit_checkpoint(copied, version=0)
    refuse(r"no checkpoint of this version of ulsam", copied)


@pytest.mark.slow
def test_no_foreign_entry_of_a_checkpoint_is_taken(copied: Path) -> None:
    state = read_checkpoint(copied)
    assert state is not None
    rows = state["position"]["rows"]
    for wrong in (
        *({"epoch": value} for value in ("x", -3, 3, 1.0, True, None)),
        *({"batch": value} for value in (10**6, -1, "2")),
        *({"updates": -1}, {"loss_sum": math.nan}, {"loss_sum": "x"}, {"seconds": None}, {"images": 0}),
        *({"rows": value} for value in ([], rows * 2, [{}], ["row"], [{**rows[0], "lr": "x"}], None)),
    ):
        edit_checkpoint(copied, position={**state["position"], **wrong})
        refuse(r"the checkpoint in .* is not of this run: ", copied)
    saved = state["optimizer"]
    groups = saved["param_groups"]
    foreign = timm.optim.create_optimizer_v2(timm.create_model(TINY_MODEL, num_classes=3), opt="adamw").state_dict()
    for wrong in (
        foreign,
        {**saved, "param_groups": groups[:1]},
        {**saved, "param_groups": [{**group, "momentum": "x"} for group in groups]},
        {**saved, "param_groups": [{k: v for k, v in group.items() if k != "momentum"} for group in groups]},
        {**saved, "state": {**saved["state"], 0: {"momentum_buffer": torch.zeros(7)}}},
        {**saved, "state": {**saved["state"], 0: {"exp_avg": saved["state"][0]["momentum_buffer"]}}},
        {**saved, "state": {**saved["state"], 0: {"momentum_buffer": 3}}},
    ):
        edit_checkpoint(copied, position=state["position"], optimizer=wrong)
        refuse(r"the checkpoint in .* is not of this run: ", copied)
    for entries in ({"unreadable": {"train": 3, "val": {}}}, {"settings": {}}, {"settings": None}, {"ema": None}):
        edit_checkpoint(copied, **{**state, **entries})
        refuse(r"the checkpoint in .* is not of this run: ", copied)


class Hostile:
    """Unpickled with trust, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_hostile_or_damaged_checkpoint_is_refused(copied: Path, tmp_path: Path) -> None:
    checkpoint = copied / "checkpoint.pt"
    whole = checkpoint.read_bytes()
    edit_checkpoint(copied, ema=Hostile(tmp_path / "proof"))
    hostile = checkpoint.read_bytes()
    torch.save({"version": Hostile(tmp_path / "proof")}, checkpoint, _use_new_zipfile_serialization=False)
    old_hostile = checkpoint.read_bytes()
    damaged = [whole[: len(whole) * part // 7] for part in range(7)]
    flipped = bytearray(whole)
    flipped[len(flipped) // 2] ^= 0xFF
    for content in [hostile, old_hostile, *damaged, b"nonsense" * 99, b"\x80\x02}q\x00."]:
        checkpoint.write_bytes(content)
        with pytest.raises(UlsamError, match=r"checkpoint\.pt is no checkpoint") as caught:
            resume(copied)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400
    assert not (tmp_path / "proof").exists()
    torch.load(io.BytesIO(hostile), weights_only=False)
    assert (tmp_path / "proof").exists()  # it would have worked


def test_the_folder_of_a_new_run(data: Path, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UlsamError, match=r"trained is not an empty folder: resume it with `ulsam.resume`, name one"):
        train(config(data), trained)
    with pytest.raises(UlsamError, match=r"data\d* is not an empty folder: name one"):
        train(config(data), data)
    (tmp_path / "file").touch()
    with pytest.raises(UlsamError, match=r"file is not an empty folder: name one"):
        train(config(data), tmp_path / "file")
    with pytest.raises(UlsamError, match=r"cannot make the folder .*file/run: Not a directory"):
        train(config(data), tmp_path / "file" / "run")
    (tmp_path / "empty").mkdir()
    train(config(data), tmp_path / "empty")
    assert sorted(os.listdir(tmp_path / "empty")) == FILES


def test_settings_survive_yaml(data: Path, tmp_path: Path) -> None:
    full = config(data, edits=["insert blocks.2"], mean=[0, 0.5, 1], model_args={"a": [1, {"b": None}]}, lr="1e-4")
    (tmp_path / "run.yaml").write_text(full.to_yaml())
    assert TrainConfig.from_mapping(yaml.safe_load(full.to_yaml())) == full
    assert dataclasses.asdict(full)["lr"] == 1e-4
