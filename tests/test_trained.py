"""The trained models of the package: what their names mean, and the script that makes them."""

import importlib
import json
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from scripts import BENCHMARKS, load_benchmark
from tiny import SETTINGS, draw_splits
from ulsam.base.errors import UlsamError
from ulsam.base.packed import read_packed
from ulsam.deploy.evaluate import evaluate
from ulsam.model import trained
from ulsam.model.build import load
from ulsam.study.arms import Arm
from ulsam.study.comparison_folder import ComparisonFolder
from ulsam.study.grid import Grid
from ulsam.surgery.cost import cost
from ulsam.training.config import TrainConfig
from ulsam.training.train import train

#: of an image that is a ramp from -2 to 2: the best class and its logit, or of a start the largest pooled feature's
#: channel and value; to be renewed with the model
LOGITS = {
    "mobilenetv2_100.grocery81_slim75": ("08.Lemon", 2.035),
    "mobilenetv2_100.grocery81_ulsam75": ("12.Galia-Melon", 3.638),
    "mobilenetv2_100.imagenet_ulsam75": (650, 0.914),
}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # its processes import it by name
    return importlib.import_module("slimmed")


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("package")


def test_a_name_that_is_none_is_a_file(tmp_path: Path) -> None:
    assert trained.locate(tmp_path / "model.safetensors") == tmp_path / "model.safetensors"
    assert trained.locate("wren") == Path("wren")
    name = trained.names()[0]
    assert trained.locate(name) == Path(trained.__file__).parent / "weights" / f"{name}.safetensors"
    assert trained.locate(f"./{name}") == Path(name)
    assert trained.locate(Path(name)) == Path(name)
    with pytest.raises(UlsamError, match="no trained model 'other' comes with the package"):
        trained.card("other")
    near = name.replace(".", "_")
    with pytest.raises(UlsamError, match=rf"^no model file {near}; the package has a trained model {name}$"):
        load(near)


def test_a_card_comes_without_the_marks_of_its_tables() -> None:
    name = trained.names()[0]
    file = Path(trained.__file__).parent / "weights" / f"{name}.md"
    written = file.read_text(encoding="utf-8").splitlines()
    marks = [line for line in written if line.startswith("<!--")]
    assert marks
    assert trained.card(name).splitlines() == [line for line in written if line not in marks]


@pytest.mark.parametrize("name", trained.names())
def test_a_model_of_the_package_is_what_its_card_says(name: str) -> None:
    model, spec = load(name)
    image = torch.linspace(-2, 2, math.prod(spec.input_size)).view(1, *spec.input_size)
    logit, best = model(image)[0].max(0)
    found = spec.classes[best] if spec.classes else best.item()
    wanted = LOGITS[name]
    assert (found, logit.item()) == (wanted[0], pytest.approx(wanted[1], abs=0.02))
    counted, card = cost(model, spec.input_size), trained.card(name)
    assert f"| parameters | {counted.params / 1e6:.2f} M |" in card
    assert f"| MACs | {counted.macs / 1e6:.2f} M |" in card
    assert (f"Recognizes {len(spec.classes)} kinds" if spec.classes else "recognizes nothing") in card


