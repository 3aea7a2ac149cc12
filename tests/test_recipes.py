"""The files under recipes/ build their models, and the commands in docs/datasets.md get as far as the data."""

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import yaml

from ulsam.cli import main
from ulsam.data.prepare import OFFICIAL
from ulsam.layer.ulsam import ULSAM
from ulsam.model.build import make_spec, meta_model
from ulsam.model.spec import Edit
from ulsam.surgery.cost import cost
from ulsam.training.config import TrainConfig, read_config

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
#: Subspaces of each recipe's two layers.
GROUPS = {"cub200": 8, "dogs": 4, "food101": 4, "imagenet": 4}
#: Parameters without a classifier: MobileNet-V2's, less its blocks 14 and 17, and 2 * C for each layer.
BACKBONE = 2_223_872 - 118_272 - 320_000 + 2 * (96 + 160)


def test_one_recipe_a_data_set():
    assert {path.stem for path in RECIPES} == {*OFFICIAL, "imagenet"} == set(GROUPS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_builds_the_papers_model_for_its_classes(path):
    config = TrainConfig.from_mapping(read_config(path))
    assert yaml.safe_load(config.to_yaml()) == dataclasses.asdict(config)
    assert config.data == (f"data/{path.stem}" if path.stem in OFFICIAL else "torch/imagenet")
    classes = OFFICIAL[path.stem].counts["classes"] if path.stem in OFFICIAL else 1000
    edits = [Edit.parse(text) for text in config.edits]
    names = [f"class {n}" for n in range(classes)]
    model = meta_model(make_spec(config.model, names, edits, size=config.size, model_args=config.model_args))
    layers = {name: part.groups for name, part in model.named_modules() if isinstance(part, ULSAM)}
    assert layers == dict.fromkeys(("blocks.4.2", "blocks.5.2"), GROUPS[path.stem])
    assert cost(model, (3, config.size, config.size)).params == BACKBONE + 1281 * classes


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_that_its_values_are_not_measured(path):
    assert "# A starting point, not measured" in path.read_text()
    written = yaml.safe_load(path.read_text())
    assert written.keys() >= {"data", "model", "edits", "epochs", "batch_size", "lr"}


def test_the_training_commands_in_the_docs_need_only_the_data(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "datasets.md").read_text()
    commands = re.findall(r"^(?:ulsam|torchrun .* -m ulsam) (train .*)$", page, re.MULTILINE)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    for command in commands:
        assert main(command.split()) == 2
        data = re.search(r"data/[\w-]+", command) or re.search(r"recipes/(\w+)", command)
        assert data
        said = capsys.readouterr().err
        wanted = data[0] if data[0].startswith("data/") else f"data/{data[1]}"
        assert wanted in said, (command, said)
    assert {path.name for path in tmp_path.iterdir()} == {"recipes"}, "no run was begun"
    assert {name for name in GROUPS if any(name in command for command in commands)} == set(GROUPS)
