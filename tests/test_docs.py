"""What README and docs show is true: examples do what they promise, commands parse, links lead somewhere."""

import ast
import json
import re
import shlex
import shutil
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ulsam
from scripts import load_benchmark
from ulsam.base.errors import UlsamError
from ulsam.base.packed import read_packed, write_packed
from ulsam.cli import COMMANDS, parse

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
IDS = [page.name for page in PAGES]
# Their examples train or compile models.
SLOW = (
    "compare.md",
    "deploy.md",
    "engines.md",
    "slim.md",
    "detectors.md",
    "settings.md",
    "surgery.md",
    "training.md",
    "works_with.md",
)
NEEDED = {"detectors.md": ("ultralytics", "segmentation_models_pytorch", "transformers")}
# Of a page with Python: what must be true of its names, and of what it printed, after its last example.
Promise = Callable[[dict[str, Any], str], bool]
PROMISES: dict[str, Promise] = {
    "README.md": lambda names, out: (
        _places(names["model"]) == ["blocks.4.2", "blocks.5.2"] and "One 3x224x224 image" in out
    ),
    "index.md": lambda names, out: (
        _places(names["model"]) == ["blocks.4.2", "blocks.5.2"] and "One 3x224x224 image" in out
    ),
    "surgery.md": lambda names, out: (
        names["y"].shape == names["x"].shape
        and torch.allclose(names["maps"].sum((2, 3)), torch.ones(2, 4))
        and _places(names["model"]) == ["blocks.4.2", "blocks.5.2"]
        and not any(isinstance(part, torch.nn.BatchNorm2d) for part in names["fast"].modules())
    ),
    "training.md": lambda names, out: (
        names["summary"]["prepared"]
        and Path("runs/tiny/model.safetensors").exists()
        and len(names["arms"]) == 2
        and 0 <= names["scores"].top1 <= 1
        and "broadbar" in out
    ),
    "datasets.md": lambda names, out: (
        0 < names["summary"]["scores"]["map"] <= 1
        and len(names["summary"]["spec"]["thresholds"]) == 6
        and names["found"].scores.map == pytest.approx(names["summary"]["scores"]["map"], abs=1e-6)
        and out.count("val/broadbar-speckled-longbill") == 2
    ),
    "settings.md": lambda names, out: (
        "['0.00400', '0.00040', '0.00004']" in out
        and list(names["weighted"]["class_weights"].values()) == [2.0, 1.0]
        and names["kept"]["chosen_on"] == "validation"
        and names["five"]["spec"]["input_size"] == [5, 32, 32]
    ),
    "compare.md": lambda names, out: [arm["name"] for arm in names["result"]["arms"]] == ["base", "replace 14 g=4"],
    "slim.md": lambda names, out: (
        len(names["spec"].edits) == 1
        and names["spec"].edits[0].at == ",".join(names["found"]["chosen"]["blocks"])
        and 0 <= names["found"]["result"]["slimmed"]["top1"] <= 1
    ),
    "explain.md": lambda names, out: (
        names["found"].layers[0].maps.shape[0] == 4
        and Path("bird.png").stat().st_size > 10_000
        and "blocks.5.2 17" in out
    ),
    "deploy.md": lambda names, out: (
        "16 generated images" in out
        and "a.jpg" in out
        and {name for name, _ in names["found"].classes} == {"robin", "wren"}
    ),
    "engines.md": lambda names, out: (
        "16 generated images" in out
        and (names["logits"].shape, str(names["logits"].dtype)) == ((1, 2), "float32")
        and _places(names["model"]) == ["blocks.4.2"]
        and Path("model-fp16.onnx").stat().st_size < 0.6 * Path("model.onnx").stat().st_size
    ),
    "detectors.md": lambda names, out: _places(names["again"]) == ["mobilenet_v2.layer.3"] and "[1, 3]" in out,
    "performance.md": lambda names, out: (
        not any(isinstance(part, torch.nn.BatchNorm2d) for part in names["fast"].modules())
    ),
    "works_with.md": lambda names, out: (
        ulsam.edits_of(names["twin"]) == []
        and ulsam.edits_of(names["inference"]) == ulsam.edits_of(names["repvit"])
        and all(Path(name).stat().st_size > 100_000 for name in ("model.pt2", "model.onnx"))
    ),
}


def _places(model: torch.nn.Module) -> list[str]:
    return [name for name, part in model.named_modules() if isinstance(part, ulsam.ULSAM)]


def blocks(page: Path, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def test_every_page_with_python_promises_something():
    assert {page.name for page in PAGES if blocks(page, "python")} == set(PROMISES)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in PROMISES])
