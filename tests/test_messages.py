"""An error names arguments to who calls the library, and options to who calls the command line."""

import argparse
import ast
import re
from pathlib import Path
from typing import Any

import pytest

import ulsam
from tiny import SETTINGS, draw_splits, options
from ulsam.base.errors import UlsamError
from ulsam.cli import main
from ulsam.cli.output import in_flags
from ulsam.study.slim import slim
from ulsam.training.train import train

SOURCES = Path(ulsam.__file__).parent


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_splits(tmp_path_factory.mktemp("data"), train=4, val=2)


@pytest.mark.parametrize(
    ("settings", "argument", "flag"),
    [
        ({"batch_size": 100}, "use `batch_size=12` or less", "use --batch-size 12 or less"),
        ({"freeze": ["*"]}, "leave something to train out of `freeze`", "out of --freeze"),
        ({"amp": "fp16"}, "`amp=fp16` needs a CUDA GPU", "--amp fp16 needs a CUDA GPU"),
        (
            {"images_for_reconstruction": "birds"},
            "`images_for_reconstruction` has nothing to reconstruct",
            "--images-for-reconstruction has nothing to reconstruct: it needs edits, the base model's weights, "
            "--reconstruct and --reconstruct-images above 0",
        ),
        ({"device": "toaster"}, "; use `device=cpu`", "; use --device cpu"),
        ({"lr": 1e30, "clip_grad": None}, "try a lower `lr`, `clip_grad=1`,", "try a lower --lr, --clip-grad 1,"),
    ],
    ids=str,
)
def test_training(
    settings: dict[str, Any], argument: str, flag: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = {name: value for name, value in {**SETTINGS, "batch_size": 4, **settings}.items() if value is not None}
    with pytest.raises(UlsamError) as caught:
        train(data, tmp_path / "library", **chosen)
    assert argument in str(caught.value) and "--" not in str(caught.value)
    assert main(["train", str(data), "--out", str(tmp_path / "command"), *options(chosen)]) == 2
    assert flag in capsys.readouterr().err


def test_a_folder_that_is_taken(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UlsamError, match=r"is not an empty folder: resume it with `ulsam.resume`, name one"):
        train(data, tmp_path, **SETTINGS)
    assert main(["train", str(data), "--out", str(tmp_path), *options(SETTINGS)]) == 2
    assert "is not an empty folder: resume it with --resume, name one" in capsys.readouterr().err


def test_slimming(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UlsamError, match="give exactly one budget: `macs`, `params` or `latency`"):
        slim("model.safetensors", str(data), tmp_path)
    assert main(["slim", "model.safetensors", str(data), "--out", str(tmp_path)]) == 2
    assert "give exactly one budget: --macs, --params or --latency" in capsys.readouterr().err


def test_words_of_a_command() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model_file", metavar="MODEL")
    parser.add_argument("-o", "--out")
    parser.add_argument("--to")
    parser.add_argument("--dynamic-size", action="store_true")
    parser.add_argument("--no-train", dest="fine_tune", action="store_false")
    parser.add_argument("--reconstruct", action=argparse.BooleanOptionalAction)
    for message, expected in {
        "see `out`": "see --out",
        "try `to=onnx`": "try --to onnx",
        "`model_file` is no model": "MODEL is no model",
        "`dynamic_size=True`: leave it out": "--dynamic-size: leave it out",
        "use `fine_tune=False`": "use --no-train",
        "`reconstruct=True` or `reconstruct=False`": "--reconstruct or --no-reconstruct",
        "`out=a folder` is there": "--out a folder is there",
        "write it by `ulsam.export`": "write it by ulsam export",
        "`weights` are not an option here": "`weights` are not an option here",
    }.items():
        assert in_flags(message, parser) == expected


@pytest.mark.parametrize(
    "words", [["info", "x" * 5000], ["train", "data", "--" + "y" * 5000], ["predict", "m", "z" * 999]]
)
def test_a_line_is_never_longer_than_a_screen_holds(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and len(error) <= 320


def test_no_error_of_the_library_names_an_option() -> None:
    for file in SOURCES.rglob("*.py"):
        if "cli" in file.relative_to(SOURCES).parts:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            texts = (
                [part for part in ast.walk(node) if isinstance(part, ast.Constant)]
                if isinstance(node, ast.Raise)
                else []
            )
            named = [
                text.value
                for text in texts
                if isinstance(text.value, str) and re.search(r"(^|[ (])--[a-z]", text.value)
            ]
            assert not named or "HTTPException" in ast.unparse(node), (file, named)
