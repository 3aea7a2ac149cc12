"""What README and docs show is true: Python examples run, commands parse, links lead somewhere."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from scripts import load_benchmark
from ulsam.base.errors import UlsamError
from ulsam.base.packed import read_packed, write_packed
from ulsam.cli import parse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
IDS = [page.name for page in PAGES]
# Their examples train or compile models.
SLOW = ("compare.md", "slim.md", "detectors.md", "surgery.md", "works_with.md")
NEEDED = {"detectors.md": ("ultralytics", "segmentation_models_pytorch", "transformers")}


def blocks(page: Path, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=page.name, marks=[pytest.mark.slow] * (page.name in SLOW)) for page in PAGES],
)
def test_python_examples_run(page, tmp_path, monkeypatch):
    code = "\n".join(blocks(page, "python"))
    if not code:
        pytest.skip("no Python on this page")
    for library in NEEDED.get(page.name, ()):
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, page.name, "exec"), names)
    assert names


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_parse(page):
    lines = [line.strip() for text in blocks(page, "sh", "") for line in text.replace("\\\n", " ").splitlines()]
    commands = [line for line in lines if re.match(r"(torchrun .*-m )?ulsam ", line)]
    assert commands, f"{page.name} shows no command"
    for line in commands:
        words = shlex.split(line, comments=True)
        words = words[words.index("ulsam") + 1 :]
        assert parse(words).command == words[0]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_and_images_exist(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists() or (page.parent / f"{target}.md").exists(), target


def test_measured_tables_are_what_the_results_say(capsys):
    assert load_benchmark("tables").main(check=True) == 0, capsys.readouterr().out


def test_a_row_of_the_headline_table():
    headline = load_benchmark("tables_headline")

    def arm(name, macs, ratio):
        cost, latency = {"params": 1000, "macs": macs}, {"seconds": 0.005, "ratio": ratio}
        return {"name": name, "cost": cost, "latency": latency, "seeds": [0], "top1_mean": 0.8, "top1_sd": None}

    base, removed = arm("base", 2_000_000, 1.0), arm("remove 14,17", 1_000_000, 0.5)
    edited, near = arm("ULSAM 14,17", 1_010_000, 0.6), arm("pruned-macs-0.51", 1_029_000, 0.9)
    far, broken = arm("pruned-macs-0.9", 1_040_000, 0.9), {**arm("ULSAM 3", 0, 1.0), "seeds": [], "failed": ["x"]}
    waiting = {**arm("ULSAM 4", 0, 1.0), "seeds": [], "failed": []}
    arms = [base, removed, edited, far, near, broken, waiting]
    pair = {"arm": near["name"], "minus": edited["name"], "mean": -0.02, "low": -0.03, "high": 0.01}
    rows = headline.rows({"arms": arms, "differences": [pair]}, ["base", "ULSAM 14,17", "ULSAM 3", "ULSAM 4"])
    assert rows[0].startswith("| base | 0.00 M | 2.00 M | 5.0 ms |")
    assert rows[1] == "| ULSAM 14, 17 | +0.0% | -49.5% | -40% | 80.00 (1) |  |  | +2.00 [-1.00, +3.00] |"
    assert rows[2:] == ["| ULSAM 3 | | | | failed | | | |"]


@pytest.fixture
def copied(tmp_path):
    """A copy of the pages and the results."""
    shutil.copytree(ROOT / "results", tmp_path / "results")
    for name in load_benchmark("tables").TABLES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_a_page_that_was_changed_by_hand_is_noticed(copied, capsys):
    page = copied / "docs" / "results.md"
    page.write_text(page.read_text().replace("| base | 2.352 M |", "| base | 1.352 M |"))
    assert load_benchmark("tables").main(copied, check=True) == 1
    assert capsys.readouterr().out.splitlines() == [
        "docs/results.md and results/ disagree: run python benchmarks/tables.py"
    ]


def test_a_run_that_was_changed_by_hand_is_noticed(copied, capsys):
    tables = load_benchmark("tables")
    file = copied / "results" / "compare_cub100.jsonl.gz"
    runs = read_packed(file)
    runs["arms/base/seed-0-0.02-8/summary.json"]["scores"]["top1"] += 0.01
    write_packed(file, runs)
    assert tables.main(copied, check=True) == 1
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == {"README.md", "docs/results.md"}


def test_a_slimmed_result_that_was_changed_by_hand_is_noticed(copied):
    slim, results, name = load_benchmark("tables_slim"), copied / "results", "grocery81_latency85"
    file = results / f"slimmed_{name}.json"
    right = json.loads(file.read_text())
    for key, value in {
        "blocks": [["16"], ["17"]],
        "lr": 1.0,
        "slimmed": {**right["slimmed"], "top1_mean": 0.9},
    }.items():
        file.write_text(json.dumps({**right, key: value}))
        with pytest.raises(UlsamError, match=rf"latency85\.json is not what its runs say, of {key}"):
            slim.slimmed_results(results, name)
    file.write_text(json.dumps(right))
    packed = results / f"slimmed_{name}.jsonl.gz"
    runs = read_packed(packed)
    write_packed(packed, {**runs, "seed-1/longer.json": runs["seed-0/longer.json"]})
    with pytest.raises(UlsamError, match=r"is not what its runs say, of longer"):
        slim.slimmed_results(results, name)
    packed.unlink()
    with pytest.raises(UlsamError, match=r"no packed file .*slimmed_grocery81_latency85\.jsonl\.gz"):
        slim.slimmed_results(results, name)
