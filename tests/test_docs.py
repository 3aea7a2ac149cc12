"""What README and docs show is true: Python examples run, commands parse, links lead somewhere."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from scripts import load_benchmark
from ulsam.base.errors import UlsamError
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


@pytest.fixture
def tables(monkeypatch):
    """The script that writes measured tables, told to check them."""
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    return load_benchmark("tables")


def test_measured_tables_are_what_the_results_say(tables, capsys):
    assert tables.main() == 0, capsys.readouterr().out


def test_a_row_of_the_headline_table(tables):
    def arm(name, macs, ratio):
        cost, latency = {"params": 1000, "macs": macs}, {"seconds": 0.005, "ratio": ratio}
        return {"name": name, "cost": cost, "latency": latency, "seeds": [0], "top1_mean": 0.8, "top1_sd": None}

    base, removed = arm("base", 2_000_000, 1.0), arm("remove 14,17", 1_000_000, 0.5)
    edited, near = arm("ULSAM 14,17", 1_010_000, 0.6), arm("pruned-macs-0.51", 1_029_000, 0.9)
    far, broken = arm("pruned-macs-0.9", 1_040_000, 0.9), {**arm("ULSAM 3", 0, 1.0), "seeds": [], "cost": {}}
    arms = [base, removed, edited, far, near, broken]
    pair = {"arm": near["name"], "minus": edited["name"], "mean": -0.02, "low": -0.03, "high": 0.01}
    pairs = tables._both_ways([pair])
    row = tables._headline(edited, base, arms, pairs)
    assert row == "| ULSAM 14, 17 | +0.0% | -49.5% | -40% | 80.00 (1) |  |  | +2.00 [-1.00, +3.00] |"
    assert tables._headline(base, base, arms, {}).startswith("| base | 0.00 M | 2.00 M | 5.0 ms |")
    assert tables._headline(broken, base, arms, {}) == "| ULSAM 3 | | | | failed | | | |"


def test_a_page_or_a_result_that_was_changed_by_hand_is_noticed(tables, tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "results", tmp_path / "results")
    for name in tables.TABLES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    page, results = tmp_path / "docs" / "results.md", tmp_path / "results" / "compare_cub100"
    text = page.read_text()
    page.write_text(text.replace("| base | 2.352 M |", "| base | 1.352 M |"))
    assert tables.main() == 1
    assert "docs/results.md and results/ disagree" in capsys.readouterr().out
    page.write_text(text)
    summary = next(results.glob("arms/base/seed-*/summary.json"))
    summary.write_text(summary.read_text().replace('"top1": 0.8', '"top1": 0.9', 1))
    with pytest.raises(UlsamError, match=r"compare\.json is not what its runs say"):
        tables.main()
    shutil.copytree(ROOT / "results", tmp_path / "results", dirs_exist_ok=True)
    file = tmp_path / "results" / "slimmed_grocery81_latency85.json"
    right = json.loads(file.read_text())
    for key, value in {
        "blocks": [["16"], ["17"]],
        "lr": 1.0,
        "slimmed": {**right["slimmed"], "top1_mean": 0.9},
    }.items():
        file.write_text(json.dumps({**right, key: value}))
        with pytest.raises(UlsamError, match=rf"latency85\.json is not what its runs say, of {key}"):
            tables.slimmed_results(file.stem.removeprefix("slimmed_"))
    file.write_text(json.dumps(right))
    shutil.copy(file.with_suffix("") / "seed-0" / "longer.json", file.with_suffix("") / "seed-1")
    with pytest.raises(UlsamError, match=r"is not what its runs say, of longer"):
        tables.slimmed_results(file.stem.removeprefix("slimmed_"))
    shutil.rmtree(file.with_suffix(""))
    with pytest.raises(UlsamError, match=r"latency85 is gone: the summaries of what .*latency85\.json says"):
        tables.slimmed_results(file.stem.removeprefix("slimmed_"))
