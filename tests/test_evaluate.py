"""Scores against a naive loop, Wilson's interval against scipy, and predictions of image files."""

import copy
import dataclasses
import itertools
import math
import random
import shutil
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch import nn

from tiny import TINY_MODEL, draw, draw_splits
from ulsam.base.errors import NotFinite, UlsamError
from ulsam.base.eval_mode import eval_mode
from ulsam.data.images import read_image
from ulsam.data.loading import Batch, eval_loader
from ulsam.data.opening import open_split
from ulsam.deploy.predict import predict
from ulsam.model.build import build, make_spec
from ulsam.training.evaluate import Scores, Stopped, evaluate_batches, logits_of, outcomes, spec_transform, wilson

CLASSES = ("robin", "wren", "finch")
SPEC = make_spec(TINY_MODEL, CLASSES, size=32)


class Given(nn.Module):
    """A model that outputs what its images hold: [B, n, 1, 1] -> [B, n]."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


def given_batches(logits: torch.Tensor, labels: torch.Tensor, size: int = 4) -> list[Batch]:
    pairs = zip(logits[:, :, None, None].split(size), labels.split(size), strict=True)
    return [Batch(part, part_labels, []) for part, part_labels in pairs]


@given(st.integers(1, 9), st.integers(2, 8), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_scores_equal_a_naive_loop(n: int, classes: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=random) * 3
    labels = torch.randint(classes, (n,), generator=random)
    scores = evaluate_batches(Given(), given_batches(logits, labels), classes)

    right = among_five = 0
    loss = 0.0
    counts: Counter[int] = Counter()
    hits: Counter[int] = Counter()
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        ranking = sorted(range(classes), key=lambda index: -row[index])
        right += ranking[0] == label
        among_five += label in ranking[:5]
        loss -= row[label] - math.log(sum(math.exp(value) for value in row))
        counts[label] += 1
        hits[label] += ranking[0] == label
    assert scores.images == n
    assert scores.top1 == right / n
    assert scores.top5 == among_five / n
    assert math.isclose(scores.loss, loss / n, rel_tol=1e-9)
    assert scores.interval == wilson(right, n)
    names = [f"class{index}" for index in range(classes)]
    for index, (name, entry) in enumerate(scores.per_class(names).items()):
        assert name == names[index]
        assert entry["images"] == counts[index]
        assert entry["top1"] == (hits[index] / counts[index] if counts[index] else None)


@pytest.mark.parametrize(("right", "n"), [(0, 1), (1, 1), (0, 50), (50, 50), (80, 100), (1234, 5000)])
def test_wilson_equals_scipy(right: int, n: int) -> None:
    expected = binomtest(right, n).proportion_ci(method="wilson")
    assert wilson(right, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_measuring_is_given_up_at_once() -> None:
    answers = iter([False, False, True])
    with pytest.raises(Stopped):
        batches = given_batches(torch.zeros(40, 3), torch.zeros(40, dtype=torch.long))
        evaluate_batches(Given(), batches, 3, stop=lambda: next(answers))


def test_measuring_100_000_classes_takes_little_memory() -> None:
    logits = torch.zeros(2, 100_000)
    logits[:, 99_999] = 1
    scores = evaluate_batches(Given(), given_batches(logits, torch.tensor([99_999, 7])), 100_000)  # squared: 80 GB
    assert (scores.class_images[7], scores.class_images[99_999], sum(scores.class_images)) == (1, 1, 2)
    assert (scores.class_right[7], scores.class_right[99_999], sum(scores.class_right)) == (0, 1, 1)


def test_wilson_of_nothing_is_everything() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = draw_splits(tmp_path_factory.mktemp("images"), train=1, val=4)
    (root / "val" / "class1" / "002.png").write_bytes(b"")
    (root / "val" / "class2" / "000.png").write_bytes(b"no image")
    return root


def test_unreadable_images_are_left_out_and_named(folder: Path) -> None:
    model, _ = build(SPEC)
    images = open_split(str(folder), "val")
    scores = evaluate_batches(model, eval_loader(images, spec_transform(SPEC), batch_size=3, workers=0), 3)
    assert scores.images == 10
    assert [entry["images"] for entry in scores.per_class(CLASSES).values()] == [4, 3, 3]
    assert [Path(name).parts[-2:] for name, _ in scores.unreadable] == [("class1", "002.png"), ("class2", "000.png")]
    assert "empty file" in scores.unreadable[0][1]


def test_nothing_to_measure(tmp_path: Path) -> None:
    draw(tmp_path, 1)
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"")
    batches = eval_loader(open_split(str(tmp_path), "all"), spec_transform(SPEC), batch_size=2, workers=0)
    with pytest.raises(UlsamError, match="none of the 3 images could be read"):
        evaluate_batches(build(SPEC)[0], batches, 3)


def test_every_module_keeps_its_mode(folder: Path) -> None:
    model, _ = build(SPEC)
    frozen: Any = model.get_submodule("blocks.0")
    frozen.eval()
    before = [module.training for module in model.modules()]
    assert set(before) == {True, False}
    statistics = {name: value.clone() for name, value in model.named_buffers()}
    batches = eval_loader(open_split(str(folder), "val"), spec_transform(SPEC), batch_size=4, workers=0)
    evaluate_batches(model, batches, 3)
    list(predict(model, [folder / "val" / "class0" / "000.png"], spec=SPEC))
    with pytest.raises(UlsamError):
        evaluate_batches(model, batches, 7)
    assert [module.training for module in model.modules()] == before
    assert all(torch.equal(value, statistics[name]) for name, value in model.named_buffers())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_outputs_that_are_not_finite_are_refused(value: float, folder: Path) -> None:
    logits = torch.zeros(6, 3)
    logits[4, 1] = value
    with pytest.raises(NotFinite, match="not finite"):
        evaluate_batches(Given(), given_batches(logits, torch.ones(6, dtype=torch.long)), 3)
    model, _ = build(SPEC)
    with torch.no_grad():
        model.get_submodule("classifier").bias[1] = value  # type: ignore[index,operator]
    with pytest.raises(NotFinite, match="not finite"):
        list(predict(model, [folder / "val" / "class0" / "000.png"], spec=SPEC))


@pytest.mark.parametrize(("classes", "label", "message"), [(4, 0, "3 outputs, .* 4 classes"), (3, 3, "class number 3")])
def test_model_and_images_differ_in_classes(classes: int, label: int, message: str) -> None:
    batches = given_batches(torch.zeros(2, 3), torch.tensor([label, label]))
    with pytest.raises(UlsamError, match=message):
        evaluate_batches(Given(), batches, classes)


def test_predictions_are_in_order_and_add_up(folder: Path) -> None:
    model, _ = build(SPEC)
    good = sorted(path for path in (folder / "val").rglob("*.png") if path.stat().st_size > 20)
    bad = folder / "val" / "class1" / "002.png"
    paths = [good[0], bad, *good[1:], "missing.jpg", good[0]]
    found = list(predict(model, paths, spec=SPEC, top=9, batch_size=3))
    assert [one.path for one in found] == [str(path) for path in paths]
    assert [index for index, one in enumerate(found) if one.error] == [1, len(paths) - 2]
    assert found[1].error == f"{bad}: empty file (zero bytes)"
    assert found[1].classes == ()
    model.eval()
    for one in found:
        if one.error:
            continue
        shares = dict(one.classes)
        assert set(shares) == set(CLASSES)
        assert list(shares.values()) == sorted(shares.values(), reverse=True)
        assert sum(shares.values()) == pytest.approx(1, abs=1e-6)
        with torch.no_grad():
            outputs = model(spec_transform(SPEC)(read_image(one.path))[None]).softmax(1)[0]
        assert [shares[name] for name in CLASSES] == pytest.approx(outputs.tolist(), abs=1e-5)
    assert dict(found[0].classes) == pytest.approx(dict(found[-1].classes), abs=1e-5)
    two = predict(model, paths, spec=SPEC, top=2, batch_size=3)
    assert [one.classes for one in two] == [one.classes[:2] for one in found]
    assert list(predict(model, [], spec=SPEC)) == []


def test_outcomes_list_each_image_whatever_the_processes(tmp_path: Path) -> None:
    draw(tmp_path, 7, classes=3)
    unreadable = sorted((tmp_path / "class1").iterdir())[2]
    unreadable.write_bytes(b"no image")
    for number in (1, 4, 6):  # images in the wrong folder
        shutil.copy(tmp_path / "class0" / "000.png", tmp_path / "class2" / f"{number:03}.png")
    images = open_split(str(tmp_path), "all")
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())  # the class is the strongest color

    def share(rank: int, world: int) -> Scores:
        batches = eval_loader(images, spec_transform(SPEC), batch_size=4, workers=0, rank=rank, world=world)
        return evaluate_batches(model, batches, 3)

    whole = share(0, 1)
    entry = outcomes(whole, images)
    assert entry is not None and entry["images"] == 20
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(entry["right"]), np.uint8))[:20]
    naive = []
    for path, label in images.samples:  # type: ignore[union-attr]
        if path != str(unreadable):
            image = spec_transform(SPEC)(read_image(path))
            naive.append(int(model(image[None]).argmax()) == label)
    assert bits.tolist() == naive
    assert sum(naive) == 17

    parts = [share(rank, 3) for rank in range(3)]
    bad = tuple(pair for part in parts for pair in part.unreadable)
    gathered = dataclasses.replace(whole, hits=tuple(part.hits[0] for part in parts), unreadable=bad)
    assert outcomes(gathered, images) == entry

    unreadable.unlink()
    fewer = open_split(str(tmp_path), "all")
    batches = eval_loader(fewer, spec_transform(SPEC), batch_size=4, workers=0)
    assert outcomes(evaluate_batches(model, batches, 3), fewer) == entry  # the same images were measured
    (tmp_path / "class0" / "000.png").rename(tmp_path / "class0" / "00x.png")
    other = open_split(str(tmp_path), "all")
    batches = eval_loader(other, spec_transform(SPEC), batch_size=4, workers=0)
    renamed = outcomes(evaluate_batches(model, batches, 3), other)
    assert renamed is not None and renamed["names"] != entry["names"]


class Slow(nn.Module):
    """Lets other threads run for a while of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(random.uniform(0, 2e-3))
        return x


