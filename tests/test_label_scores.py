"""Scores of several labels an image against naive counting."""

from typing import Any

import numpy as np
import pytest
import torch

from tiny import SETTINGS
from ulsam.base.distributed import World
from ulsam.base.errors import UlsamError
from ulsam.model.spec import ModelSpec
from ulsam.training import parts
from ulsam.training.config import TrainConfig
from ulsam.training.label_scores import LabelScores, average_precision, best_thresholds
from ulsam.training.predict import sigmoid
from ulsam.training.step import TrainingStep

ALONE = World(0, 1, torch.device("cpu"))


def draws(seed: int, images: int = 50, classes: int = 4) -> tuple[Any, Any]:
    """Truths and probabilities with ties; the last class has no image."""
    random = np.random.default_rng(seed)
    truths = random.random((images, classes)) < 0.3
    truths[:, -1] = False
    shares = (random.integers(0, 12, (images, classes)) + 4 * truths).astype(np.float32) / 16
    return truths, shares


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_is_the_sum_over_thresholds(seed: int) -> None:
    truths, shares = draws(seed)
    for own, share in zip(truths.T, shares.T, strict=True):
        expected, before = 0.0, 0.0
        for cut in sorted(set(share.tolist()), reverse=True):
            named = share >= cut
            recall = (own & named).sum() / own.sum() if own.any() else 0.0
            expected += (recall - before) * (own & named).sum() / named.sum()
            before = recall
        assert average_precision(own, share) == (pytest.approx(expected) if own.any() else None)


def test_average_precision_is_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    truths, shares = draws(7)
    for own, share in zip(truths.T[:-1], shares.T, strict=False):
        assert average_precision(own, share) == pytest.approx(metrics.average_precision_score(own, share))


@pytest.mark.parametrize("seed", range(5))
def test_no_threshold_gives_a_better_f1(seed: int) -> None:
    truths, shares = draws(seed)

    def f1(own: Any, share: Any, cut: float) -> float:
        named = share >= cut
        return float(2 * (own & named).sum() / (own.sum() + named.sum()))

    found = best_thresholds(truths, shares)
    assert found[-1] == 0.5
    for own, share, cut in zip(truths.T[:-1], shares.T, found, strict=False):
        best = max(f1(own, share, other) for other in np.linspace(0, 1, 97))
        assert f1(own, share, cut) == pytest.approx(best)
        assert abs(share - cut).min() > 0.01  # rounding changes no label
    assert best_thresholds(np.array([[True]]), np.float32([[0.5]])) == (0.25,)


def test_scores_are_what_counting_gives() -> None:
    truths, shares = draws(3)
    cuts = (0.25, 0.5, 0.75, 0.5)
    found = LabelScores(("a", "b", "c", "d"), truths, shares, cuts, 0.0, ())
    pairs = {"right": 0, "named": 0, "images": 0}
    for number, (row, cut) in enumerate(zip(found.table().values(), cuts, strict=True)):
        right = sum(bool(t[number]) and s[number] >= cut for t, s in zip(truths, shares, strict=True))
        named = sum(s[number] >= cut for s in shares)
        images = sum(bool(t[number]) for t in truths)
        assert (row["images"], row["named"], row["threshold"]) == (images, named, cut)
        assert row["precision"] == (right / named if named else None)
        assert row["recall"] == (right / images if images else None)
        assert row["f1"] == (pytest.approx(2 * right / (named + images)) if images else None)
        pairs = {key: pairs[key] + more for key, more in (("right", right), ("named", named), ("images", images))}
    rows = list(found.table().values())[:3]
    assert found.map == pytest.approx(sum(row["average_precision"] for row in rows) / 3)
    assert found.f1 == pytest.approx(sum(row["f1"] for row in rows) / 3)
    assert found.micro()["f1"] == pytest.approx(2 * pairs["right"] / (pairs["named"] + pairs["images"]))
    nothing = LabelScores(("a",), np.zeros((2, 1), bool), np.float32([[0.1], [0.2]]), (0.5,), 0.0, ())
    assert (nothing.map, nothing.f1) == (None, None)


def test_the_loss_is_binary_cross_entropy_with_labels_moved_towards_a_half() -> None:
    config = TrainConfig("x", **{**SETTINGS, "layout": "contiguous", "amp": "none", "compile": "none"})
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    step = TrainingStep(config, model, 10, ALONE, several=True)
    images, labels = torch.randn(5, 3, 2, 2), torch.randint(0, 2, (5, 3)).float()
    logits = model(images).detach().double()
    wanted = labels.double() * 0.8 + 0.1
    expected = -(wanted * torch.sigmoid(logits).log() + (1 - wanted) * torch.sigmoid(-logits).log()).mean()
    assert step.add_gradients(images, labels, smoothing=0.2) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("settings", [{"mixup": 0.4}, {"cutmix": 1.0}])
def test_mixing_gives_each_label_the_share_of_its_image(settings: dict[str, float]) -> None:
    config = TrainConfig("x", batch_size=6, smoothing=0.1, **settings)
    mixing = parts.mixing_of(config, 6, several=True)
    assert mixing
    np.random.seed(0)
    images = torch.eye(6)[:, :, None, None].expand(6, 6, 8, 8).clone()  # a channel of its own for each image
    labels = torch.tensor([[1.0, 0], [0, 1], [1, 1], [0, 0], [1, 0], [0, 1]])
    mixed, wanted = mixing(images.clone(), labels)
    shares = mixed.mean((2, 3))  # [B, B]: of each image in each
    assert ((shares > 0.01) & (shares < 0.99)).any()
    torch.testing.assert_close(wanted, (shares @ labels) * 0.9 + 0.05)


def test_specs_of_several_labels() -> None:
    spec = ModelSpec("resnet18", ("a", "b"), thresholds=(0.25, 0.5))
    assert ModelSpec.from_json(spec.to_json()) == spec
    assert "thresholds" not in ModelSpec("resnet18", ("a", "b")).to_json()
    for wrong in ((0.5,), (0.5, 1.5), (0.5, float("nan"))):
        with pytest.raises(UlsamError, match="2 classes need as many thresholds, each from 0 to 1"):
            ModelSpec("resnet18", ("a", "b"), thresholds=wrong)
    for text in ("0.5", '["x", "y"]', "[0.5, 0.5, 0.5]"):
        with pytest.raises(UlsamError, match="not the spec of a model"):
            ModelSpec.from_json(spec.to_json().replace("[0.25, 0.5]", text))


def test_sigmoids_do_not_overflow() -> None:
    found = sigmoid(np.float32([[-1000, -50, 0, 50, 1000]]))
    assert found.tolist() == [[0.0, pytest.approx(1.9287e-22, rel=1e-3), 0.5, 1.0, 1.0]]