def test_the_first_model_of_an_arm_is_packed(package: ModuleType, tmp_path: Path) -> None:
    data = draw_splits(tmp_path / "data", train=6, val=2)
    resolved = {"epochs": 1, "amp": "none", "layout": "contiguous", "compile": "none", "model": "mobilenetv2_035"}
    shared = TrainConfig.from_mapping({**SETTINGS, **resolved, "data": str(data)})
    grid = Grid((Arm.parse("base"), Arm.parse("small: replace 16,17 g=4")), shared, seeds=2)
    comparison = ComparisonFolder(tmp_path / "out")
    comparison.root.mkdir()
    comparison.write("grid.json", grid.to_json())
    words = [str(comparison.root), "small", "birds", "--root", str(tmp_path)]
    with pytest.raises(UlsamError, match="the first run of 'small' is not finished"):
        package.main(words)
    run = grid.finals(grid.arms[1], comparison.outcome)[0]
    train(run.config, comparison.folder(run))
    for folder in ("src/ulsam/model/weights", "results"):
        (tmp_path / folder).mkdir(parents=True)
    package.main(words)
    packed = tmp_path / "src/ulsam/model/weights/mobilenetv2_035.birds.safetensors"
    model, spec = load(packed)
    trained_model, _ = load(comparison.folder(run) / "model.safetensors")
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(model(x), trained_model(x), rtol=0, atol=1e-2)
    assert packed.stat().st_size < 0.6 * (comparison.folder(run) / "model.safetensors").stat().st_size
    assert list(map(str, spec.edits)) == ["replace 16,17 g=4"]
    result = json.loads((tmp_path / "results/packed_birds.json").read_text())
    assert result["top1"] == evaluate(model, data / "val", spec=spec).scores.top1
    assert (result["arm"], result["seed"], result["bytes"]) == ("small", 0, packed.stat().st_size)
    assert result["top1_float32"] == evaluate(trained_model, data / "val", spec=spec).scores.top1
    assert list(result["attention_effect"]) == ["blocks.5.1", "blocks.5.2"]
    assert all(0 <= effect < 1 for effect in result["attention_effect"].values())
    with pytest.raises(UlsamError, match="has no arm 'large'; it has base, small"):
        package.main([str(comparison.root), "large", "birds", "--root", str(tmp_path)])


@pytest.mark.slow
def test_the_script_slims_what_a_comparison_trained(script: ModuleType, tmp_path: Path) -> None:
    data = draw_splits(tmp_path / "data", train=12, val=4)
    resolved = {"epochs": 1, "amp": "none", "layout": "contiguous", "compile": "none", "model": "mobilenetv2_035"}
    base = TrainConfig.from_mapping({**SETTINGS, **resolved, "data": str(data)})
    grid, comparison = Grid((Arm.parse("base"),), base, rates=(0.01, 0.02), seeds=2), ComparisonFolder(tmp_path / "out")
    comparison.root.mkdir()
    comparison.write("grid.json", grid.to_json())
    (tmp_path / "src" / "ulsam" / "model" / "weights").mkdir(parents=True)
    (tmp_path / "results").mkdir()
    words = f"{comparison.root} birds --package model --macs 0.9 --width 4 --rates 0.01 0.02 --epochs 1".split()
    words += ["--root", str(tmp_path)]
    with pytest.raises(
        UlsamError, match="has not chosen a learning rate for its base model: continue with ulsam compare"
    ):
        script.main(words)
    while due := grid.due(comparison.outcome):
        train(due[0].config, comparison.folder(due[0]))
    script.main([*words, "--seeds", "1"])
    assert json.loads((tmp_path / "results" / "slimmed_birds.json").read_text())["slimmed"]["seeds"] == [0]
    script.main(words)
    made = tmp_path / "src" / "ulsam" / "model" / "weights" / "model.safetensors"
    result = json.loads((tmp_path / "results" / "slimmed_birds.json").read_text())
    model, spec = load(made)
    slimmed, _ = load(comparison.root / "slimmed" / "birds" / "seed-0" / "run" / "model.safetensors")
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(model(x), slimmed(x), rtol=0, atol=1e-2)
    assert made.stat().st_size < 0.6 * (comparison.root / "slimmed/birds/seed-0/run/model.safetensors").stat().st_size
    found = cost(model, (3, 32, 32))
    assert found.macs <= 0.9 * result["whole_cost"]["macs"] and found.params == result["slimmed"]["cost"]["params"]
    assert spec.classes == ("class0", "class1", "class2")
    assert list(result["tries"]) == ["0.01", "0.02"] and result["tries"][f"{result['lr']:g}"] == max(
        result["tries"].values()
    )
    assert all(result[way]["seeds"] == [0, 1] for way in ("slimmed", "whole", "longer")) and result["images"] == 12
    assert result["packed"] == {**result["packed"], "name": "model", "seed": 0, "bytes": made.stat().st_size}
    assert str(tmp_path) not in (tmp_path / "results" / "slimmed_birds.json").read_text()
    sets = [
        json.loads((comparison.root / "slimmed" / "birds" / f"choose{lr}" / "slim.json").read_text())
        for lr in ("", "-0.02")
    ]
    assert sets[0]["measured"] == sets[1]["measured"]  # they differ in nothing that chooses blocks
    published = read_packed(tmp_path / "results" / "slimmed_birds.jsonl.gz")
    runs = {name: published[f"seed-1/{name}.json"] for name in ("whole", "slimmed", "longer")}
    assert [result[name]["top1"][1] for name in runs] == [run["scores"]["top1"] for run in runs.values()]
    assert (runs["slimmed"]["config"]["edits"], runs["longer"]["config"]["edits"]) == (
        [f"replace {','.join(result['blocks'][1])} g=4 width=4"],
        [],
    )
    trained = [*(comparison.root / "slimmed").glob("*/seed-1*/**/summary.json")]
    assert len(trained) == 2  # slimmed, and trained on
    before = made.stat().st_mtime_ns, [file.stat().st_mtime_ns for file in trained]
    script.main(words)
    assert made.stat().st_mtime_ns > before[0]
    assert list(result["tries_longer"]) == list(result["tries"])
    assert result["tries_longer"][f"{result['longer']['lr']:g}"] == max(result["tries_longer"].values())
    rate = f"{result['longer']['lr']:g}"
    other_words = f"{comparison.root} paper --macs 0.99 --at 16,17 --width 4 --rates {rate} --epochs 1".split()
    script.main([*other_words, "--root", str(tmp_path)])
    other = json.loads((tmp_path / "results" / "slimmed_paper.json").read_text())
    assert (other["tries"], f"{other['lr']:g}", other["longer"]) == ({}, rate, result["longer"])
    assert all(set(blocks) <= {"16", "17"} for blocks in other["blocks"])
    assert [file.stat().st_mtime_ns for file in trained] == before[1]


