"""`ulsam profile`, `candidates` and `info` as a user calls them, and the mistakes a user makes."""

import csv
import io
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ulsam
from ulsam.cli import main
from ulsam.model.build import build, make_spec, meta_model, save
from ulsam.model.spec import Edit
from ulsam.surgery.cost import cost

TINY_MODEL = "mobilenetv2_050"


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "wrens.safetensors"
    spec = make_spec(TINY_MODEL, ["Zaunkönig", "wren"], [Edit("replace", "14,17", 8)], size=64)
    save(build(spec)[0], spec, path)
    return path


def numbers(line: str) -> list[int]:
    return [int(word.replace(",", "")) for word in line.split() if word.replace(",", "").isdigit()]


def test_profile_prints_every_block_and_the_total(capsys):
    assert main(["profile", TINY_MODEL, "--size", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = cost(meta_model(make_spec(TINY_MODEL, [str(n) for n in range(1000)])), (3, 64, 64))
    assert len(lines) == len(found.rows) + 5  # heading, two rules, total, counting rule
    assert numbers(lines[-2]) == [found.params, found.macs, found.activations]
    assert "One 3x64x64 image. Counting rule 'exact'" in lines[-1]


def test_a_runs_folder_is_its_model(file, tmp_path, capsys):
    shutil.copy(file, tmp_path / "model.safetensors")
    for words in (["profile"], ["candidates"], ["info"]):
        said = []
        for model in (tmp_path, tmp_path / "model.safetensors"):
            assert main([*words, str(model)]) == 0
            said.append(capsys.readouterr().out)
        assert said[0] == said[1]
    assert main(["profile", str(tmp_path / "none")]) == 2
    (tmp_path / "none").mkdir()
    assert main(["profile", str(tmp_path / "none")]) == 2
    assert "is a folder without model.safetensors" in capsys.readouterr().err


def test_profile_with_edits_compares_with_the_base(capsys):
    arguments = ["--replace", "14,17", "--remove", "16", "--insert", "5:1", "--groups", "8", "--rule", "paper"]
    assert main(["profile", "mobilenetv2_100", *arguments]) == 0
    out = capsys.readouterr().out
    last = out.splitlines()[-1]
    params = 3_470_760 - 431_104 - 315_840 + 64
    assert last.startswith("mobilenetv2_100, replace 14,17 g=8; remove 16; insert 5:1 g=8: parameters ")
    assert f"parameters 3,470,760 -> {params:,} ({(params - 3_470_760) / 3_470_760:+.2%})" in last
    macs = 300_774_272 - 38_114_944 - 15_476_160 + 2 * 32 * 28 * 28
    assert f"MACs 300,774,272 -> {macs:,} ({(macs - 300_774_272) / 300_774_272:+.2%})" in last
    assert "blocks.2.0.ulsam  ULSAM" in out
    assert "Counting rule 'paper'" in out


def test_groups_and_form_reach_a_preset(capsys):
    preset = "ulsam_mobilenetv2_100_replace_14_17"
    assert main(["profile", preset, "--groups", "8", "--form", "released"]) == 0
    out = capsys.readouterr().out
    released = 5 * 96 + 3 * 8 + 5 * 160 + 3 * 8
    params = 3_504_872 - 118_272 - 320_000 + released
    assert numbers(out.splitlines()[-2])[0] == params


def test_profile_reads_a_file_and_adds_edits_to_its_own(capsys, file):
    assert main(["profile", str(file)]) == 0
    own = capsys.readouterr().out
    assert "One 3x64x64 image" in own
    assert sum(" ULSAM " in line for line in own.splitlines()) == 2
    assert main(["profile", str(file), "--insert", "3:1"]) == 0
    more = capsys.readouterr().out
    assert sum(" ULSAM " in line for line in more.splitlines()) == 3
    assert numbers(own.splitlines()[-2])[0] + 2 * 16 == numbers(more.splitlines()[-3])[0]


def test_profile_writes_a_csv(capsys, file, tmp_path):
    assert main(["profile", str(file), "--csv", str(tmp_path / "rows.csv")]) == 0
    with open(tmp_path / "rows.csv", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert {row["block"]: row["type"] for row in rows}["blocks.5.2"] == "ULSAM"
    total = numbers(capsys.readouterr().out.splitlines()[-2])
    assert [sum(int(row[key]) for row in rows) for key in ("params", "macs", "activations")] == total
    assert [rows[0][key] for key in ("block", "channels", "height", "width")] == ["conv_stem", "16", "32", "32"]


def test_profile_takes_presets_and_token_models(capsys):
    assert main(["profile", "ulsam_mobilenetv2_100_replace_14_17"]) == 0
    assert numbers(capsys.readouterr().out.splitlines()[-2])[1] == 300_774_272 - 38_114_944
    assert main(["profile", "vit_tiny_patch16_224"]) == 0
    assert "VisionTransformer" in capsys.readouterr().out  # its own tokens and embeddings have a row


def test_candidates_show_numbers_shapes_savings_and_groups(capsys):
    assert main(["candidates", "mobilenetv2_100"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:-1]] == ["4", "6", "7", "9", "10", "11", "13", "14", "16", "17"]
    row = next(line for line in lines if line.split()[:2] == ["17", "blocks.5.2"])
    assert row.split()[2:] == [
        "InvertedResidual", "160x7x7", "319,680", f"{319_680 / 3_504_872:.2%}", "15,460,480",
        f"{15_460_480 / 300_774_272:.2%}", "1,2,4,5,8,10,16,20,32,40,80,160",
    ]  # fmt: skip
    assert "3,504,872 parameters and 300,774,272 MACs" in lines[-1]


def test_candidates_of_a_model_without_numbers_say_so(capsys):
    assert main(["candidates", "resnet18", "--size", "64"]) == 0
    out = capsys.readouterr().out
    assert "layer1.0  BasicBlock" in out
    assert "layer1.0.conv1" not in out
    assert "layer numbers exist for MobileNet-V1 and V2 alone" in out
    assert main(["candidates", "resnet18", "--size", "64", "--leaves"]) == 0
    assert "layer1.0.conv1  " in capsys.readouterr().out


def test_candidates_of_a_file_leave_its_edits_out(capsys, file):
    assert main(["candidates", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:-1]] == ["4", "6", "7", "9", "10", "11", "13", "16"]


def test_info_prints_spec_size_formats_and_cost(capsys, file):
    assert main(["info", str(file)]) == 0
    out = capsys.readouterr().out
    model, spec = ulsam.load(file)
    found = cost(model, (3, 64, 64))
    assert str(spec) in out
    assert "replace 14,17 g=8" in out
    assert "2: Zaunkönig, wren" in out
    assert f"parameters  {found.params:,}\n" in out
    assert " float32, " in out and " int64" in out
    assert f"file        {file.stat().st_size:,} bytes" in out
    assert f"{found.macs:,} MACs" in out


@pytest.mark.parametrize(("rank", "message"), [("0", "ulsam: interrupted\n"), ("1", "")])
def test_ctrl_c_is_one_line_of_the_first_process(rank, message, monkeypatch, capsys):
    class Stopped(io.StringIO):
        def write(self, text: str) -> int:
            raise KeyboardInterrupt

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys, "stdout", Stopped())
    assert main(["candidates", "test_efficientnet"]) == 130
    assert capsys.readouterr().err == message


MISTAKES = [
    (["profile", "mobilenetv2_1000"], "timm has no model 'mobilenetv2_1000'; nearest: mobilenetv2_"),
    (["profile", "mobilenetv2_100.nope"], "timm has no model 'mobilenetv2_100.nope'"),
    (["profile", "hf-hub:timm/resnet18"], "timm has no model 'hf-hub:timm/resnet18'"),
    (["profile", TINY_MODEL, "--size", "0"], "--size must be 1 pixel or more, not 0"),
    (["profile", TINY_MODEL, "--size", "-3"], "--size must be 1 pixel or more, not -3"),
    (["profile", TINY_MODEL, "--size", "100000"], "input_size is C, H, W, each from 1 to 8192"),
    (["profile", "vit_tiny_patch16_224", "--size", "96"], "does not run on one image of [3, 96, 96]"),
    (["profile", TINY_MODEL, "--replace", "18"], "blocks.6.0 changes the shape"),
    (["profile", TINY_MODEL, "--replace", "99"], "there is no layer 99; this model has layers 1 to 18"),
    (["profile", TINY_MODEL, "--replace", "17:1"], "17:1 means behind layer 17, an insertion"),
    (["profile", "resnet18", "--replace", "14"], "layer number 14: the paper's numbers exist for MobileNet-V1 and V2"),
    (["profile", TINY_MODEL, "--replace", "blocks.9"], "no module is named 'blocks.9'; nearest names: blocks"),
    (["profile", TINY_MODEL, "--replace", ""], "cannot read the place ''"),
    (
        ["profile", TINY_MODEL, "--replace", "17", "--groups", "7"],
        "groups=7 does not divide 80 channels; valid: [1, 2, 4, 5",
    ),
    (
        ["profile", TINY_MODEL, "--replace", "14-17"],
        "cannot read the layer number in '14-17'; write numbers with commas",
    ),
    (["profile", TINY_MODEL, "--replace", "17", "--groups", "0"], "groups must be 1 or more, not 0"),
    (["profile", TINY_MODEL, "--replace", "17", "--form", "best"], "--form: 'best' is not one of equations, released"),
    (["profile", TINY_MODEL, "--groups", "8"], "--groups has nothing to act on: add --replace AT or --insert AT"),
    (["profile", TINY_MODEL, "--remove", "17", "--groups", "8"], "--groups has nothing to act on"),
    (["profile", "mobilenetv2_100", "--replace", "conv_head"], "valid places near it: blocks."),
    (["profile", TINY_MODEL, "--replace", "17", "--remove", "17"], "blocks.5.2 is a ULSAM layer already"),
    (["profile", TINY_MODEL, "--rule", "mine"], "--rule: 'mine' is not one of exact, paper"),
    (["profile", TINY_MODEL, "--csv", "no/such/folder/rows.csv"], "cannot write no/such/folder/rows.csv"),
    (["candidates", "vit_tiny_patch16_224"], "vit_tiny_patch16_224 has no block that takes and outputs the same"),
    (["profile", "model.pth"], "model.pth is neither timm's name of a model nor a model file, NAME.safetensors"),
    (["profile", "tests"], "tests is a folder without model.safetensors"),
    (["candidates", "nothing.safetensors"], "no model file nothing.safetensors"),
    (["info", "nothing.safetensors"], "no model file nothing.safetensors"),
    (["info", "."], ". is a folder without model.safetensors"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(call) for call, _ in MISTAKES])
def test_a_mistake_gives_one_line_and_status_2(arguments, message, capsys):
    assert_one_line(arguments, message, capsys)


def assert_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    caught = capsys.readouterr()
    assert caught.err.startswith("ulsam: error: ")
    assert message in caught.err
    assert caught.err.count("\n") == 1 and caught.err.endswith("\n")


@pytest.mark.parametrize("command", ["info", "profile", "candidates"])
def test_files_that_are_no_model_files_give_one_line(command, file, tmp_path, capsys):
    whole = file.read_bytes()
    cut, empty, pickled, plain = (tmp_path / f"{name}.safetensors" for name in ("cut", "empty", "pickled", "plain"))
    cut.write_bytes(whole[: len(whole) // 2])
    empty.write_bytes(b"")
    torch.save({"a": torch.ones(1)}, pickled)
    save_file({"a": torch.ones(1)}, plain)
    for path in (cut, empty, pickled):
        assert_one_line([command, str(path)], f"{path} is no safetensors file, or is cut off", capsys)
    assert_one_line([command, str(plain)], f"{plain} holds weights without a spec", capsys)


@pytest.mark.parametrize("arguments", [["profile"], ["profile", TINY_MODEL, "--size", "big"], ["info"], ["nonsense"]])
def test_a_call_of_the_wrong_form_gets_one_line(arguments, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("ulsam: error: ")
    assert error.count("\n") == 1 and "--help" in error


@pytest.mark.parametrize("command", ["profile", "candidates", "info", "paper"])
def test_help_names_every_option(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    options = {"profile": ["--replace AT", "--groups G", "--rule", "--csv FILE"], "candidates": ["--leaves", "--size"]}
    assert all(option in out for option in options.get(command, []))
