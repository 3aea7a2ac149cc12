"""The demonstration on a tiny drawing: what it shows is what was measured."""

import json

import pytest
from PIL import Image

import ulsam
from stopping import stop_after
from ulsam.cli import main
from ulsam.cli.demo import text
from ulsam.model.build import load
from ulsam.study.demo import DemoRow, run_demo


def test_a_bad_seed_is_reported_before_anything_is_drawn(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "demo"), "--seed", "-1"]) == 2
    assert capsys.readouterr().err == "ulsam: error: --seed must be 0 or more, not -1\n"
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow  # draws all the birds
def test_stopped_it_says_how_to_begin_anew(tmp_path, capsys):
    with stop_after(1):
        assert main(["demo", "--out", str(tmp_path / "demo")]) == 130
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "ulsam: stopped in epoch 1, step 2; the demonstration begins anew: run it with another --out"


def test_the_table_has_a_caution_below_it():
    rows = [
        DemoRow("base model", 1_234_567, 8_900_000, {"at once": 0.9, "fine-tuned": 0.95}),
        DemoRow("blocks removed", 1_000, 70_000, {"at once": 0.125, "reconstructed": 0.75, "fine-tuned": 0.8125}),
    ]
    empty, header, base, removed, gap, caution, image = text(rows, 7, "runs/new").splitlines()
    assert empty == gap == ""
    assert header.split() == ["parameters", "MACs", "at", "once", "reconstructed", "fine-tuned"]
    assert base.split() == ["base", "model", "1,234,567", "8,900,000", "90.0", "%", "95.0", "%"]
    assert removed.split() == ["blocks", "removed", "1,000", "70,000", "12.5", "%", "75.0", "%", "81.2", "%"]
    assert caution == "Seed 7. One run with one seed proves nothing: another seed can turn the order."
    assert image == "Image: runs/new/demo.png; the birds, the models and their runs lie beside it."


@pytest.mark.slow
def test_the_demo_shows_what_it_measured(tmp_path, capsys):
    out = tmp_path / "demo"
    settings = {"epochs": 1, "batch_size": 8, "size": 32, "workers": 0}
    birds = {"classes": 2, "train": 12, "val": 6, "size": 32}
    shown = text(run_demo(out, 3, birds=birds, settings=settings, steps=20), 3, str(out))
    assert "\nSeed 3. " in shown
    base, removed, replaced = json.loads((out / "demo.json").read_text())
    assert removed["macs"] < replaced["macs"] < 0.8 * base["macs"]
    for name, row in (("base", base), ("remove", removed), ("replace", replaced)):
        summary = json.loads((out / f"{name}-fine-tuned" / "summary.json").read_text())
        assert summary["config"]["seed"] == 3 and summary["config"]["reconstruct_images"] == 0
        assert row["top1"]["fine-tuned"] == summary["scores"]["top1"]
        assert (row["params"], row["macs"]) == (summary["cost"]["params"], summary["cost"]["macs"])
        for share in row["top1"].values():
            assert f"{100 * share:.1f} %" in shown
    assert base["top1"]["at once"] == json.loads((out / "base" / "summary.json").read_text())["scores"]["top1"]
    reconstructed, spec = load(out / "replace.safetensors")
    scores = ulsam.evaluate(reconstructed, out / "birds", spec=spec, workers=0).scores
    assert replaced["top1"]["reconstructed"] == scores.top1
    image = Image.open(out / "demo.png").convert("RGB")
    assert image.width > 800
    assert len(image.getcolors(1 << 24) or ()) > 100
    assert main(["demo", "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith("ulsam: error:")