@pytest.mark.slow
def test_the_script_makes_a_start_that_training_begins_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_benchmark("backbone")
    monkeypatch.setattr(backbone, "STEPS", 3)
    monkeypatch.setattr(backbone, "VIEWS", 1)
    for folder in ("src/ulsam/model/weights", "results"):
        (tmp_path / folder).mkdir(parents=True)
    random = np.random.default_rng(0)
    for split in ("reconstruct", "test"):
        for number in range(4):
            (tmp_path / split / f"n{number}").mkdir(parents=True)
            pixels = random.integers(0, 256, (224, 224, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / f"n{number}" / "0.jpg")
    torch.manual_seed(0)
    save_file(timm.create_model("mobilenetv2_100", num_classes=0).state_dict(), tmp_path / "whole.safetensors")
    backbone.main(tmp_path, tmp_path / "whole.safetensors", tmp_path)
    packed = tmp_path / "src/ulsam/model/weights/mobilenetv2_100.imagenet_ulsam75.safetensors"
    model, spec = load(packed)
    result = json.loads((tmp_path / "results/packed_imagenet_ulsam75.json").read_text())
    assert (spec.classes, list(map(str, spec.edits))) == ((), ["replace 13,14,16,17 g=4"])
    assert [stage["scope"] for stage in result["stages"]] == [None, "block", "joint"]
    assert result["macs"]["this"] == cost(model, spec.input_size).macs
    whole = timm.create_model("mobilenetv2_100", num_classes=0).eval()
    whole.load_state_dict(load_file(tmp_path / "whole.safetensors"))
    center, _ = backbone.transforms_of(whole)
    images = torch.cat(backbone.read(backbone.files(tmp_path / "test"), center))
    with torch.inference_mode():
        found, wanted = (one.forward_features(images) for one in (model, whole))
    off = (found - wanted).square().sum() / wanted.square().sum()
    assert result["packed"] == pytest.approx(off.item(), rel=1e-4)
    card = load_benchmark("tables_package").backbone_card(tmp_path / "results", "imagenet_ulsam75")
    assert f"| MACs | {cost(model, spec.input_size).macs / 1e6:.2f} M | 299.49 M |" in card
    assert f"| the same in half precision | {result['packed']:.2f} | 0 |" in card
    data = draw_splits(tmp_path / "data", train=4, val=2)
    own = {**SETTINGS, "model": str(packed), "epochs": 1, "val_every": 1, "lr": 1e-12, "data": str(data)}
    train(TrainConfig.from_mapping(own), tmp_path / "run")
    begun = load(tmp_path / "run" / "model.safetensors")[0]
    torch.testing.assert_close(begun.conv_head.weight, model.conv_head.weight)
