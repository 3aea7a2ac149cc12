"""A model without classes: a start for training, inspected and counted, and refused where classes are needed."""

from pathlib import Path

import pytest
import torch

from tiny import SETTINGS, TINY_MODEL, draw_splits
from ulsam.cli import main
from ulsam.model.build import build, load, make_spec, save
from ulsam.model.spec import Edit
from ulsam.training.config import TrainConfig
from ulsam.training.train import train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_splits(tmp_path_factory.mktemp("data"), train=4, val=2)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    file = tmp_path_factory.mktemp("start") / "start.safetensors"
    spec = make_spec(TINY_MODEL, (), [Edit("insert", "blocks.3", groups=4)], size=32)
    save(build(spec)[0], spec, file)
    return file


def test_training_begins_from_it_with_a_classifier_of_its_own(data: Path, start: Path, tmp_path: Path) -> None:
    own = {**SETTINGS, "model": str(start), "epochs": 1, "val_every": 1, "lr": 1e-12, "amp": "none"}
    train(TrainConfig.from_mapping({**own, "data": str(data)}), tmp_path / "run")
    (before, _), (after, spec) = load(start), load(tmp_path / "run" / "model.safetensors")
    assert spec.classes == ("class0", "class1", "class2")
    assert list(map(str, spec.edits)) == ["insert blocks.3 g=4"]
    then, now = dict(before.named_parameters()), dict(after.named_parameters())
    assert now.keys() - then.keys() == {"classifier.weight", "classifier.bias"}
    for name, value in then.items():
        torch.testing.assert_close(now[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "words",
    [
        "predict START DATA/val/class0/000.png",
        "eval START DATA",
        "eval START DATA --classes-by-number",
        "explain START DATA/val/class0/000.png --out OUT",
        "quantize START DATA --out OUT.onnx",
        "slim START DATA --macs 0.9 --out OUT",
        "export START --out OUT.onnx",
        "serve START",
        "explore START",
        "bench START --backends onnxruntime",
        "push START OUT",
    ],
)
def test_what_needs_classes_says_that_it_has_none(
    words: str, data: Path, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    meant = {"START": str(start), "DATA": str(data), "OUT": str(tmp_path / "out")}
    for word, value in meant.items():
        words = words.replace(word, value)
    assert main(words.split()) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"ulsam: error: {start}")
    assert said.endswith(" has no classes: ulsam train gives it those of your images")
    assert not list(tmp_path.iterdir())


def test_its_maps_are_inspected_and_its_cost_is_counted(
    data: Path, start: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(start), str(data / "val"), "--json"]) == 0
    assert "blocks.3" in capsys.readouterr().out
    assert main(["info", str(start)]) == 0
    assert "classes     none" in capsys.readouterr().out
    assert main(["bench", str(start), "--backends", "eager", "--batch", "1", "--seconds", "0.1"]) == 0
