"""What a comparison does when runs fail, settings are wrong, or data has changed."""

import dataclasses
import json
import logging
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from comparing import ARMS, RESOLVED, run_here, summaries
from tiny import draw_splits, options
from ulsam.base.errors import UlsamError
from ulsam.base.files import make_folder
from ulsam.base.locks import take_lock
from ulsam.cli import main
from ulsam.study.arms import Arm, parse_arms
from ulsam.study.comparison_folder import ComparisonFolder
from ulsam.study.epoch_lines import EpochLines
from ulsam.study.grid import Failed, Grid, Run
from ulsam.study.identity import data_digest, file_digests
from ulsam.study.launch import LocalLauncher, lock_of, run_all
from ulsam.training.config import TrainConfig
from ulsam.training.parts import open_images
from ulsam.training.summary import write_metrics
from ulsam.training.train import train
from ulsam.training.trained_on import seen_before


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = draw_splits(tmp_path_factory.mktemp("data"), train=16, val=12, noise=110)
    next((root / "val" / "class1").iterdir()).write_bytes(b"no image")  # left out of every measurement
    return root


@pytest.mark.parametrize("what", ["longer", "renamed", "in another split", "one more", "another class"])
def test_data_that_changed_is_refused_before_training(what: str, tmp_path: Path) -> None:
    data = draw_splits(tmp_path / "data", train=3, val=2)
    shared = TrainConfig.from_mapping({**RESOLVED, "data": str(data)})
    grid, comparison = Grid(parse_arms(ARMS), shared), ComparisonFolder(tmp_path / "out")
    comparison.root.mkdir()
    comparison.write("grid.json", grid.to_json())  # as an earlier version left it
    comparison.begin(grid, "ulsam compare", data_digest(shared), {})
    moved = data.rename(tmp_path / "moved")
    comparison.begin(grid, "ulsam compare", data_digest(dataclasses.replace(shared, data=str(moved), workers=1)), {})
    image = moved / "train" / "class1" / "000.png"
    if what == "longer":
        image.write_bytes(image.read_bytes() + b"0")
    elif what == "renamed":
        image.rename(image.with_name("other.png"))
    elif what == "in another split":
        image.rename(moved / "val" / "class1" / "moved.png")
    elif what == "one more":
        shutil.copyfile(image, image.with_name("more.png"))
    else:
        for split in ("train", "val"):
            (moved / split / "class1").rename(moved / split / "class9")
    with pytest.raises(UlsamError, match=r"on other images than .*data holds now: name another `out`$"):
        comparison.begin(grid, "ulsam compare", data_digest(dataclasses.replace(shared, data=str(moved))), {})


def test_another_weight_file_or_teacher_of_the_same_name_is_refused(tmp_path: Path) -> None:
    data = draw_splits(tmp_path / "data", train=3, val=2)
    weights, teacher = tmp_path / "weights.safetensors", tmp_path / "teacher.safetensors"
    weights.write_bytes(b"one")
    teacher.write_bytes(b"two")
    shared = TrainConfig.from_mapping({**RESOLVED, "data": str(data), "weights": str(weights)})
    arms = [
        *parse_arms(ARMS),
        dataclasses.replace(parse_arms(ARMS)[1], name="taught", settings={"teacher": str(teacher)}),
    ]
    comparison = ComparisonFolder(tmp_path / "out")
    comparison.root.mkdir()

    def begin(arms: Sequence[Arm]) -> None:
        files = file_digests(arm.config(shared) for arm in arms)
        comparison.begin(Grid(tuple(arms), shared), "ulsam compare", None, files)

    begin(arms)
    begin(arms)
    for file in (weights, teacher):
        before = file.read_bytes()
        file.write_bytes(b"other")
        with pytest.raises(UlsamError, match=f"^{file} is not the file that .* began with: put it back"):
            begin(arms)
        file.write_bytes(before)
    teacher.write_bytes(b"other")
    begin(arms[:-1])  # nothing there uses it
    with pytest.raises(UlsamError, match="teacher"):
        begin(arms)  # and it was not forgotten


