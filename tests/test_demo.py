"""The demonstration on a tiny drawing: one recipe for both models, and what it shows is what was measured."""

import json

from PIL import Image

from ulsam.cli import main
from ulsam.study import demo


def test_a_bad_seed_is_reported_before_anything_is_drawn(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "demo"), "--seed", "-1"]) == 2
    assert capsys.readouterr().err == "ulsam: error: seed must be 0 or more, not -1\n"
    assert not (tmp_path / "demo").exists()


def test_demo_compares_two_models_under_one_spec(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "BIRDS", {"classes": 2, "train": 12, "val": 6, "size": 32})
    monkeypatch.setattr(demo, "RECIPE", {**demo.RECIPE, "epochs": 1, "batch_size": 8, "size": 32, "workers": 0})
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--seed", "3"]) == 0
    text = capsys.readouterr().out
    assert "Seed 3." in text and "proves nothing" in text
    base, ulsam = (json.loads((out / name / "summary.json").read_text()) for name in ("base", "ulsam"))
    assert {key for key in base["config"] if base["config"][key] != ulsam["config"][key]} == {"edits"}
    assert base["config"]["seed"] == 3
    assert ulsam["cost"]["macs"] < base["cost"]["macs"] == ulsam["base_cost"]["macs"]
    for summary in (base, ulsam):
        assert f"{summary['cost']['params']:,}" in text
        assert f"{100 * summary['scores']['top1']:.1f} %" in text
    image = Image.open(out / "comparison.png").convert("RGB")
    assert image.width > 800
    assert len(image.getcolors(1 << 24) or ()) > 100
    assert main(["demo", "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith("ulsam: error:")
