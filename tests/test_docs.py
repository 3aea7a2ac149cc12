"""What README and docs show is true: Python examples run, commands parse, links lead somewhere."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from scripts import load_benchmark
from ulsam.cli import parse
from ulsam.errors import UlsamError

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
IDS = [page.name for page in PAGES]
SLOW = ("compare.md", "slim.md")  # their examples train nets one after the other


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
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists() or (page.parent / f"{target}.md").exists(), target


@pytest.fixture
def tables(monkeypatch):
    """The script that writes measured tables, told to check them."""
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    return load_benchmark("tables")


def test_measured_tables_are_what_the_results_say(tables, capsys):
    assert tables.main() == 0, capsys.readouterr().out


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
