"""The variants of the layer: what each computes, where they stand, and that they join a comparison."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

import ulsam
from scripts import load_benchmark
from tiny import SETTINGS, draw_splits
from ulsam.study.arms import Arm
from ulsam.study.compare import report
from ulsam.study.comparison_folder import ComparisonFolder
from ulsam.study.grid import Grid
from ulsam.training.config import TrainConfig
from ulsam.training.train import train


@pytest.fixture(scope="module")
def variants() -> ModuleType:
    return load_benchmark("variants")


@pytest.mark.parametrize("kind", ["scaled", "gated", "depthwise", "mixed"])
def test_they_start_as_the_identity(variants: ModuleType, kind: str) -> None:
    x = torch.randn(2, 8, 5, 4)
    torch.testing.assert_close(variants.Variant(8, 2, kind)(x), x)


def test_still_is_the_papers_form(variants: ModuleType) -> None:
    x, layer, paper = torch.randn(2, 8, 5, 4), variants.Variant(8, 2, "still"), ulsam.ULSAM(8, 2)
    torch.testing.assert_close(layer(x), x * (1 + 1 / 20))
    layer.load_state_dict(paper.state_dict())
    torch.testing.assert_close(layer(x), paper(x))
    assert variants.Variant(8, 2, "sharp").load_state_dict(paper.state_dict())


@pytest.mark.parametrize("kind", ["sharp", "scaled"])
def test_their_gates_average_one_whatever_the_size(variants: ModuleType, kind: str) -> None:
    layer = variants.Variant(8, 2, kind)
    for size in ((3, 3), (14, 9)):
        gate = layer.gate(3 * torch.randn(2, 2, *size))
        torch.testing.assert_close(gate.mean((2, 3)), torch.ones(2, 2))


@pytest.mark.slow
def test_a_variant_joins_a_comparison(variants: ModuleType, tmp_path: Path) -> None:
    data = draw_splits(tmp_path / "data", train=8, val=4)
    resolved = {"epochs": 1, "amp": "none", "layout": "contiguous", "compile": "none", "model": "mobilenetv2_035"}
    base = TrainConfig.from_mapping({**SETTINGS, **resolved, "data": str(data)})
    grid, comparison = Grid((Arm.parse("base"),), base, seeds=1), ComparisonFolder(tmp_path / "out")
    comparison.root.mkdir()
    comparison.write("grid.json", grid.to_json())
    for run in grid.due(comparison.outcome):
        train(run.config, comparison.folder(run))
    variants.main([str(comparison.root), "gated", "14", "--groups", "2"])
    arms = report(comparison.root)["arms"]
    assert [arm["name"] for arm in arms] == ["base", "gated 14 g=2"]
    assert arms[1]["cost"]["macs"] < arms[0]["cost"]["macs"] and arms[1]["top1_mean"] is not None
    assert json.loads((comparison.root / "arms" / "gated-14-g-2" / "external_arm.json").read_text())["kind"] == "gated"