def test_each_epoch_of_a_run_has_a_line_with_the_time_left(
    data: Path, tmp_path: Path, logged: Callable[[], str]
) -> None:
    shared = TrainConfig.from_mapping({**RESOLVED, "data": str(data), "epochs": 3})
    grid, comparison = Grid(parse_arms(ARMS), shared, seeds=1), ComparisonFolder(tmp_path)
    runs = grid.known(lambda run: None)
    row = {"epoch": 1, "lr": 0.1, "train_loss": 0.5, "val_loss": None, "val_top1": None, "val_top5": None}
    row |= {"seconds": 1.0, "images_per_second": 9.0}
    rows = [row, {**row, "epoch": 2, "val_top1": 0.25}, {**row, "epoch": 3, "val_top1": 0.5}]
    comparison.folder(runs[0]).mkdir(parents=True)
    write_metrics(comparison.folder(runs[0]), rows[:1])  # by an earlier start
    lines = EpochLines(grid, comparison)
    lines.look(runs)
    assert logged() == ""
    write_metrics(comparison.folder(runs[0]), rows[:2])
    lines.look(runs)
    lines.look(runs)
    assert re.fullmatch(r"epoch   base, seed-0: 2/3, training loss 0.5000, top-1 25.00 %; about \d+ s left\n", logged())
    write_metrics(comparison.folder(runs[0]), rows)
    comparison.folder(runs[1]).mkdir(parents=True)
    write_metrics(comparison.folder(runs[1]), rows)  # three epochs since the last look
    lines.look(runs)
    said = logged().splitlines()
    assert [line.partition(",")[0] for line in said] == ["epoch   base", *["epoch   slim"] * 3]
    assert said[1].startswith("epoch   slim, seed-0: 1/3, training loss 0.5000; about ")
    assert said[3].endswith("top-1 50.00 %; the last epoch")


def test_a_run_taken_from_another_comparison_is_not_waited_for(
    data: Path, tmp_path: Path, logged: Callable[[], str]
) -> None:
    shared = TrainConfig.from_mapping({**RESOLVED, "data": str(data), "epochs": 1})
    grid, comparison = Grid(parse_arms(ARMS), shared, seeds=1), ComparisonFolder(tmp_path)
    taken, running = grid.known(lambda run: None)
    comparison.folder(taken).mkdir(parents=True)  # its summary alone, as `--from` puts it there
    summary = {"config": dataclasses.asdict(taken.config), "top1": 0.5}
    (comparison.folder(taken) / "summary.json").write_text(json.dumps(summary))
    lines = EpochLines(grid, comparison)
    row = {"epoch": 1, "lr": 0.1, "train_loss": 0.5, "val_loss": None, "val_top1": None, "val_top5": None}
    comparison.folder(running).mkdir(parents=True)
    write_metrics(comparison.folder(running), [row | {"seconds": 1.0, "images_per_second": 9.0}])
    lines.look([running])
    assert logged() == "epoch   slim, seed-0: 1/1, training loss 0.5000; the last epoch\n"


@pytest.mark.slow
def test_rates_are_chosen_on_another_split_than_the_final_one(data: Path, tmp_path: Path) -> None:
    three = shutil.copytree(data, tmp_path / "three")
    shutil.copytree(three / "val", three / "test")
    for folder in (three / "val").iterdir():
        for image in sorted(folder.iterdir())[4:]:
            image.unlink()
    settings, out = {"val_split": "test"}, tmp_path / "out"
    result, _ = run_here(out, three, ARMS, settings=settings, rates=(0.02, 0.1), seeds=1, choose_split="val")
    tries, finals = summaries(out, "base", "choose-*"), summaries(out, "base")
    assert [(found["split"], found["scores"]["images"]) for found in tries] == [("validation", 11)] * 2
    assert finals[0]["split"] == result["split"] == "test"
    assert tries[0]["images"]["train"] == finals[0]["images"]["train"]
    assert result["chosen_on"] == "val"
    assert "| val top-1 at lr, epochs | 0.02, 1 | 0.1, 1 |" in (out / "compare.md").read_text()
    with pytest.raises(UlsamError, match="chooses rates on val: continue with that, or name another `out`"):
        run_here(out, three, ARMS, settings=settings, rates=(0.02, 0.1), seeds=1)
    next((three / "val" / "class0").iterdir()).unlink()
    with pytest.raises(UlsamError, match="compares models on other images"):
        run_here(out, three, ARMS, settings=settings, rates=(0.02, 0.1), seeds=1, choose_split="val")


