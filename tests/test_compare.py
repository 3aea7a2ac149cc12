"""A comparison from images to tables: runs in this process, real summaries, what is refused, what is published."""

import copy
import csv
import dataclasses
import gzip
import json
import logging
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tiny import SETTINGS, draw_splits, options
from ulsam.base.errors import UlsamError
from ulsam.base.files import make_folder
from ulsam.base.locks import take_lock
from ulsam.base.packed import read_packed, write_packed
from ulsam.cli import main
from ulsam.study import compare_plot as plot
from ulsam.study.arms import Arm, parse_arms
from ulsam.study.compare import _reported, report
from ulsam.study.compare_report import measure_latency
from ulsam.study.compare_table import legend, pairs
from ulsam.study.comparison_folder import ComparisonFolder
from ulsam.study.epoch_lines import EpochLines
from ulsam.study.grid import Failed, Grid, Run
from ulsam.study.identity import data_digest, file_digests, seen_before
from ulsam.study.launch import EndedRun, LocalLauncher, lock_of, run_all
from ulsam.study.paths import without_paths
from ulsam.study.statistics import right
from ulsam.training.config import TrainConfig
from ulsam.training.parts import open_images
from ulsam.training.summary import write_metrics
from ulsam.training.train import train

RESOLVED = {**SETTINGS, "epochs": 1, "layout": "contiguous", "amp": "none", "compile": "none"}
ARMS = ("base", "slim: insert blocks.2 g=4; size=24")


class Here:
    """Runs one after the other in this process, which is fast; notes which ones it started."""

    def __init__(self, comparison: ComparisonFolder) -> None:
        self.comparison = comparison
        self.started: list[str] = []
        self.over: list[EndedRun] = []

    def start(self, run: Run) -> bool:
        self.comparison.check(run)
        self.started.append(str(run))
        try:
            train(run.config, self.comparison.folder(run))
            self.over.append(EndedRun(run))
        except UlsamError as error:
            self.over.append(EndedRun(run, str(error)))
        return True

    def room(self) -> bool:
        return not self.over

    def running(self) -> Sequence[Run]:
        return [ended.run for ended in self.over]

    def ended(self) -> list[EndedRun]:
        over, self.over = self.over, []
        return over

    def stop(self) -> None:
        pass