def test_python_examples_do_what_they_promise(name, tmp_path, monkeypatch, capsys):
    page = next(page for page in PAGES if page.name == name)
    for library in NEEDED.get(name, ()):
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile("\n".join(blocks(page, "python")), name, "exec"), names)
    assert PROMISES[name](names, capsys.readouterr().out)


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each ulsam command, from its verb on."""
    for text in blocks(page, "sh", ""):
        for line in text.replace("\\\n", " ").splitlines():
            if re.match(r"(torchrun .*-m )?ulsam ", line.strip()):
                words = shlex.split(line, comments=True)
                yield words[words.index("ulsam") + 1 :]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_parse(page):
    for words in commands(page):
        assert parse(words).command == words[0]


def test_what_the_comparison_says_is_here_exists(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [line.split("|")[2] for line in (ROOT / "docs" / "compared.md").read_text().splitlines() if "|" in line]
    spans = [span for row in rows for span in re.findall(r"`([^`]*)`", row)]
    for verb in COMMANDS:
        with pytest.raises(SystemExit):
            parse([verb, "--help"])
    options = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    for span in spans:
        words = span.split()
        assert set(re.findall(r"(?<![\w-])--[a-z-]+", span)) <= options, span
        assert words[0] != "ulsam" or words[1] in COMMANDS, span
        if name := re.match(r"ulsam\.(\w+)", span):
            assert name[1] in dir(ulsam), span


def test_every_verb_is_shown_somewhere():
    shown = {words[0] for page in PAGES for words in commands(page)}
    assert shown >= set(COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_and_images_exist(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_site_shows_every_page():
    assert set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text())) == {
        page.name for page in DOCS.glob("*.md")
    }


def test_make_targets_that_the_pages_name_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.MULTILINE)}
    assert named - targets == set()


def test_files_that_the_page_about_the_inside_names_exist():
    text = (DOCS / "inside.md").read_text()
    names = re.findall(r"`((?:layer|surgery|model|training|study|explanation|deploy|benchmarks)/[\w./]*)`", text)
    assert len(names) > 20
    assert [name for name in names if not any((root / name).exists() for root in (ROOT / "src/ulsam", ROOT))] == []


def test_messages_that_troubleshooting_explains_exist():
    said = "\n".join(
        node.value
        for path in (ROOT / "src/ulsam").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    rows = re.findall(r"^\| `(.+?)` \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    parts = [part.strip() for row in rows for part in row.split("...")]
    assert len(rows) > 50
    assert [part for part in parts if part not in said] == []


def sentences(text: str) -> Iterator[int]:
    """The words of each sentence of a page: no tables, code, headings or generated parts."""
    text = re.sub(rf"{GENERATED}|^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`]*`", "code", text))
    for part in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", text):
        if not part.strip().startswith(("#", "|", "-" * 3)):
            for sentence in re.split(r"(?<=[.!?:])\**\s+(?=[A-Z`*\"(])", " ".join(part.split())):
                if words := [word for word in sentence.split() if re.search(r"\w", word)]:
                    yield len(words)


GENERATED = r"<!-- (\w+) -->.*?<!-- /\1 -->"


@pytest.mark.parametrize("name", ["README.md", "docs/results.md"])
def test_intervals_in_sentences_stand_in_a_table(name):
    """An interval "(+0.98 to +2.21)" is one of the tables', in points, or that of the opposite difference."""
    text = (ROOT / name).read_text()
    tables = "".join(found[0] for found in re.finditer(GENERATED, text, re.DOTALL))
    said = re.findall(r"\(([+-][\d.]+)\s+to\s+([+-][\d.]+)\)", re.sub(GENERATED, "", text, flags=re.DOTALL))
    assert said
    for low, high in said:
        assert f"[{low}, {high}]" in tables or f"[{-float(high):+.2f}, {-float(low):+.2f}]" in tables, (low, high)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=[*IDS, "CHANGELOG.md"])
def test_sentences_are_short(page):
    lengths = list(sentences(page.read_text()))
    assert statistics.mean(lengths) <= 20
    assert max(lengths) <= 45


def test_the_readme_is_read_in_five_minutes():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    assert len([line for line in lines if re.match(r"\| .*\] \|$|\| base ", line)]) <= 5


def test_versions_agree():
    assert f"\nversion: {ulsam.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{ulsam.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


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


@pytest.mark.slow
def test_a_page_that_was_changed_by_hand_is_noticed(copied, capsys):
    page = copied / "docs" / "results.md"
    page.write_text(page.read_text().replace("| base | 2.352 M |", "| base | 1.352 M |"))
    assert load_benchmark("tables").main(copied, check=True) == 1
    assert capsys.readouterr().out.splitlines() == [
        "docs/results.md and results/ disagree: run python benchmarks/tables.py"
    ]


@pytest.mark.slow
def test_a_run_that_was_changed_by_hand_is_noticed(copied, capsys):
    tables = load_benchmark("tables")
    file = copied / "results" / "rates_cub100.jsonl.gz"
    runs = read_packed(file)
    runs["arms/base/seed-0/summary.json"]["scores"]["top1"] += 0.01
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