def test_a_failed_run_is_reported_and_the_others_continue(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = ["base", "wild: lr=1e30; clip_grad=1e30", "size=24"]
    result, started = run_here(tmp_path, data, arms, seeds=1, settings={"val_fraction": 0.25})
    assert started == ["base, seed-0", "wild, seed-0", "size=24, seed-0"]
    base, wild, small = result["arms"]
    assert [entry["run"] for entry in wild["failed"]] == ["seed-0"]
    assert "try a lower `lr`" in wild["failed"][0]["reason"]
    assert (wild["top1_mean"], wild["missing"], base["missing"], base["top1_sd"]) == (None, 0, 0, None)
    assert (small["minus_base"]["over"], small["minus_base"]["seeds"]) == ("images", [0])
    notes = " ".join(result["notes"])
    assert "--" not in notes
    assert all(words in notes for words in ("wild, seed-0 failed: ", "one seed", "held-out", "not chosen for each arm"))
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--report-only", "--out", str(tmp_path)])
    assert stop.value.code == 1
    assert re.search(r"^wild .* failed$", capsys.readouterr().out, re.MULTILINE)
    shutil.rmtree(tmp_path / "arms" / "wild" / "seed-0")
    _, started = run_here(tmp_path, data, arms, seeds=1, settings={"val_fraction": 0.25})
    assert started == ["wild, seed-0"]  # tried again, once


@pytest.mark.slow
def test_a_rate_that_is_too_high_is_a_result_and_no_failure(data: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"rates": (0.02, 1e30), "seeds": 1, "settings": {"clip_grad": 1e30}}
    result, _ = run_here(tmp_path, data, ARMS, **given)
    for arm in result["arms"]:
        assert (arm["lr"], arm["failed"], arm["missing"], arm["seeds"]) == (0.02, [], 0, [0])
        assert "the loss is nan" in arm["tries"][1]["failed"]
    assert any(note.startswith("slim: rate 1e+30 (1 epochs) failed: diverged: the loss") for note in result["notes"])
    assert main(["compare", "--report-only", "--out", str(tmp_path)]) == 0
    assert "1 failed" not in (tmp_path / "compare.md").read_text()
    assert run_here(tmp_path, data, ARMS, **given) == (result, [])
    killed = tmp_path / "arms" / "slim" / "choose-1e+30-1"
    killed.with_name(f"{killed.name}.failed").write_text("killed by signal 9\n")
    shutil.rmtree(killed)
    assert run_here(tmp_path, data, ARMS, **given) == (result, ["slim, choose-1e+30-1"])  # that was no divergence


def test_an_arm_of_which_every_try_fails_has_failed(data: Path, tmp_path: Path) -> None:
    result, _ = run_here(tmp_path, data, ["base", "wild: clip_grad=1e30; momentum=0.5"], rates=(1e29, 1e30), seeds=1)
    for arm in result["arms"]:
        assert [entry["run"] for entry in arm["failed"]] == ["choose-1e+29-1", "choose-1e+30-1"]
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--report-only", "--out", str(tmp_path)])
    assert stop.value.code == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["DATA", "--arm", "base"], "needs two arms or more"),
        (["DATA", "--arm", "base", "--arm", "insert nowhere"], "the arm 'insert nowhere g=4' cannot be built"),
        (
            ["DATA", "--arm", "base", "--arm", "size=24", "--rates", "0.1,0.2", "--tried-within", "2"],
            "--tried-within needs several learning rates and several numbers of epochs to try",
        ),
        (["DATA", "--arm", "base", "--arm", "size=24", "--jobs", "0"], "--jobs must be 1 or more"),
        (["DATA", "--arm", "base", "--arm", "size=24", "--rates", "0.1,x"], "no list of numbers"),
        (["--arm", "base", "--arm", "size=24"], "no data given"),
        (["nowhere", "--arm", "base", "--arm", "size=24"], "nowhere"),
        (
            ["DATA", "--arm", "base", "--arm", "size=24", "--rates", "0.1,0.2", "--val-fraction", "0.5"],
            "leave --val-frac",
        ),
        (["DATA", "--arm", "base", "--arm", "size=24", "--rates", "0.1,0.2", "--choose-split", "val"], "name another"),
        (
            ["DATA", "--arm", "base", "--arm", "size=24", "--rate", "0.1"],
            r"no option --rate; did you mean --rates\?",
        ),
        (["DATA", "--arm", "base", "--arm", "size=24", "--config", "EDITS"], "base too: give edits with --arm"),
        (["DATA", "--arm", "base", "--arm", "size=24", "--config", "OFTEN"], "leave `val_every` out"),
        (["DATA", "--arm", "base", "--arm", "size=24", "--config", "SPLIT"], "leave `split_seed` out"),
        (["DATA", "--arm", "base", "--arm", "size=24", "--margin", "nan"], "0 points or more: not nan"),
        (["--report-only", "--margin", "-1"], "0 points or more: not -1"),
        (["--report-only"], "is not the folder of a comparison"),
        (["--report-only", "DATA"], "leave all but --margin, --from and --publish out"),
        (["--report-only", "--seeds", "5"], "leave all but --margin, --from and --publish out"),
        (["--report-only", "--rates", "0.1"], "leave all but --margin, --from and --publish out"),
        (["--report-only", "--launcher", "local"], "leave all but --margin, --from and --publish out"),
        (["DATA", "--arm", "base", "--arm", "size=24", "--publish", "x"], "x must end in .jsonl.gz: x.jsonl.gz"),
        (["DATA", "--arm", "base", "--arm", "size=24", "--launcher", "ray"], r"pip install 'ulsam\[ray\]'"),
    ],
)
def test_mistakes_are_one_line_and_train_nothing(
    words: list[str],
    message: str,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # is not installed
    out = tmp_path / "out"
    rest = [] if "--report-only" in words else options(RESOLVED)
    values = {"edits": ["remove blocks.2"]}, {"val_every": 2, "split_seed": None, "edits": []}, {"split_seed": 0}
    files = dict(zip(("EDITS", "OFTEN", "SPLIT"), values, strict=True))
    for name, settings in files.items():
        (tmp_path / name).write_text(json.dumps(settings))  # which is YAML too
    known = {"DATA": data, "OUT": out} | {name: tmp_path / name for name in files}
    line = ["compare", *(str(known.get(word, word)) for word in words), *rest, "--out", str(out)]
    assert main(line) == 2
    found = capsys.readouterr()
    assert re.fullmatch(rf"ulsam: error: .*{message}.*\n", found.err)
    assert not out.exists()


def test_images_that_the_start_was_trained_on_are_no_held_out_ones(data: Path, tmp_path: Path) -> None:
    settings = {**RESOLVED, "data": str(data), "val_fraction": 0.5}
    before = TrainConfig.from_mapping({**settings, "split_seed": 0})
    train(before, tmp_path / "before")
    model = str(tmp_path / "before" / "model.safetensors")
    trained_on = set(open_images(before)[0].names)
    for split_seed in (0, 1):
        for setting in ("weights", "teacher"):
            config = TrainConfig.from_mapping({**settings, "split_seed": split_seed, setting: model})
            held_out = open_images(config)[1].names
            seen = len(trained_on & set(held_out))
            assert (seen > 0) == (split_seed == 1)
            warnings = [f"{model} was trained on {seen} of the {len(held_out)} images that are held out here"]
            assert [line.partition(":")[0] for line in seen_before([config])] == (warnings if seen else [])
    elsewhere = dataclasses.replace(before, val_fraction=None, val_split="val", weights=model)
    other_split = dataclasses.replace(before, train_split="val", weights=model)  # images of the same names
    assert seen_before([elsewhere, other_split]) == []
    shared = dataclasses.replace(elsewhere, val_split=None)
    grid = Grid(parse_arms(ARMS), shared, rates=(0.01, 0.02), tried_seeds=2)
    tries = [run.config for run in grid.known(lambda run: None)]
    held_out = {config.split_seed: set(open_images(config)[1].names) for config in tries}
    seen = {number: len(trained_on & names) for number, names in held_out.items()}
    assert (seen[0], seen[1] > 0) == (0, True)  # each seed of a try holds out others
    assert [line.partition(" images")[0] for line in seen_before(tries)] == [
        f"{model} was trained on {seen[1]} of the {len(held_out[1])}"
    ]
    (tmp_path / "before" / "config.yaml").write_text("model_type: of another program")
    assert seen_before(tries) == []


@pytest.mark.slow
def test_a_locked_run_is_left_to_the_other_process(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What another process has in hand is waited for, said once, and taken over from it without training."""
    shared = TrainConfig.from_mapping({**RESOLVED, "data": str(data)})
    grid, comparison = Grid(parse_arms(ARMS[:2]), shared, seeds=1), ComparisonFolder(tmp_path)
    caplog.set_level(logging.INFO, logger="ulsam")

    def said() -> list[str]:
        return [line.split()[0] for line in caplog.messages if line.startswith(("wait ", "run "))]

    class Locked(LocalLauncher):
        def start(self, run: Run) -> bool:
            if len(said()) == 2:  # both were seen: the other process is done with one, then with the other
                for other in grid.known(self.comparison.outcome):
                    if self.comparison.outcome(other) is None:
                        train(other.config, self.comparison.folder(other))
            return super().start(run)

    for run in grid.known(comparison.outcome):
        make_folder(comparison.folder(run).parent)
    held = [take_lock(lock_of(comparison.folder(run))) for run in grid.known(comparison.outcome)]
    assert None not in held
    launcher = Locked(comparison, jobs=2)
    run_all(grid, comparison, launcher, "again")
    assert said() == ["wait", "wait"]
    assert not any(isinstance(comparison.outcome(run), Failed | None) for run in grid.known(comparison.outcome))
