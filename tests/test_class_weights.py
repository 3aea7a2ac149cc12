"""Weights of the classes in the training loss: PyTorch's own, on labels and on soft targets, and in training alone."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.data import Mixup

from tiny import SETTINGS, draw, draw_shards, options
from ulsam.base.distributed import World
from ulsam.base.errors import UlsamError
from ulsam.cli import main
from ulsam.data import loading
from ulsam.data.sources import FolderImages
from ulsam.training.class_weights import class_weights_of, weighted_cross_entropy
from ulsam.training.config import TrainConfig
from ulsam.training.distill import soft_target_loss
from ulsam.training.evaluate import spec_transform
from ulsam.training.loop import Trainer
from ulsam.training.step import TrainingStep
from ulsam.training.train import train

ALONE = World(0, 1, torch.device("cpu"))
WEIGHTS = {"class0": 0.25, "class2": 3.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4, 12 and 12 training images of the classes; 9 validation images."""
    root = tmp_path_factory.mktemp("data")
    draw(root / "train", 12)
    draw(root / "val", 3, seed=1)
    for index in range(4, 12):
        (root / "train" / "class0" / f"{index:03}.png").unlink()
    return root


def config(data: Path | str, **settings: Any) -> TrainConfig:
    chosen = {"amp": "none", "layout": "contiguous", "epochs": 1, "batch_size": 28}
    return TrainConfig.from_mapping({**SETTINGS, "data": str(data), **chosen, **settings})