def run_here(
    out: Path, data: Path, arms: Sequence[str], *, settings: dict[str, Any] | None = None, **given: Any
) -> tuple[dict[str, Any], list[str]]:
    """As `ulsam.compare`, with :class:`Here`; what it returns, and the runs that it started."""
    shared = TrainConfig.from_mapping({**RESOLVED, "data": str(data), **(settings or {})})
    grid, comparison = Grid(parse_arms(arms), shared, **given), ComparisonFolder(out)
    with comparison.locked():
        comparison.begin(grid, f"ulsam compare {data}", data_digest(shared, grid.choose_split), {})
    launcher = Here(comparison)
    run_all(grid, comparison, launcher, "ulsam compare")
    measure_latency(grid, comparison)
    return _reported(grid, comparison, 0.005, f"ulsam compare {data}"), launcher.started


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = draw_splits(tmp_path_factory.mktemp("data"), train=16, val=12, noise=110)
    next((root / "val" / "class1").iterdir()).write_bytes(b"no image")  # left out of every measurement
    return root


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Two arms, each with its own rate, two seeds."""
    out = tmp_path_factory.mktemp("compare") / "out"
    result, started = run_here(out, data, ARMS, rates=(0.02, 0.1), seeds=2)
    assert len(started) == len(set(started)) == 2 * (2 + 2)
    return out, result


def summaries(out: Path, arm: str, pattern: str = "seed-*") -> list[dict[str, Any]]:
    found = sorted(out.glob(f"arms/{arm}/{pattern}/summary.json"))
    return [json.loads(path.read_text()) for path in found]


def final(out: Path, arm: str, seed: int) -> Path:
    """The folder of a run that counts, where rates were tried."""
    (found,) = out.glob(f"arms/{arm}/seed-{seed}-*/")
    return found


def test_the_result_is_what_the_summaries_say(finished: tuple[Path, dict[str, Any]]) -> None:
    out, result = finished
    assert json.loads((out / "compare.json").read_text()) == result
    assert (result["images"], result["split"], result["finished"]) == (35, "validation", True)
    base = summaries(out, "base")
    for arm in result["arms"]:
        finals = summaries(out, arm["folder"])
        top1 = [summary["scores"]["top1"] for summary in finals]
        assert (arm["seeds"], arm["top1"]) == ([0, 1], top1)
        assert (arm["top1_mean"], arm["top1_sd"]) == pytest.approx((np.mean(top1), np.std(top1, ddof=1)))
        assert {(summary["config"]["lr"], summary["config"]["epochs"]) for summary in finals} == {
            (arm["lr"], arm["epochs"])
        }
        tried = {
            (summary["config"]["lr"], summary["config"]["epochs"]): summary["scores"]["top1"]
            for summary in summaries(out, arm["folder"], "choose-*")
        }
        assert {(entry["lr"], entry["epochs"]): entry["top1"] for entry in arm["tries"]} == tried
        assert tried[arm["lr"], arm["epochs"]] == max(tried.values())
        assert arm["cost"] == finals[0]["cost"]
        if arm["name"] != "base":
            matrix = [right(mine).astype(int) - right(other) for mine, other in zip(finals, base, strict=True)]
            minus = arm["minus_base"]
            assert np.shape(matrix) == (2, 35)
            assert minus["mean"] == pytest.approx(np.mean(matrix))
            assert minus["low"] <= minus["mean"] <= minus["high"] and minus["over"] == "seeds and images"


def test_images_are_those_that_choosing_did_not_see(finished: tuple[Path, dict[str, Any]]) -> None:
    out, _ = finished
    for arm in ("base", "slim"):
        assert {(s["split"], s["images"]["train"]) for s in summaries(out, arm)} == {("validation", 48)}
        held_out = summaries(out, arm, "choose-*")
        assert {(s["split"], s["images"]["train"]) for s in held_out} == {("held-out", 39)}
        assert {s["outcomes"]["names"] for s in held_out} == {
            summaries(out, "base", "choose-*")[0]["outcomes"]["names"]
        }


def test_tables_and_images(finished: tuple[Path, dict[str, Any]]) -> None:
    out, result = finished
    rows = list(csv.DictReader((out / "compare.csv").read_text().splitlines()))
    assert [row["arm"] for row in rows] == ["base", "slim"]
    for row, arm in zip(rows, result["arms"], strict=True):
        assert float(row["top1_mean"]) == arm["top1_mean"]
        assert int(row["macs"]) == arm["cost"]["macs"]
        assert float(row["latency_seconds"]) == arm["latency"]["seconds"] > 0
    text = (out / "compare.md").read_text()
    slim = result["arms"][1]
    assert re.search(rf"\| slim .*{100 * slim['top1_mean']:.2f} ± .*\[", text)
    assert re.search(rf"\| base .* {1e3 * result['arms'][0]['latency']['seconds']:.1f} ms \|", text)
    assert re.search(rf"\| slim .* x {slim['latency']['ratio']:.2f} \|", text)
    elsewhere = copy.deepcopy(result)  # a model that was timed beside the base on a slower machine
    elsewhere["arms"][1]["latency"]["seconds"] *= 3
    assert plot.draw(elsewhere) == plot.draw(result)
    elsewhere["arms"][1]["latency"]["ratio"] *= 3
    assert plot.draw(elsewhere) != plot.draw(result)
    assert "| held-out top-1 at lr, epochs | 0.02, 1 | 0.1, 1 |" in text
    tried = [
        f"**{100 * entry['top1']:.1f}**" if entry["lr"] == slim["lr"] else f"{100 * entry['top1']:.1f}"
        for entry in slim["tries"]
    ]
    assert f"| slim | {' | '.join(tried)} |" in text
    for name in ("compare.png", "rates.png"):
        with Image.open(out / name) as image:
            assert image.width > 500


def test_started_again_it_trains_only_what_is_missing(
    finished: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(finished[0], tmp_path / "out")
    again, started = run_here(out, data, ARMS, rates=(0.02, 0.1), seeds=2)
    assert (again, started) == (finished[1], [])
    lost = final(out, "slim", 1)
    shutil.rmtree(lost)
    again, started = run_here(out, data, ARMS, rates=(0.02, 0.1), seeds=2)
    assert started == [f"slim, {lost.name}"]
    assert [arm["top1"] for arm in again["arms"]] == [arm["top1"] for arm in finished[1]["arms"]]


def test_runs_of_another_spec_are_never_mixed_in(
    finished: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(finished[0], tmp_path / "out")
    again = r"holds a run with smoothing 0.1, not 0.0: put that back, move it away"
    with pytest.raises(UlsamError, match=again) as error:
        run_here(out, data, ARMS, rates=(0.02, 0.1), seeds=2, settings={"smoothing": 0.0})
    assert "choose-0.02-1" in str(error.value)
    path = final(out, "base", 0) / "summary.json"
    summary = json.loads(path.read_text())
    del summary["config"]["split_seed"]  # as an earlier version would have left it: the same spec only by its default
    summary["config"]["workers"] = 7  # does not change what is trained
    path.write_text(json.dumps(summary))
    with pytest.raises(UlsamError, match="split_seed None, not 0"):
        report(out)


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


def test_other_images_are_refused(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out = shutil.copytree(finished[0], tmp_path / "out")
    path = final(out, "slim", 1) / "summary.json"
    summary = json.loads(path.read_text())
    summary["outcomes"]["names"] = "0" * 64
    path.write_text(json.dumps(summary))
    with pytest.raises(UlsamError, match="measured on different images"):
        report(out)


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


def test_a_published_file_gives_the_same_tables(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, result = finished
    file, again = tmp_path / "published.jsonl.gz", tmp_path / "again"
    assert main(["compare", "--report-only", "--out", str(out), "--publish", str(file)]) == 0
    printed, _, paths = capsys.readouterr().out.rpartition("written to ")
    assert paths.strip().split(", ") == [str(out / f"compare.{kind}") for kind in ("md", "csv", "json", "png")] + [
        str(out / "rates.png")
    ]
    runs = {path.relative_to(out).as_posix() for path in out.glob("arms/*/*/summary.json")}
    assert read_packed(file).keys() == {"grid.json", "latency.json", *runs}
    assert main(["compare", "--report-only", "--from", str(file), "--out", str(again)]) == 0
    assert capsys.readouterr().out.rpartition("written to ")[0] == printed
    assert json.loads((again / "compare.json").read_text()) == without_paths(result)
    before = file.read_bytes()
    report(again, publish=file)
    assert file.read_bytes() == before


def test_an_external_arm_without_finished_runs_is_published(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, file = shutil.copytree(finished[0], tmp_path / "out"), tmp_path / "published.jsonl.gz"
    (out / "arms" / "begun").mkdir()
    ComparisonFolder(out).write(
        "arms/begun/external_arm.json",
        {"name": "begun", "settings": {}, "what": "its first run is not finished", "cost": {}},
    )
    begun = report(out, publish=file)["arms"][-1]
    assert (begun["name"], begun["seeds"]) == ("begun", [])
    assert read_packed(file)["arms/begun/external_arm.json"]["name"] == "begun"


@pytest.mark.slow
def test_a_published_comparison_is_extended_by_an_arm(
    finished: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, result = finished
    file, new = tmp_path / "published.jsonl.gz", tmp_path / "new"
    report(out, publish=file)
    (tmp_path / data.name).symlink_to(data)  # the name that stands in what was published
    monkeypatch.chdir(tmp_path)
    ComparisonFolder(new).start_from(file)
    more, started = run_here(new, Path(data.name), [*ARMS, "size=28"], rates=(0.02, 0.1), seeds=2)
    assert started and all(run.startswith("size=28,") for run in started)
    interval = ("low", "high", "verdict")  # over the seeds of all arms
    before, after = (found["arms"][1]["minus_base"] for found in (result, more))
    assert {name: after[name] for name in after if name not in interval} == {
        name: before[name] for name in before if name not in interval
    }
    assert len(more["arms"][2]["seeds"]) == 2
    report(new, publish=file)
    assert len([name for name in read_packed(file) if name.endswith("summary.json")]) == 8 + 4
    with pytest.raises(UlsamError, match=r"holds 4 runs that .*out lacks, such as arms/size-28/.*: start from it"):
        report(out, publish=file)
    old = shutil.copytree(out, tmp_path / "old")
    assert report(old, start_from=file, publish=file)["arms"] == result["arms"]  # its own plan stays, all runs are kept
    assert len(summaries(old, "size-28")) == 2


@pytest.mark.slow
def test_a_published_comparison_is_resumed_by_the_command(
    finished: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, new = tmp_path / "published.jsonl.gz", tmp_path / "new"
    report(finished[0], publish=file)
    (tmp_path / data.name).symlink_to(data)
    monkeypatch.chdir(tmp_path)
    arms = [word for arm in ARMS for word in ("--arm", arm)]
    line = ["compare", data.name, *arms, "--rates", "0.02,0.1", "--seeds", "2", *options(RESOLVED)]
    for _ in range(2):  # typed again, it resumes in the folder
        assert main([*line, "--from", str(file), "--out", str(new)]) == 0
        assert json.loads((new / "compare.json").read_text())["arms"] == finished[1]["arms"]
    assert not [*new.rglob("*.safetensors")]  # nothing was trained


def test_other_runs_than_those_of_the_folder_are_not_taken_over(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    file, out = tmp_path / "published.jsonl.gz", shutil.copytree(finished[0], tmp_path / "out")
    report(out, publish=file)
    grid = json.loads((out / "grid.json").read_text())
    ComparisonFolder(out).write("grid.json", {**grid, "data_sha256": "0" * 64})
    with pytest.raises(UlsamError, match=r"compares models on other images than .*published"):
        report(out, start_from=file)
    write_packed(file, {"a.json": {}})
    with pytest.raises(UlsamError, match=r"is no published comparison: it lacks grid\.json"):
        report(tmp_path / "new", start_from=file)


def test_a_run_of_an_earlier_choice_stays_on_record(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, file = shutil.copytree(finished[0], tmp_path / "out"), tmp_path / "published.jsonl.gz"
    earlier = shutil.copytree(final(out, "slim", 1), out / "arms" / "slim" / "seed-1-0.5-9")
    result = report(out, publish=file)
    assert result["arms"] == finished[1]["arms"]
    published = read_packed(file)["arms/slim/seed-1-0.5-9/summary.json"]
    assert published["scores"] == json.loads((earlier / "summary.json").read_text())["scores"]


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


def test_a_report_shows_the_machine_of_the_runs_not_its_own(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, result = finished
    file = tmp_path / "published.jsonl.gz"
    report(out, publish=file)
    runs = read_packed(file)
    runs["latency.json"]["where"]["processor"] = "another processor"
    for name, run in runs.items():
        if name.endswith("summary.json"):
            run["versions"]["ulsam"] = "99"
    write_packed(file, runs)
    found = report(tmp_path / "again", start_from=file)
    assert (found["processor"], found["versions"]["ulsam"]) == ("another processor", ["99"])
    kept = {"processor": result["processor"], "versions": result["versions"]}
    assert {**found, **kept} == without_paths(result)


def test_no_published_text_holds_a_path(finished: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path) -> None:
    out, file = shutil.copytree(finished[0], tmp_path / "out"), tmp_path / "published.jsonl.gz"
    lost = final(out, "slim", 1)
    shutil.rmtree(lost)
    lost.with_name(f"{lost.name}.failed").write_text(f"cannot read {data}/train/class0/000.png: gone\n")
    report(out, publish=file)
    text = gzip.decompress(file.read_bytes()).decode()
    assert str(data.parent) not in text and str(tmp_path.parent) not in text
    assert read_packed(file)[f"arms/slim/{lost.name}.failed"] == "cannot read 000.png: gone\n"
    (entry,) = report(tmp_path / "again", start_from=file)["arms"][1]["failed"]
    assert entry["reason"] == "cannot read 000.png: gone"
    assert (tmp_path / "again" / "compare.md").read_text().endswith(f"`ulsam compare {data.name}`\n")


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


def test_the_second_table_has_every_other_pair() -> None:
    pair = {"mean": 0.01, "low": 0.002, "high": 0.018, "verdict": ["gain", "non-inferior"]}
    names = [("b", "a"), ("c", "a"), ("c", "b")]
    result = {"arms": [{"name": "a"}], "differences": [{"arm": one, "minus": other, **pair} for one, other in names]}
    assert pairs(result) == [["c minus b", "+1.00 [+0.20, +1.80]", "gain, non-inferior"]]


def test_the_legend_states_the_interval_where_only_the_base_is_held_against(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    assert legend({**finished[1], "differences": []}) == legend(finished[1])
    assert "95 % interval over" in legend(finished[1])


def test_runs_that_were_not_started_are_missing(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out = shutil.copytree(finished[0], tmp_path / "out")
    shutil.rmtree(final(out, "slim", 1))
    result = report(out)
    assert (result["finished"], result["arms"][1]["missing"]) == (False, 1)
    assert result["arms"][1]["minus_base"]["seeds"] == [0]
    assert "slim minus base: over 1 common seeds" in result["notes"]
    assert "1 not run" in (out / "compare.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["DATA", "--arm", "base"], "needs two arms or more"),
        (["DATA", "--arm", "base", "--arm", "insert nowhere"], "the arm 'insert nowhere g=4' cannot be built"),
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
