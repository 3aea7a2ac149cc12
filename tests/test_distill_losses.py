"""The losses of distillation against naive ones, and the places of the maps that are compared."""

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.data import Mixup
from torch import Tensor, nn

from distilling import ALONE, EDITS, PLACES, SIZE, config, save_teacher, spec
from tiny import TINY_MODEL, draw_splits
from ulsam.base.errors import UlsamError
from ulsam.data import loading
from ulsam.model.build import build, load, save
from ulsam.surgery import edit as surgery
from ulsam.surgery.trace import trace
from ulsam.training.distill import FeatureCapture, feature_loss, open_teacher, shared_places, soft_target_loss
from ulsam.training.loop import Trainer
from ulsam.training.step import TrainingStep


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 training and 15 validation images of 3 colors."""
    return draw_splits(tmp_path_factory.mktemp("data"), noise=30)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "teacher.safetensors")


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
