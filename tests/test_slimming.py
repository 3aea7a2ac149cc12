"""Slimming from a model file to the slimmed model: its report, resuming it, and what is refused."""

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from slimming_runs import CLASSES, SETTINGS, SIZE, kept, save_untrained
from tiny import draw_splits, options
from ulsam.base.errors import UlsamError
from ulsam.cli import main
from ulsam.data.loading import eval_loader
from ulsam.data.opening import open_data
from ulsam.model.build import build, load, make_spec, read_spec, save
from ulsam.model.spec import Edit
from ulsam.study.slim import _result, fine_tuning, slim
from ulsam.surgery.cost import cost
from ulsam.training.config import TrainConfig
from ulsam.training.evaluate import ALONE, evaluate_batches, spec_transform
from ulsam.training.parts import open_images, spec_of_run

AT = "13,14,16,17"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_splits(tmp_path_factory.mktemp("data"), train=12, val=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("model") / "model.safetensors")


@pytest.fixture(scope="module")
def slimmed(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a slimming that nothing happened to."""
    out = tmp_path_factory.mktemp("slimmed") / "out"
    slim(model, str(data), out, params=0.85, at=AT, settings=SETTINGS)
    return out


def test_the_slimmed_model_keeps_to_the_budget_and_is_reported(model, data, slimmed, capsys):
    found = kept(slimmed)
    loaded, spec = load(slimmed / "run" / "model.safetensors")
    original, _ = load(model)
    assert cost(loaded, SIZE).params <= 0.85 * cost(original, SIZE).params
    assert spec.edits == (Edit("replace", ",".join(found["chosen"]["blocks"])),)
    scores = {tuple(entry["blocks"]): entry["loss"] for entry in found["measured"]}
    assert scores[tuple(found["chosen"]["blocks"])] == min(scores[tuple(rival)] for rival in found["chosen"]["rivals"])
    settings = yaml.safe_load((slimmed / "run" / "config.yaml").read_text())
    assert settings["teacher"] == settings["weights"] == str(model)
    assert settings["distill"] == 0.5
    result = found["result"]
    assert result["slimmed"] == json.loads((slimmed / "run" / "summary.json").read_text())["scores"]
    assert result["original"]["images"] == result["slimmed"]["images"] == 9


def test_the_original_is_measured_in_the_precision_of_the_run(model, data, slimmed):
    """Whose settings may say auto, where the run then chose."""
    summary = json.loads((slimmed / "run" / "summary.json").read_text())
    summary["config"] |= {"amp": "bf16", "layout": "channels_last"}
    loaded, seen = load(model)
    found = _result(loaded, TrainConfig.from_mapping({**summary["config"], "amp": "auto", "layout": "auto"}), summary)
    batches = eval_loader(open_data(str(data))[1], spec_transform(seen), batch_size=8, workers=0, device=ALONE.device)
    scores = [evaluate_batches(load(model)[0], batches, 3, amp=amp).loss for amp in (torch.bfloat16, None)]
    assert found["original"]["loss"] == pytest.approx(scores[0], rel=1e-6) != scores[1]


def test_a_finished_slimming_is_reported_again_and_nothing_is_done_twice(model, data, slimmed, capsys):
    before = {
        path: path.stat().st_mtime_ns for path in slimmed.rglob("*") if path.name not in ("slim.json", "train.yaml")
    }
    figures = kept(slimmed)
    argv = ["slim", str(model), str(data), "--out", str(slimmed), "--params", "0.85", "--at", AT, *options(SETTINGS)]
    assert main(argv) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert kept(slimmed) == figures
    assert f"{slimmed}/run/model.safetensors" in capsys.readouterr().out
    for change, message in [
        (["--params", "0.8"], "other settings: share was 0.85 and is 0.8 now"),
        (["--groups", "2"], "other settings: layer was {} and is {'groups': 2} now"),
        (["--epochs", "2"], "run holds a run with epochs 1, not 2: put that back"),
    ]:
        assert main([*argv, *change]) == 2
        assert message in capsys.readouterr().err
    at = argv.index("--clip-grad")
    assert main(argv[:at] + argv[at + 2 :]) == 2
    assert "run holds a run with clip_grad 9.0, not None: put that back" in capsys.readouterr().err
    assert kept(slimmed) == figures
    assert yaml.safe_load((slimmed / "train.yaml").read_text())["epochs"] == 1


@pytest.mark.slow
def test_what_another_version_wrote_is_refused_in_one_line(model, data, slimmed, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    found = kept(slimmed)
    del found["budget"]["reconstruct_sets"]
    (out / "slim.json").write_text(json.dumps(found))
    argv = ["slim", str(model), str(data), "--out", str(out), "--params", "0.85", "--at", AT, *options(SETTINGS)]
    assert main(argv) == 2
    line = f"{out / 'slim.json'} is of another version of ulsam, which knew no reconstruct_sets: choose another --out"
    assert capsys.readouterr().err.splitlines()[-1] == f"ulsam: error: {line}"


def test_a_model_with_edits_is_slimmed_further(data, tmp_path, capsys):
    spec = make_spec("mobilenetv2_035", CLASSES, [Edit("replace", "17", 2)], size=32)
    save(build(spec)[0], spec, tmp_path / "model.safetensors")
    argv = ["slim", str(tmp_path / "model.safetensors"), str(data), "--macs", "0.97", "--layer", "eca", "--no-train"]
    out = tmp_path / "the out"
    assert main([*argv, "--at", "14,16", "--out", str(out), *options(SETTINGS)]) == 0
    chosen = kept(out)["chosen"]["blocks"]
    config = TrainConfig.from_mapping(yaml.safe_load((out / "train.yaml").read_text()))
    assert config.edits == ["replace 17 g=2", f"replace {','.join(chosen)} layer=eca"]
    model, notes = build(spec_of_run(config, CLASSES), weights=config.weights)
    assert notes == []
    original = load(tmp_path / "model.safetensors")[0]
    assert torch.equal(model.blocks[5][2].pointwise.weight, original.blocks[5][2].pointwise.weight)
    assert (
        capsys.readouterr().out.splitlines()[-1] == f"next    ulsam train --config '{out}/train.yaml' --out '{out}/run'"
    )


def wait_for(event: Any) -> None:
    end = time.monotonic() + 120
    while not event():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_and_stopped_it_resumes_to_the_same_end(model, data, slimmed, interpreter, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log.txt"
    argv = ["slim", str(model), str(data), "--out", str(out), "--params", "0.85", "--at", AT]
    argv += options({**SETTINGS, "save_seconds": 0})
    pid = interpreter.start(argv, log)
    wait_for(lambda: (out / "slim.json").exists() and len(kept(out).get("measured", [])) >= 3)
    assert interpreter.kill(pid) == -signal.SIGKILL
    measured = kept(out)["measured"]
    pid = interpreter.start(argv, log)
    wait_for((out / "run" / "checkpoint.pt").exists)
    code = interpreter.kill(pid, signal.SIGINT)
    assert kept(out)["measured"][: len(measured)] == measured
    assert code == 130, log.read_text()
    assert f"resume with the same arguments and --out {out}" in log.read_text()
    assert interpreter.run(argv, log) == 0
    mine, theirs = kept(out), kept(slimmed)
    assert mine["measured"] == theirs["measured"]
    assert mine["chosen"] == theirs["chosen"]
    assert mine["result"] == theirs["result"]
    models = [(folder / "run" / "model.safetensors").read_bytes() for folder in (out, slimmed)]
    assert models[0] == models[1]


@pytest.mark.slow
def test_the_images_that_the_original_was_not_trained_on_stay_held_out(model, data, tmp_path, logged):
    """Class folders, where a run holds images out by its seed."""
    run = tmp_path / "run"
    run.mkdir()
    beside, alone = Path(shutil.copy(model, run / "model.safetensors")), Path(shutil.copy(model, tmp_path))
    before = TrainConfig(str(data / "train"), seed=3, val_fraction=0.5)
    (run / "config.yaml").write_text(before.to_yaml())
    trained_on = set(open_images(before)[0].names)
    options = {"at": "17", "macs": 0.97, "fine_tune": False}
    for number, (path, given) in enumerate([(beside, {}), (beside, {"seed": 7}), (alone, {})]):
        slim(path, before.data, tmp_path / f"out{number}", settings={**SETTINGS, **given}, **options)
        said = "the held-out images may be ones that" in logged()
        config = TrainConfig.from_mapping(yaml.safe_load((tmp_path / f"out{number}" / "train.yaml").read_text()))
        measured = set(open_images(config)[1].names)
        assert said == bool(measured & trained_on) == (path == alone)
    spec = read_spec(model)
    assert fine_tuning(beside, spec, before.data, {"split_seed": 5, "val_fraction": 0.1}).split_seed == 5
    assert fine_tuning(beside, spec, str(data), {"val_split": "val"}).val_fraction is None


# mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "give exactly one budget: --macs, --params or --latency, a share such as 0.75"),
        ("--macs 0.8 --params 0.8", "give exactly one budget"),
        ("--macs 1", "--macs is the share of the model's own MACs to keep, between 0 and 1, both excluded, e.g. 0.75"),
        ("--latency 1.5", "--latency is the share of the model's own time to keep"),
        ("--macs nan", "between 0 and 1"),
        (
            "--macs 0.1",
            "all 10 blocks that save MACs, replaced, leave 0.587 of the MACs: --macs must be that or more, not 0.1",
        ),
        ("--params 0.9 --at 17 --groups 3", "has no block to replace: blocks.5.2 is left out: 3 groups do not divide"),
        ("--macs 0.9 --at 15", "blocks.5.0 cannot be replaced: `ulsam candidates` lists the blocks that can"),
        ("--macs 0.9 --at blocks.77", "no module is named 'blocks.77'"),
        ("--macs 0.9 --layer se --groups 2", "groups and form are for ULSAM alone"),
        ("--macs 0.9 --images 0", "--images must be 1 or more, not 0"),
        ("--latency 0.9 --engine tensorrt", "--engine: 'tensorrt' is not one of eager, onnxruntime"),
        ("--macs 0.9 --lr 0", "--lr must be above 0"),
        ("--macs 0.9 --freeze layer9", "no module is named 'layer9'"),
        (
            "--macs 0.9 --no-reconstruct --images-for-reconstruction full",
            "--images-for-reconstruction has nothing to reconstruct, as the other settings switch it off",
        ),
        ("--macs 0.9 --out full", "full is not an empty folder: it holds no slim.json to resume from; name one"),
        ("--macs 0.9 --out taken", "taken/slim.json is not what slimming wrote: choose another --out"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(model, data, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "slim.json").write_text("{}")
    assert main(["slim", str(model), str(data), *options(SETTINGS), *words.split()]) == 2
    printed = capsys.readouterr().err.splitlines()
    assert message in printed[-1]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["full", "letter.txt", "slim.json", "taken"]


def test_other_classes_are_refused(model, data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "data")
    for split in ("train", "val"):
        (tmp_path / "data" / split / "class1").rename(tmp_path / "data" / split / "wren")
    assert main(["slim", str(model), str(tmp_path / "data"), "--macs", "0.9", "--out", str(tmp_path / "out")]) == 2
    assert (
        f"has other classes than {model} was trained on: 'class2' where the model has 'class1'"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def test_settings_that_slimming_decides_are_refused(model, data, tmp_path):
    with pytest.raises(UlsamError, match="slimming decides teacher: leave it out of the settings"):
        slim(model, str(data), tmp_path / "out", macs=0.9, settings={"teacher": str(model)})


def test_a_model_without_a_place_is_refused(data, tmp_path, capsys):
    spec = make_spec("test_vit", CLASSES, model_args={"img_size": 32}, size=32)
    save(build(spec)[0], spec, tmp_path / "vit.safetensors")
    assert main(["slim", str(tmp_path / "vit.safetensors"), str(data), "--macs", "0.9", *options(SETTINGS)]) == 2
    assert "has no block to replace that takes and outputs the same feature map [B, C, H, W]" in capsys.readouterr().err
