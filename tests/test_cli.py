"""What all commands have in common: fast help with an example, one-line mistakes that suggest, `--json`, completion."""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from tiny import SETTINGS, draw_splits, options
from ulsam.base.errors import UlsamError
from ulsam.cli import COMMANDS, common, export, main, parse, profile, slim
from ulsam.cli.parser import GUIDE, parser
from ulsam.cli.train import FROM_RANDOM
from ulsam.deploy.export import Format
from ulsam.layer.make_layer import Layer
from ulsam.layer.ulsam import Form
from ulsam.study.slim import RESERVED_SETTINGS
from ulsam.study.slim_latency import LatencyEngine
from ulsam.surgery.cost import Rule

HELP_OF_ALL = """
import contextlib, os, shlex, sys
from ulsam.cli import COMMANDS, main, parse
from ulsam.cli.parser import parser

verbs = parser(COMMANDS).verbs
for verb, one in verbs.items():
    with contextlib.redirect_stdout(open(os.devnull, "w")), contextlib.suppress(SystemExit):
        main([verb, "--help"])
    for line in one.epilog.splitlines()[1:]:
        parse(shlex.split(line.partition(" > ")[0], comments=True)[1:])
    heavy = {"torch", "torchvision", "timm", "numpy", "PIL"} & sys.modules.keys()
    assert not heavy, (verb, heavy)
print(len(verbs))
"""


def test_help_and_parsing_import_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", HELP_OF_ALL], capture_output=True, text=True)
    assert done.stderr == "" and int(done.stdout) == len(COMMANDS)


