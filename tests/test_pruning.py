"""The pruning benchmark: it reaches its share, and the pruned model trains and resumes, in the right folders."""

import copy
import dataclasses
import json
import re
import runpy
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from scripts import BENCHMARKS, load_benchmark
from stopping import after, stop_after
from tiny import SETTINGS, TINY_MODEL, draw_splits
from ulsam.base.errors import UlsamError
from ulsam.base.locks import take_lock
from ulsam.model.build import build
from ulsam.model.spec import ModelSpec
from ulsam.study.arms import Arm
from ulsam.study.compare import report
from ulsam.study.comparison_folder import ComparisonFolder
from ulsam.study.grid import Grid
from ulsam.study.launch import lock_of
from ulsam.surgery.cost import cost
from ulsam.training.checkpoint import read_checkpoint
from ulsam.training.config import TrainConfig
from ulsam.training.train import train

pytest.importorskip("torch_pruning")
SIZE = (3, 32, 32)


@pytest.fixture(scope="module")
def pruning() -> ModuleType:
    return load_benchmark("pruning")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    model, _ = build(ModelSpec(TINY_MODEL, ("a", "b", "c"), input_size=SIZE))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


@pytest.mark.parametrize(("measure", "uniform"), [("macs", False), ("params", True)])
def test_the_share_is_reached(pruning: ModuleType, model: nn.Module, measure: str, uniform: bool) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pruned = pruning.prune(model, SIZE, 0.95, measure, uniform=uniform, steps=200)  # enough for so few channels
    whole, now = cost(model, SIZE), cost(pruned, SIZE)
    assert getattr(now, measure) / getattr(whole, measure) == pytest.approx(0.95, rel=0.01)
    assert now.macs < whole.macs
    assert now.params < whole.params
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert pruned(torch.randn(2, *SIZE)).shape == (2, 3)


def test_it_ends_on_the_nearer_side_of_a_coarse_step(pruning: ModuleType, model: nn.Module) -> None:
    whole, options = cost(model, SIZE).macs, {"uniform": True, "steps": 20, "tolerance": 1.0}
    shares = [cost(pruning.prune(model, SIZE, share, **options), SIZE).macs / whole for share in (0.97, 0.93, 0.9)]
    assert shares == [1.0, pytest.approx(0.8727, abs=1e-4), pytest.approx(0.8727, abs=1e-4)]  # one step leads there


def test_the_least_important_channels_go_whatever_the_classifier_says(pruning: ModuleType) -> None:
    """Channels 0 and 1 have small weights in the backbone and great ones in the classifier; they go first."""
    model, _ = build(ModelSpec(TINY_MODEL, ("a", "b", "c"), input_size=SIZE))
    with torch.no_grad():
        for parameter in (model.conv_head.weight, model.bn2.weight):
            parameter[:2] = 1e-6
        model.classifier.weight[:, :2] = 1e6
    pruned = pruning.prune(model, SIZE, 0.985)
    assert pruned.classifier.in_features < 256
    assert float(pruned.bn2.weight.detach().min()) > 1e-3
    assert not pruned.classifier.weight.any()


