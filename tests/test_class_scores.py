"""Precision, recall, F1, specificity, AUC and the confusion matrix, against plain counting and scikit-learn."""

import csv
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tiny import TINY_MODEL, draw
from ulsam.cli import main
from ulsam.deploy.confusion_plot import confusion_png
from ulsam.model.build import build, make_spec, save
from ulsam.training.class_scores import ClassScores, Collected
from ulsam.training.evaluate import ALONE

CLASSES = ("robin", "wren", "tit", "crow", "owl")


def _outputs(images: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits with ties and some skill; of crow there is no image, and as owl nothing is named."""
    random = np.random.default_rng(0)
    labels = random.choice([0, 1, 2, 4], images)
    logits = random.integers(0, 4, (images, len(CLASSES))).astype(np.float32)
    logits[np.arange(images), labels] += random.integers(0, 3, images)
    logits[:, 4] -= 9
    logits += np.float32([0.3, 0.2, 0.1, 0.0, 0.0])  # no tie for the first guess
    return torch.from_numpy(logits), torch.from_numpy(labels)


@pytest.fixture(scope="module")
def found() -> ClassScores:
    collected = Collected()
    for logits, labels in zip(*(whole.split(7) for whole in _outputs()), strict=True):
        collected.add(logits, labels)
    return collected.scores(CLASSES, ALONE)


def test_scores_are_what_counting_gives(found):
    logits, labels = _outputs()
    guesses = logits.argmax(1).tolist()
    pairs = list(zip(labels.tolist(), guesses, strict=True))
    shares = logits.double().softmax(1).float()
    for number, (name, row) in enumerate(found.table().items()):
        right = pairs.count((number, number))
        images, named = labels.tolist().count(number), guesses.count(number)
        wrong_away = sum(truth != number and guess != number for truth, guess in pairs)
        assert name == CLASSES[number]
        assert (row["images"], row["named"]) == (images, named)
        assert row["recall"] == (right / images if images else None)
        assert row["precision"] == (right / named if named else None)
        assert row["f1"] == (pytest.approx(2 * right / (images + named)) if images else None)
        assert row["specificity"] == pytest.approx(wrong_away / (len(pairs) - images))
        yes, no = shares[labels == number, number], shares[labels != number, number]
        wins = (yes[:, None] > no).double() + (yes[:, None] == no).double() / 2
        assert row["auc"] == (pytest.approx(wins.mean().item()) if images else None)


def test_means_are_over_the_classes_with_images(found):
    rows = [row for row in found.table().values() if row["images"]]
    assert [row["named"] for row in rows][-1] == 0  # nothing was named owl: its precision counts as 0
    macro = found.macro()
    assert macro["precision"] == pytest.approx(sum(row["precision"] for row in rows[:3]) / 4)
    assert macro["recall"] == pytest.approx(sum(row["recall"] for row in rows) / 4)


def test_the_confusion_matrix_counts_every_image(found):
    logits, labels = _outputs()
    counts = found.confusion()
    assert sum(sum(row.values()) for row in counts.values()) == len(labels)
    assert "crow" not in counts and all("owl" not in row for row in counts.values())
    assert counts["wren"]["tit"] == sum((labels == 1) & (logits.argmax(1) == 2))


def test_they_are_those_of_scikit_learn(found):
    metrics = pytest.importorskip("sklearn.metrics")
    logits, labels = _outputs()
    guesses, present = logits.argmax(1), [0, 1, 2, 4]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the class that nothing was named as
        names = ("precision", "recall", "f1")
        for average, ours in ((None, None), ("macro", found.macro())):
            theirs = metrics.precision_recall_fscore_support(labels, guesses, labels=present, average=average)
            for key, values in zip(names, theirs, strict=False):
                if ours is None:
                    mine = [row[key] or 0.0 for row in found.table().values() if row["images"]]
                    assert mine == pytest.approx(values.tolist())
                else:
                    assert ours[key] == pytest.approx(values)
    shares = logits.double().softmax(1).float().numpy()
    for number in present:
        theirs = metrics.roc_auc_score(labels == number, shares[:, number])
        assert found.auc[number] == pytest.approx(theirs)


def test_there_is_no_auc_of_more_numbers_than_are_kept():
    logits, labels = _outputs()
    collected = Collected(max_numbers=logits.numel() - 1)
    collected.add(logits, labels)
    found = collected.scores(CLASSES, ALONE)
    assert found.macro()["auc"] is None and found.macro()["recall"] is not None


@pytest.mark.parametrize("classes", [3, pytest.param(90, marks=pytest.mark.slow)])
def test_the_confusion_matrix_is_drawn_whatever_the_number_of_classes(classes, tmp_path):
    truths = np.arange(classes)
    scores = ClassScores(tuple(f"class $ {n}" for n in truths), truths, np.roll(truths, 1), np.full(classes, np.nan))
    (tmp_path / "a.png").write_bytes(confusion_png(scores))
    with Image.open(tmp_path / "a.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert image.size[0] > 300
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50  # not blank


def test_eval_writes_the_table_and_the_confusion_matrix(tmp_path: Path, capsys):
    torch.manual_seed(0)
    spec = make_spec(TINY_MODEL, ["class0", "class1", "class2"], size=32)
    save(build(spec)[0], spec, tmp_path / "model.safetensors")
    draw(tmp_path / "val", 3)
    words = ["eval", str(tmp_path / "model.safetensors"), str(tmp_path / "val"), "--workers", "0", "--device", "cpu"]
    table, image = tmp_path / "classes.csv", tmp_path / "confusion.png"
    assert main([*words, "--csv", str(table), "--confusion", str(image), "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["class"] for row in rows] == ["class0", "class1", "class2"]
    for row in rows:
        ours = entry["scores"]["per_class"][row["class"]]
        assert float(row["recall"]) == ours["recall"] == ours["top1"]
        assert row["precision"] == ("" if ours["precision"] is None else str(ours["precision"]))
    right = sum(row.get(name, 0) for name, row in entry["confusion"].items())
    assert right == entry["scores"]["top1"] * 9
    assert image.read_bytes().startswith(b"\x89PNG")
    assert main(words) == 0
    assert "means   precision " in capsys.readouterr().out
    assert main([*words, "--confusion", "matrix.jpg"]) == 2
    assert "--confusion writes NAME.png, not matrix.jpg" in capsys.readouterr().err