def test_threads_share_a_model_in_training_mode() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), Slow(), nn.BatchNorm2d(8), Slow(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    )
    model[1].eval()
    model(3 + torch.randn(8, 3, 16, 16))
    modes = [module.training for module in model.modules()]
    assert set(modes) == {True, False}
    look = spec_transform(make_spec(TINY_MODEL, CLASSES, size=16))
    images = np.random.default_rng(0).integers(0, 255, (8, 2, 16, 16, 3), np.uint8)
    statistics = {name: value.clone() for name, value in model.named_buffers()}
    alone = copy.deepcopy(model).eval()
    with torch.no_grad():
        expected = [alone(look.normalize(torch.from_numpy(pair))).numpy() for pair in images]
    logits = logits_of(model, look)

    def work(_: int) -> float:
        differences = [abs(logits(pair) - right).max() for pair, right in zip(images, expected, strict=True)]
        return float(max(differences))

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(work, range(40))) < 1e-5
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, statistics[name]) for name, value in model.named_buffers())


def test_eval_mode_nests_and_its_holders_leave_in_any_order() -> None:
    model = nn.Sequential(nn.Sequential(nn.Dropout(), nn.BatchNorm2d(3)), nn.Dropout())
    part = model[0]
    part[1].eval()
    before = [module.training for module in model.modules()]

    def modes(*modules: nn.Module) -> set[bool]:
        return {module.training for module in modules}

    for first, second in itertools.product([model, part], [model, part]):
        with eval_mode(first):
            with eval_mode(second):
                assert modes(*first.modules(), *second.modules()) == {False}
            assert modes(*first.modules()) == {False}
        assert [module.training for module in model.modules()] == before

        one, other = eval_mode(first), eval_mode(second)
        one.__enter__()
        other.__enter__()
        one.__exit__(None, None, None)
        assert modes(*second.modules()) == {False}
        if first is model and second is part:
            assert model.training and model[1].training  # nobody holds these any more
        other.__exit__(None, None, None)
        assert [module.training for module in model.modules()] == before

    with pytest.raises(KeyError), eval_mode(model), eval_mode(part):
        raise KeyError
    assert [module.training for module in model.modules()] == before
    with eval_mode(model):
        inside = copy.deepcopy(model)
        taken = model[1]
        model[1] = nn.Identity()  # an edit meanwhile
    assert taken.training and not inside.training
