"""`import ulsam`: lazy, typed, and without a public function that needs a private type."""

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from mypy import api

import ulsam
from tiny import SETTINGS, TINY_MODEL, draw_splits

HOME = ulsam._HOME  # type: ignore[attr-defined]
NAMES = sorted(HOME)


def test_nothing_heavy_is_imported_before_it_is_used() -> None:
    code = (
        "import sys, ulsam; heavy = {'torch', 'timm', 'numpy', 'tqdm'}; before = heavy & set(sys.modules); "
        "ulsam.ULSAM; print(sorted(before), 'torch' in sys.modules, 'timm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[] True False\n", "")


def test_the_stub_and_the_table_agree() -> None:
    stub = ast.parse(Path(ulsam.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    typed = {name.asname: (node.module, name.name) for node in imports for name in node.names}
    assert typed == {name: (home, name) for name, home in HOME.items()}
    assert dir(ulsam) == sorted(["__version__", *HOME])


@pytest.mark.slow  # with an empty cache mypy reads all of PyTorch
def test_every_name_has_a_type(tmp_path: Path) -> None:
    lines = ["import ulsam", *(f"reveal_type(ulsam.{name})" for name in NAMES), "ulsam.no_such_name"]
    printed = check_types(tmp_path / "user.py", lines)
    revealed = dict(re.findall(r"user\.py:(\d+): note: Revealed type is \"(.*)\"", printed))
    types = {name: revealed[str(number)] for number, name in enumerate(NAMES, start=2)}
    for name, kind in types.items():
        assert kind not in ("Any", "builtins.object") and not kind.endswith("-> Any"), (name, kind)
    assert f'user.py:{len(lines)}: error: Module has no attribute "no_such_name"' in printed
    assert "-> ulsam.surgery.cost.Cost" in types["cost"]


@pytest.mark.slow  # with an empty cache mypy reads all of PyTorch
def test_the_settings_of_training_are_checked(tmp_path: Path) -> None:
    printed = check_types(
        tmp_path / "user.py",
        [
            "import ulsam",
            "settings: ulsam.TrainSettings = {'edits': ['remove 14'], 'lr': 1}",
            "ulsam.train('birds', 'run', model='mobilenetv2_100', **settings)",
            "ulsam.train('birds', 'run', epoch=3)",
            "ulsam.train('birds', 'run', epochs='3')",
            "ulsam.train('birds', 'run', sampler='odd')",
        ],
    )
    errors = re.findall(r"user\.py:(\d+): error: (.*?)  \[", printed)
    assert [(int(line), text.replace('"', "")) for line, text in errors] == [
        (4, "Unexpected keyword argument epoch for train; did you mean epochs?"),
        (5, "Argument epochs to train has incompatible type str; expected int"),
        (6, "Argument sampler to train has incompatible type Literal['odd']; expected Literal['shuffle', 'balanced']"),
    ]


@pytest.mark.slow  # with an empty cache mypy reads all of PyTorch
def test_the_keys_of_results_are_known(tmp_path: Path) -> None:
    types = {
        "ulsam.resume('run')": "TrainSummary",
        "ulsam.train('birds', 'run')": "TrainSummary",
        "ulsam.train('birds', 'run')['scores']['top1']": "float",
        "ulsam.train('birds', 'run')['epochs'][0]['val_top1']": "float | None",
        "ulsam.compare('birds', [], 'out')": "CompareResult",
        "ulsam.compare('birds', [], 'out')['arms'][0]['latency']": "LatencyEntry",
        "ulsam.slim('model', 'birds', 'out')": "SlimResult",
        "ulsam.slim('model', 'birds', 'out')['chosen']['blocks']": "list[str]",
        "ulsam.slim('model', 'birds', 'out')['result']['slimmed']": "ScoreEntry",
    }
    lines = ["import ulsam", *(f"reveal_type({expression})" for expression in types)]
    printed = check_types(tmp_path / "user.py", [*lines, "ulsam.train('birds', 'run')['score']"])
    revealed = re.findall(r"user\.py:\d+: note: Revealed type is \"(.*)\"", printed)
    for kind, wanted in zip(revealed, types.values(), strict=True):
        assert wanted in kind.replace("builtins.", ""), (kind, wanted)
    assert 'error: TypedDict "TrainSummary" has no key "score"' in printed


def test_the_types_of_settings_are_those_of_the_config() -> None:
    config = typing.get_type_hints(ulsam.TrainConfig)
    assert [*config] == [field.name for field in dataclasses.fields(ulsam.TrainConfig)]
    del config["data"], config["model"]  # arguments of their own
    assert typing.get_type_hints(ulsam.TrainSettings) == config


def test_a_wrong_setting_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    misspelt: dict[str, typing.Any] = {"epoch": 3}
    with pytest.raises(ulsam.UlsamError, match=r"^unknown setting 'epoch'; did you mean epochs\?$"):
        ulsam.train("birds", tmp_path / "run", **misspelt)
    with pytest.raises(ulsam.UlsamError, match=r"^`epochs` must be a whole number, not '3'$"):
        ulsam.train("birds", tmp_path / "run", epochs="3")  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_no_public_function_needs_a_private_type() -> None:
    for name in NAMES:
        value = getattr(ulsam, name)
        if not inspect.isfunction(value):
            continue
        hints = typing.get_type_hints(value, {**vars(sys.modules[value.__module__]), **_late_names()})
        for kind in hints.values():
            ours = {part.__name__ for part in _classes(kind) if part.__module__.startswith("ulsam.")}
            assert ours <= set(NAMES), (name, ours)


def test_from_training_to_a_deployed_model(tmp_path: Path) -> None:
    """The functions take one another's results, as files or in memory."""
    data = draw_splits(tmp_path / "data")
    with pytest.raises(ulsam.UlsamError, match="timm has no model 'test_efficientnat'; nearest: test_efficientnet"):
        ulsam.train(data, tmp_path / "none", model="test_efficientnat")
    config = ulsam.TrainConfig(**{**SETTINGS, "data": str(data), "epochs": 3})
    summary = ulsam.train(config, tmp_path / "run", model=TINY_MODEL, epochs=1, edits=["insert blocks.1 g=4"])
    assert (summary["config"]["epochs"], summary["config"]["edits"]) == (1, ["insert blocks.1 g=4"])
    file = tmp_path / "run" / "model.safetensors"
    model, spec = ulsam.load(file)
    scores = ulsam.evaluate(file, data, workers=0).scores
    assert (scores.images, scores.top1) == (15, summary["scores"]["top1"])
    assert ulsam.evaluate(model, data, spec=spec, workers=0).scores == scores
    ulsam.save(model, spec, tmp_path / "again.safetensors")
    paths = sorted((data / "val" / "class1").iterdir())
    from_folder = list(ulsam.predict(tmp_path / "again.safetensors", [data / "val" / "class1"], top=1))
    assert from_folder == list(ulsam.predict(model, paths, spec=spec, top=1))
    assert [found.path for found in from_folder] == list(map(str, paths))
    with pytest.raises(ulsam.UlsamError, match="needs its `spec`"):
        ulsam.evaluate(model, data)
    with pytest.raises(ulsam.UlsamError, match="holds its own spec: leave `spec` out"):
        ulsam.predict(file, paths, spec=spec)


def check_types(file: Path, lines: list[str]) -> str:
    """What mypy prints about a file of these lines."""
    file.write_text("\n".join(lines))
    printed, wrong, _ = api.run([str(file), "--cache-dir", str(Path.cwd() / ".mypy_cache"), "--no-error-summary"])
    assert not wrong
    return printed


def _late_names() -> dict[str, object]:
    """Names that annotations use under TYPE_CHECKING alone."""
    from torch import nn

    return {"nn": nn, "ModelSpec": ulsam.ModelSpec}


def _classes(kind: object) -> list[type]:
    parts = [part for inner in typing.get_args(kind) for part in _classes(inner)]
    return [*parts, kind] if isinstance(kind, type) else parts
