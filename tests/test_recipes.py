"""Every file under recipes/ and every command in docs/datasets.md is accepted by the code as it is now."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from ulsam.cli import parse
from ulsam.cli.train import config_from
from ulsam.data.prepare import OFFICIAL
from ulsam.model.build import make_spec, sketch, ulsam_parameters
from ulsam.model.spec import Edit
from ulsam.training.config import TrainConfig, read_config

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def test_one_recipe_a_data_set():
    assert {path.stem for path in RECIPES} == {*OFFICIAL, "imagenet"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path):
    config = TrainConfig.from_mapping(read_config(path))
    assert yaml.safe_load(config.to_yaml()) == dataclasses.asdict(config)
    classes = OFFICIAL[path.stem].counts["classes"] if path.stem in OFFICIAL else 1000
    assert config.data == (f"data/{path.stem}" if path.stem in OFFICIAL else "torch/imagenet")
    edits = [Edit.parse(text) for text in config.edits]
    names = [f"class {n}" for n in range(classes)]
    model = sketch(make_spec(config.model, names, edits, size=config.size, model_args=config.model_args))
    assert model.classifier.out_features == classes
    assert ulsam_parameters(model)
    assert "measured" in path.read_text(), "a recipe says whether its values were measured"


def test_the_training_commands_in_the_docs(monkeypatch):
    page = (ROOT / "docs" / "datasets.md").read_text()
    commands = re.findall(r"^(?:ulsam|torchrun .* -m ulsam) (train .*)$", page, re.MULTILINE)
    monkeypatch.chdir(ROOT)
    configs = [config_from(parse(command.split())) for command in commands]
    assert {config.data for config in configs} >= {f"data/{name}" for name in OFFICIAL} | {"torch/imagenet"}
