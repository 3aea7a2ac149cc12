"""With `pip install ulsam` alone: what works without matplotlib, scipy and simplejpeg, and what is said of the rest."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from decoding import images_without_simplejpeg
from tiny import SETTINGS, draw_splits, options
from ulsam.data import images

LIGHT = """
import contextlib, io, json, sys
for name in ("matplotlib", "scipy", "simplejpeg"):
    sys.modules[name] = None
import torch, ulsam
from ulsam.cli import main

assert ulsam.ULSAM(16, groups=4)(torch.randn(2, 16, 7, 9)).shape == (2, 16, 7, 9)
spec = ulsam.ModelSpec("mobilenetv2_050", ("a", "b"), input_size=(3, 32, 32))
model, _ = ulsam.build(spec)
ulsam.replace(model, "14", groups=4)
ulsam.cost(model, (3, 32, 32))
edits = tuple(map(ulsam.Edit.parse, ulsam.edits_of(model)))
spec = ulsam.ModelSpec("mobilenetv2_050", ("a", "b"), input_size=(3, 32, 32), edits=edits)
ulsam.save(model, spec, "model.safetensors")
ulsam.load("model.safetensors")

found = []
for line in sys.stdin:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(json.loads(line))
    found.append([status, out.getvalue(), err.getvalue()])
print(json.dumps(found))
"""

DONE = [
    ["info", "model.safetensors"],
    ["doctor"],
    ["train", "data", *options({**SETTINGS, "epochs": 1}), "--out", "run"],
]
DONE += [["eval", "run/model.safetensors", "data", "--workers", "0"], ["predict", "run/model.safetensors", "data/val"]]
ARMS = ["--arm", "base", "--arm", "size=24", "--out", "new"]
REFUSED = [
    ["compare", "data", *ARMS],
    ["compare", "--report-only", "--out", "new"],
    ["bench", "mobilenetv2_050", "--out", "new"],
    ["demo", "--out", "new"],
    ["explain", "model.safetensors", "data/val", "--out", "new"],
    ["explore", "model.safetensors", "--port", "0"],
    ["report", "run", "--out", "new/report.html"],
]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Any]]]:
    """The folder of an interpreter that lacks them; status, output and errors of each command."""
    folder = tmp_path_factory.mktemp("light")
    draw_splits(folder / "data", train=8)
    commands = [*DONE, *REFUSED, ["prepare", "dogs", "data", "new"]]
    asked = "".join(json.dumps(words) + "\n" for words in commands)
    done = subprocess.run([sys.executable, "-c", LIGHT], input=asked, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    return folder, {" ".join(words): found for words, found in zip(commands, answers, strict=True)}


def test_layer_surgery_training_and_measuring_need_none_of_them(light: tuple[Path, dict[str, list[Any]]]) -> None:
    folder, answers = light
    for words in DONE:
        status, out, err = answers[" ".join(words)]
        assert status == 0 and out, err
    _, printed, _ = answers[" ".join(DONE[2])]
    missing = "note    no curves.png: matplotlib is not installed: pip install 'ulsam[plots]'"
    assert printed.index(missing) < printed.index("epoch   1/1")  # not at the end of a long run
    assert not (folder / "run" / "curves.png").exists()
    _, printed, _ = answers["doctor"]
    assert "jpeg    Pillow; simplejpeg reads the same values faster: pip install 'ulsam[train]'\n" in printed
    assert "plots   none: pip install 'ulsam[plots]'\n" in printed


def test_what_needs_an_extra_says_so_at_once(light: tuple[Path, dict[str, list[Any]]]) -> None:
    folder, answers = light
    for words in REFUSED:
        message = f"ulsam {words[0]} draws with matplotlib, which is not installed: pip install 'ulsam[plots]'"
        assert answers[" ".join(words)] == [2, "", f"ulsam: error: {message}\n"]
    status, _, err = answers["prepare dogs data new"]
    assert status == 2
    assert err.endswith("with scipy, which is not installed: pip install 'ulsam[dogs]'\n") and err.count("\n") == 1
    assert not (folder / "new").exists()


def test_pages_and_images_have_the_same_values_without_simplejpeg() -> None:
    drawn = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    without = images_without_simplejpeg()
    files = [images.jpeg_of(drawn, 85), without.jpeg_of(drawn, 85)]
    values = [images.read_pixels(io.BytesIO(files[0]))]
    values += [without.read_pixels(io.BytesIO(content)) for content in files]
    assert np.array_equal(values[0], values[1])
    assert np.abs(values[0].astype(int) - values[2]).mean() < 4