def help_of(verb: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("verb", COMMANDS)
def test_help_ends_with_an_example_of_the_command(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    text, _, examples = help_of(verb, capsys).partition("\nexample:\n")
    assert text.startswith(f"usage: ulsam {verb} [options]")
    lines = [shlex.split(line, comments=True) for line in examples.splitlines()]
    assert lines and all(words[:2] == ["ulsam", verb] for words in lines)


def test_options_of_training_are_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of("train", capsys)
    titles = ["data", "distillation", "image size and augmentation", "optimization", "machine", "measuring and saving"]
    places = [text.index(f"\n{title}:\n") for title in titles]
    assert places == sorted(places)
    assert places[0] < text.index("--workers N") < places[1] < text.index("--teacher FILE") < places[2]
    assert places[3] < text.index("--lr X") < places[4]


def test_without_a_command_there_is_a_short_guide(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert text == GUIDE + "\n" and text.count("\n") < 20
    lines = [line.split()[1:] for line in text.splitlines() if line.startswith("  ulsam ")]
    assert [parse(words).command for words in lines] == ["demo", "candidates", "train", "slim", "explain", "export"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trian data", "no command 'trian'; did you mean train? See ulsam --help"),
        ("nonsense", "no command 'nonsense'; see ulsam --help"),
        ("--versoin", "no option --versoin; did you mean --version? See ulsam --help"),
        ("--version=2", "--version: ignored explicit argument '2'; see ulsam --help"),
        ("train data --batch_size 3", "no option --batch_size; did you mean --batch-size? See ulsam train --help"),
        ("train data --no-reconstrct", "no option --no-reconstrct; did you mean --no-reconstruct?"),
        ("train data --epoch=3", "no option --epoch; did you mean --epochs? See ulsam train --help"),
        ("compare data --ou there", "no option --ou; did you mean --out? See ulsam compare --help"),
        ("train data -x", "no option -x; see ulsam train --help"),
        ("train data --zzz", "no option --zzz; see ulsam train --help"),
        (
            "train data --sched ply",
            "--sched: 'ply' is not one of cosine, tanh, poly, step, multistep, constant; did you mean poly",
        ),
        ("train data --amp zzz", "--amp: 'zzz' is not one of auto, none, bf16, fp16; see ulsam train --help"),
        ("train data -b 1.5", "-b/--batch-size: must be a whole number, not '1.5'; see ulsam train --help"),
        ("train data --lr fast", "--lr: must be a number, not 'fast'; see ulsam train --help"),
        ("export m --to onxx", "--to: 'onxx' is not one of onnx, openvino, executorch, coreml, tflite; did you mean"),
        ("prepare food01 a b", "name: 'food01' is not one of food101, dogs, cub200, csv; did you mean food101?"),
        ("bench m --batch a", "--batch: 'a' is no list of numbers such as 1,2; see ulsam bench --help"),
        ("info a b", "unexpected argument 'b'; see ulsam info --help"),
        ("eval m", "the following arguments are required: DATA; see ulsam eval --help"),
    ],
)
def test_a_mistake_is_one_line_that_suggests(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.startswith(f"ulsam: error: {message}") and found.err.count("\n") == 1


def test_choices_are_those_of_the_library() -> None:
    assert get_args(Layer) == common.LAYERS
    assert set(get_args(Form)) - {"folded"} == set(common.FORMS)  # folded layers do not train
    assert get_args(Format) == export.FORMATS
    assert get_args(Rule) == profile.RULES
    assert get_args(LatencyEngine) == slim.ENGINES
    assert {"data", "edits", *slim.RESERVED_SETTINGS} == set(RESERVED_SETTINGS)


def test_short_options_are_timms() -> None:
    for verb in ("train", "eval"):
        args = parse([verb, "m", *["data"] * (verb == "eval"), "-b", "64", "-j4"])
        assert (args.batch_size, args.workers) == (64, 4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """A folder with data and a run of `ulsam train --json`; what it printed to stdout, and to stderr."""
    root = tmp_path_factory.mktemp("cli")
    draw_splits(root / "data", train=8, val=2)
    words = ["train", str(root / "data"), "--insert", "blocks.2", *options({**SETTINGS, "epochs": 1})]
    words = [sys.executable, "-m", "ulsam", *words, "--out", str(root / "run"), "--json"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    return root, json.loads(line), done.stderr


def test_train_prints_its_summary_as_json_and_its_progress_to_stderr(trained: tuple[Path, Any, str]) -> None:
    root, summary, progress = trained
    assert summary == json.loads((root / "run" / "summary.json").read_text())
    words = [line.split()[0] for line in progress.splitlines() if line[:1].isalpha()]
    assert words[0] == "start" and {"data", "model", "epoch"} <= set(words)


def test_training_from_random_weights_says_so_first(
    trained: tuple[Path, Any, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, _, progress = trained
    assert progress.splitlines()[0] == FROM_RANDOM and progress.count(FROM_RANDOM) == 1
    words = [
        "--insert",
        "blocks.2",
        "--weights",
        str(root / "run" / "model.safetensors"),
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(["train", str(root / "data"), *words, *options({**SETTINGS, "epochs": 1})]) == 0
    assert capsys.readouterr().out.startswith("data ")


KEYS = {
    "info MODEL": {"spec", "cost", "numbers", "bytes"},
    "candidates MODEL": {"layer", "name", "type", "shape", "params_saved", "macs_saved", "groups"},
    "profile MODEL --remove blocks.3.0.se": {"params", "macs", "base", "blocks"},
    "eval MODEL DATA -j 0": {"split", "scores", "unreadable", "cost", "spec"},
    "predict MODEL DATA/val": {"path", "classes", "error"},
    "inspect MODEL DATA/val": {"layers", "unreadable", "spec"},
    "explain MODEL DATA/val/class0 --out ROOT/explained": {"page", "images", "known", "wrong", "unreadable"},
    "report RUN --out ROOT/report.html": {"page", "runs", "notes"},
    "export MODEL --out ROOT/m.onnx": {"file", "format", "bytes", "parity"},
    "push RUN ROOT/hub": {"model", "target"},
    "birds ROOT/birds --classes 2 --train 1 --val 1": {"folder", "classes", "train", "val", "size", "seed"},
    "doctor": {"torch", "threads", "backends"},
}


@pytest.mark.parametrize(("words", "keys"), KEYS.items(), ids=[words.split()[0] for words in KEYS])
def test_json_is_objects_on_stdout_and_nothing_else(
    words: str, keys: set[str], trained: tuple[Path, Any, str], capfd: pytest.CaptureFixture[str]
) -> None:
    root = trained[0]
    places = {"MODEL": "ROOT/run/model.safetensors", "DATA": "ROOT/data", "RUN": "ROOT/run"}
    for name, place in places.items():
        words = words.replace(name, place)
    assert main([*words.replace("ROOT", str(root)).split(), "--json"]) == 0
    found = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert found and all(keys <= set(entry) for entry in found)


def test_every_command_that_has_a_result_has_json() -> None:
    for verb, one in parser(COMMANDS).verbs.items():
        (action,) = [action for action in one._actions if "--json" in action.option_strings] or [None]
        assert (verb == "completion") if action is None else (action.nargs == 0)


COMPLETE = """
source "$1"
shift
COMP_WORDS=("$@")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_shtab_ulsam
echo "${COMPREPLY[@]}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_options_values_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "models").mkdir()
    for words, expected in {
        "tr": "train",
        "train --batch": "--batch-size",
        "train --sched t": "tanh",
        "export --to o": "onnx openvino",
        "prepare d": "dogs",
        "info mo": "model.safetensors models",
        "train --out mo": "models",
    }.items():
        call = ["bash", "-c", COMPLETE, "bash", "./script", "ulsam", *words.split()]
        done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path)
        assert (sorted(done.stdout.split()), done.stderr) == (expected.split(), ""), words


def test_zsh_has_a_script_too_and_without_shtab_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("#compdef ulsam\n")
    monkeypatch.setitem(sys.modules, "shtab", None)  # is not installed
    assert main(["completion", "zsh"]) == 2
    assert capsys.readouterr().err.endswith("shtab, which is not installed: pip install 'ulsam[completion]'\n")


def test_parse_raises_what_main_prints() -> None:
    with pytest.raises(UlsamError, match="no command; see ulsam --help"):
        parse([])
    assert isinstance(parse(["doctor"]), argparse.Namespace)