@pytest.mark.parametrize("labels", [torch.tensor([0, 1, 2, 2]), torch.tensor([[0.5, 0.5, 0], [0, 0.1, 0.9]] * 2)])
def test_each_image_of_a_step_counts_as_its_class_weighs(labels: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    images = torch.randn(4, 3, 2, 2)
    weights = {"a": 0.25, "b": 1.0, "c": 3.0}
    step = TrainingStep(config("birds", compile="none"), copy.deepcopy(model), 1, ALONE, class_weights=weights)
    loss = step.add_gradients(images, labels, smoothing=0.1)
    weight = torch.tensor([0.25, 1.0, 3.0])
    expected = F.cross_entropy(model(images), labels, weight, reduction="sum", label_smoothing=0.1) / 4
    assert loss == pytest.approx(expected.item(), abs=1e-6)
    expected.backward()
    for mine, its in zip(step.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad)
    if labels.ndim == 1:  # by hand: each image counts as much as its class
        logs = model(images).log_softmax(1)
        share = torch.tensor([0.25, 1.0, 3.0, 3.0])
        each = torch.stack([-logs[image, label] for image, label in enumerate(labels)])
        plain = weighted_cross_entropy(model(images), labels, weight, 0.0)
        assert plain.item() == pytest.approx(float((each * share).mean()), abs=1e-6)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_smaller_batches_whose_gradients_are_added_give_the_same(size: int) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    images, labels, weights = torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 2]), {"a": 0.25, "b": 1.0, "c": 3.0}
    grads = []
    for part in (4, size):
        settings = config("birds", compile="none", accumulate=4 // part)
        step = TrainingStep(settings, copy.deepcopy(model), 1, ALONE, class_weights=weights)
        for mine, its in zip(images.split(part), labels.split(part), strict=True):
            step.add_gradients(mine, its, smoothing=0.1)
        grads.append([parameter.grad for parameter in step.model.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("mixup", [0.0, 0.4])
def test_a_run_trains_with_the_weights_and_measures_without(mixup: float, data: Path, tmp_path: Path) -> None:
    chosen = config(data, class_weights=WEIGHTS, smoothing=0.2, mixup=mixup)
    (tmp_path / "run").mkdir()
    trainer = Trainer(chosen, tmp_path / "run", ALONE)
    trainer.prepare()
    model = copy.deepcopy(trainer.model).train()
    batch = next(iter(trainer.loader))
    images, targets = batch.images, batch.labels
    if mixup:
        loading.seed_all(0, 2, 0, 0, 0)
        images, targets = Mixup(mixup, label_smoothing=0.2, num_classes=3)(images, targets)
    weight = torch.tensor([0.25, 1.0, 3.0])
    smoothing = 0.0 if mixup else 0.2
    expected = F.cross_entropy(model(images), targets, weight, reduction="sum", label_smoothing=smoothing) / 28
    summary = trainer.fit()
    assert summary["epochs"][0]["train_loss"] == pytest.approx(expected.item(), abs=1e-4)
    assert summary["class_weights"] == {"class0": 0.25, "class1": 1.0, "class2": 3.0}
    batches = loading.eval_loader(trainer.val_images, spec_transform(trainer.spec), batch_size=9, workers=0)
    with torch.no_grad():
        measured = next(iter(batches))
        plain = F.cross_entropy(trainer.model.eval()(measured.images), measured.labels)
    assert summary["scores"]["loss"] == pytest.approx(plain.item(), abs=1e-4)


def test_the_cross_entropy_of_a_distilled_run_has_the_weights(data: Path, tmp_path: Path) -> None:
    train(config(data), tmp_path / "base")
    teacher = str(tmp_path / "base" / "model.safetensors")
    chosen = config(data, class_weights=WEIGHTS, teacher=teacher, distill=0.25, smoothing=0.0)
    (tmp_path / "run").mkdir()
    trainer = Trainer(chosen, tmp_path / "run", ALONE)
    trainer.prepare()
    assert trainer.teacher is not None
    model, batch = copy.deepcopy(trainer.model).train(), next(iter(trainer.loader))
    logits, its = model(batch.images), trainer.teacher.model(batch.images)
    hard = F.cross_entropy(logits, batch.labels, torch.tensor([0.25, 1.0, 3.0]), reduction="sum") / 28
    expected = 0.75 * hard + 0.25 * soft_target_loss(logits, its, 4.0)
    assert trainer.fit()["epochs"][0]["train_loss"] == pytest.approx(expected.item(), abs=1e-4)


def test_balanced_weights_from_the_command_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", str(data), "--out", str(tmp_path / "run"), "--class-weights", "balanced"]
    assert main([*words, *options({**SETTINGS, "epochs": 1})]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["config"]["class_weights"] == "balanced"
    assert summary["class_weights"] == pytest.approx({"class0": 28 / 12, "class1": 28 / 36, "class2": 28 / 36})
    said = "weights of the classes in the training loss: 0.778 (class1) to 2.33 (class0)"
    assert said in capsys.readouterr().out
    words = ["train", str(data), "--out", str(tmp_path / "named"), "--class-weights", json.dumps(WEIGHTS)]
    assert main([*words, *options({**SETTINGS, "epochs": 1})]) == 0
    assert json.loads((tmp_path / "named" / "summary.json").read_text())["config"]["class_weights"] == WEIGHTS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class_weights": "even"}, r"^`class_weights` is balanced, or weights by class name, not 'even'$"),
        ({"class_weights": {}}, r"^`class_weights` takes numbers above 0 by class name, not {}$"),
        ({"class_weights": {"a": 0}}, r"^`class_weights` takes numbers above 0 by class name, not {'a': 0.0}$"),
        ({"class_weights": {"a": float("nan")}}, r"^`class_weights` takes numbers above 0 by class name"),
        ({"class_weights": {"a": "x"}}, r"^`class_weights` must be a number, not 'x'$"),
        ({"class_weights": {3: 1}}, r"^`class_weights` must be text, not 3$"),
        ({"class_weights": [1, 2]}, r"^`class_weights` must be a JSON object, not \[1, 2\]$"),
        ({"class_weights": "balanced", "sampler": "balanced"}, r"^`sampler` and `class_weights` are both balanced"),
    ],
)
def test_what_are_no_weights(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UlsamError, match=message):
        config("birds", **settings)


def test_weights_that_are_not_for_the_data(data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UlsamError, match=r"^`class_weights` names 'clas0', which is no class of the data; did you mean"
    ):
        train(config(data, class_weights={"clas0": 2.0}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UlsamError, match=r"the class 'wren' has no training image: give weights by name$"):
        class_weights_of("balanced", FolderImages([("a.jpg", 0)], ("robin", "wren")))
    pytest.importorskip("webdataset")
    root = draw_shards(tmp_path, data / "train")
    stream = {"data_dir": str(root), "class_names": str(root / "names.txt"), "batch_size": 4}
    with pytest.raises(UlsamError, match="balanced needs a data set that lists its labels: give weights by class name"):
        train(config("wds/birds", class_weights="balanced", **stream), tmp_path / "run")
