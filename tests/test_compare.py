"""A finished comparison: its result, its tables, what is published, and what is started again."""

import copy
import csv
import gzip
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from comparing import ARMS, RESOLVED, run_here, summaries
from tiny import draw_splits, options
from ulsam.base.errors import UlsamError
from ulsam.base.packed import read_packed, write_packed
from ulsam.cli import main
from ulsam.study import compare_plot as plot
from ulsam.study.compare import report
from ulsam.study.compare_table import legend, pairs
from ulsam.study.comparison_folder import ComparisonFolder
from ulsam.study.paths import without_paths
from ulsam.study.statistics import right


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


def test_other_images_are_refused(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out = shutil.copytree(finished[0], tmp_path / "out")
    path = final(out, "slim", 1) / "summary.json"
    summary = json.loads(path.read_text())
    summary["outcomes"]["names"] = "0" * 64
    path.write_text(json.dumps(summary))
    with pytest.raises(UlsamError, match="measured on different images"):
        report(out)


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
