"""Losses and measures that other libraries have too give the same numbers."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from timm.task import LogitDistillationTask
from torch import Tensor, nn
from torchcam.metrics import ClassificationMetric, DeletionInsertionMetric
from torchvision.transforms.v2.functional import gaussian_blur

from ulsam.explanation.perturb import (
    BLUR,
    area_under,
    average_drop,
    deletion_curves,
    insertion_curves,
    kept_confidence,
)
from ulsam.training.distill import soft_target_loss

SIZE = 16
SOFTMAX = partial(torch.softmax, dim=-1)


def model_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model("mobilenetv2_035", num_classes=5).eval()
    nn.init.normal_(model.get_classifier().weight)  # as it begins, all logits are nearly 0
    return model


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return model_of(0)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_distillation_loss_is_timms(model: nn.Module, temperature: float) -> None:
    teacher = model_of(1)
    task = LogitDistillationTask(model, teacher, nn.CrossEntropyLoss(), temperature=temperature, verbose=False).eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        theirs = task(images, torch.tensor([0, 1, 2]))["kd_loss"]
        ours = soft_target_loss(model(images), teacher(images), temperature)
    assert ours > 0.01
    torch.testing.assert_close(ours, theirs)


def extractor_of(model: nn.Module, maps: Tensor) -> Any:
    """What TorchCAM's metrics ask for its maps, with maps that are known."""

    class Known(SimpleNamespace):
        def __call__(self, class_idx: list[int], scores: Tensor) -> list[Tensor]:
            return [maps]

    return Known(model=model, _hooks_off=nullcontext, fuse_cams=lambda cams: cams[0])


@pytest.fixture(scope="module")
def given() -> tuple[Tensor, Tensor, Tensor]:
    """Images, maps and classes."""
    torch.manual_seed(2)
    return torch.randn(4, 3, SIZE, SIZE), torch.rand(4, SIZE, SIZE), torch.tensor([3, 1, 0, 4])


def test_deletion_and_insertion_are_torchcams(model: nn.Module, given: tuple[Tensor, Tensor, Tensor]) -> None:
    images, maps, classes = given

    def probabilities(x: Tensor) -> Tensor:
        return model(x).softmax(1)

    for baseline, name, curves in [
        (None, "deletion_auc", deletion_curves),
        (partial(gaussian_blur, kernel_size=BLUR[0], sigma=BLUR[1]), "insertion_auc", insertion_curves),
    ]:
        theirs = DeletionInsertionMetric(extractor_of(model, maps), SOFTMAX, steps=8, baseline=baseline)
        theirs.update(images, classes.tolist())
        ours = curves(probabilities, images, maps, classes, steps=8)
        assert ours.std() > 0.01
        assert area_under(ours).mean() == pytest.approx(theirs.summary()[name], rel=1e-5)


def test_average_drop_and_increase_in_confidence_are_torchcams(
    model: nn.Module, given: tuple[Tensor, Tensor, Tensor]
) -> None:
    images, maps, classes = given

    def probabilities(x: Tensor) -> Tensor:
        return model(x).softmax(1)

    theirs = ClassificationMetric(extractor_of(model, maps), SOFTMAX)
    theirs.update(images, classes.tolist())
    with torch.no_grad():
        before = probabilities(images).gather(1, classes[:, None])[:, 0].numpy()
    after = kept_confidence(probabilities, images, maps, classes).numpy()
    summary = theirs.summary()
    assert average_drop(before, after).mean() == pytest.approx(summary["avg_drop"], rel=1e-4)
    assert (after > before).mean() == summary["conf_increase"]