@pytest.mark.slow
def test_a_pruned_model_is_reconstructed(pruning: ModuleType, model: nn.Module) -> None:
    """Its features are compared with those of the channels that are left, and come nearer to them."""
    batches = [torch.randn(32, *SIZE, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    model = copy.deepcopy(model).train()
    for images in batches * 10:
        model(images)  # its statistics become those of the images
    model.eval()
    pruned = pruning.prune(model, SIZE, 0.95, "params", uniform=True, steps=200)
    left = pruning.features_left(pruned, model)
    assert len(left) == pruned.classifier.in_features < model.classifier.in_features
    assert torch.equal(pruned.bn2.running_var, model.bn2.running_var[left])
    assert torch.equal(pruned.bn2.weight, model.bn2.weight[left])
    classifier = pruned.classifier.weight.clone()
    with torch.no_grad():
        whole = torch.cat([model.forward_features(images)[:, left] for images in batches])
        ours = torch.cat([copy.deepcopy(pruned).eval().forward_features(images) for images in batches])
    assert pruned.training
    before, after = pruning.reconstruct(pruned, model, batches, steps=300)
    assert before == pytest.approx(float((ours - whole).square().sum() / whole.square().sum()), rel=1e-4)
    with torch.no_grad():
        ours = torch.cat([pruned.eval().forward_features(images) for images in batches])
    assert after == pytest.approx(float((ours - whole).square().sum() / whole.square().sum()), rel=1e-4)
    assert after < 0.8 * before
    assert torch.equal(pruned.classifier.weight, classifier)
    with pytest.raises(UlsamError, match=r"^which channels pruning left is not known"):
        pruning.features_left(pruned, model)


def test_a_share_that_cannot_be(pruning: ModuleType, model: nn.Module) -> None:
    with pytest.raises(UlsamError, match=r"^the share that stays lies between 0 and 1, not 1.5$"):
        pruning.prune(model, SIZE, 1.5)
    with pytest.raises(UlsamError, match=r"^pruning ends at \d\.\d+ of the macs, not within 1 % of 0.95$"):
        pruning.prune(model, SIZE, 0.95, steps=4)


def test_a_mistake_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["pruning.py", str(tmp_path), "--macs", "0.9"])
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(BENCHMARKS / "pruning.py"), run_name="__main__")
    assert stop.value.code == 2
    assert re.fullmatch(r"pruning.py: error: .* is not the folder of a comparison.*\n", capsys.readouterr().err)


def test_ctrl_c_saves_and_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = draw_splits(tmp_path / "data", train=12, val=4)
    resolved = {"epochs": 1, "amp": "none", "layout": "contiguous", "compile": "none", "save_seconds": 1e6}
    base = TrainConfig.from_mapping({**SETTINGS, **resolved, "data": str(data)})
    comparison, name = ComparisonFolder(tmp_path / "out"), "pruned-uniform-params-0.95"
    comparison.root.mkdir()
    comparison.write("grid.json", Grid((Arm.parse("base"),), base, seeds=1).to_json())
    monkeypatch.setattr("sys.argv", ["pruning.py", str(comparison.root), "--params", "0.95", "--uniform"])
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    with stop_after(1), pytest.raises(SystemExit) as stop:
        runpy.run_path(str(BENCHMARKS / "pruning.py"), run_name="__main__")
    assert stop.value.code == 130
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line == f"pruning.py: stopped, {name}, seed-0 is saved; resume with the same command"
    saved = read_checkpoint(comparison.root / "arms" / name / "seed-0")
    assert saved is not None
    assert saved["position"]["updates"] == 2


@pytest.mark.slow
def test_a_run_that_fails_does_not_stop_the_others(
    pruning: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rate diverges, and the second seed's training fails; with the cause gone only that seed is trained again."""
    data = draw_splits(tmp_path / "data", train=12, val=4)
    resolved = {"epochs": 1, "amp": "none", "layout": "contiguous", "compile": "none", "clip_grad": 1e30}
    base = TrainConfig.from_mapping({**SETTINGS, **resolved, "data": str(data)})
    grid, comparison = Grid((Arm.parse("base"),), base, rates=(0.01, 1e30), seeds=2), ComparisonFolder(tmp_path / "out")
    comparison.root.mkdir()
    comparison.write("grid.json", grid.to_json())
    words = [str(comparison.root), "--params", "0.95", "--uniform"]
    arm = comparison.root / "arms" / "pruned-uniform-params-0.95"
    arm.mkdir(parents=True)
    (arm / "seed-1-0.01-1").write_text("in the way")
    with pytest.raises(SystemExit) as stop:
        pruning.main(words)
    assert stop.value.code == 1
    printed = capsys.readouterr().out
    assert "lr 1e+30, epochs 1: diverged: the loss is nan" in printed
    assert re.search(r"top-1 \d+\.\d\d; mean", printed)
    assert re.search("seed-1-0.01-1 failed: .*seed-1-0.01-1 is not an empty folder", printed)
    (arm / "seed-1-0.01-1").unlink()
    trained = {path: path.stat().st_mtime_ns for path in arm.glob("*/checkpoint.pt")}
    assert {path.parent.name for path in trained} >= {"choose-0.01-1", "seed-0-0.01-1"}
    pruning.main(words)
    assert {path: path.stat().st_mtime_ns for path in trained} == trained
    assert (arm / "seed-1-0.01-1" / "summary.json").exists()


@pytest.mark.slow
def test_its_runs(pruning: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = draw_splits(tmp_path / "data", train=12, val=4)
    base = TrainConfig.from_mapping(
        {**SETTINGS, "data": str(data), "epochs": 1, "amp": "none", "layout": "contiguous", "compile": "none"}
    )
    comparison, words = ComparisonFolder(tmp_path / "out"), [str(tmp_path / "out"), "--params", "0.95", "--uniform"]
    with pytest.raises(UlsamError, match=r"is not the folder of a comparison: there is no grid.json in it$"):
        pruning.main(words)
    grid = Grid((Arm.parse("base"),), base, rates=(0.01, 0.02), epochs=(1,), seeds=1)
    comparison.root.mkdir()
    comparison.write("grid.json", grid.to_json())
    while due := grid.due(comparison.outcome):
        train(due[0].config, comparison.folder(due[0]))

    def kill() -> None:
        raise SystemError

    with after(5, kill), pytest.raises(SystemError):
        pruning.main(words)
    arm = tmp_path / "out" / "arms" / "pruned-uniform-params-0.95"
    first = arm / "choose-0.01-1" / "summary.json"
    stamp = first.stat().st_mtime_ns
    assert len([run for run in arm.iterdir() if run.is_dir() and not (run / "summary.json").exists()]) == 1
    pruning.main(words)  # resumes
    assert first.stat().st_mtime_ns == stamp
    pruned = json.loads((arm / "external_arm.json").read_text())
    assert pruned["params_share"] == pytest.approx(0.95, rel=0.01)
    runs = sorted(run.name for run in arm.iterdir() if run.is_dir())
    assert [run.rpartition("-0.0")[0] for run in runs] == ["choose", "choose", "seed-0"]
    for run in runs:
        summary = json.loads((arm / run / "summary.json").read_text())
        assert summary["prepared"] is True
        assert summary["cost"]["macs"] == pruned["cost"]["macs"]
        assert (summary["split"] == "validation") == run.startswith("seed-0")
        assert summary["config"]["size"] == base.size
        shapes = load_file(arm / run / "weights.safetensors")
        assert (
            sum(value.numel() for name, value in shapes.items() if name.endswith((".weight", ".bias")))
            == (pruned["cost"]["params"])
        )
    assert " of those tried: give more --rates" in capsys.readouterr().out

    result = report(comparison.root, publish=tmp_path / "published.jsonl.gz")
    assert [arm["name"] for arm in result["arms"]] == ["base", "pruned-uniform-params-0.95"]
    _, external = result["arms"]
    assert external["cost"]["params"] == pruned["cost"]["params"]
    assert external["latency"] == pruned["latency"]
    assert external["minus_base"]["over"] == "images"
    assert [entry["lr"] for entry in external["tries"]] == [0.01, 0.02]
    assert result["finished"]
    assert report(tmp_path / "again", start_from=tmp_path / "published.jsonl.gz")["arms"] == result["arms"]

    held = take_lock(lock_of(arm / runs[-1]))
    (arm / runs[-1] / "summary.json").rename(tmp_path / "summary.json")
    with pytest.raises(UlsamError, match=r"seed-0-.* is being trained by another process: wait for it$"):
        pruning.main(words)
    (tmp_path / "summary.json").rename(arm / runs[-1] / "summary.json")
    assert held is not None
    held.release()
    other = {**pruned, "cost": {**pruned["cost"], "params": 1}}
    comparison.write("arms/pruned-uniform-params-0.95/external_arm.json", other)
    with pytest.raises(UlsamError, match=r"external_arm.json is of a model of another cost: move that arm away"):
        pruning.main(words)
    comparison.write("arms/pruned-uniform-params-0.95/external_arm.json", pruned)

    comparison.write("grid.json", dataclasses.replace(grid, shared=dataclasses.replace(base, hflip=0.4)).to_json())
    with pytest.raises(UlsamError, match=r"holds a run with hflip 0.5, not 0.4: put that back, move it away"):
        pruning.main(words)
    comparison.write("grid.json", {**grid.to_json(), "data_sha256": "of others"})
    with pytest.raises(UlsamError, match=r"compares models on other images than .* holds now"):
        pruning.main(words)
