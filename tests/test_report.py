"""The page about runs: what it shows is what the runs' files hold, and what their models say of the images."""

import csv
import dataclasses
import io
import json
import os
import re
import shutil
from collections import Counter
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from tiny import SETTINGS, draw_splits
from ulsam.cli import main
from ulsam.deploy.predict import predict
from ulsam.explanation.run_differences import differences
from ulsam.explanation.run_latency import time_runs
from ulsam.explanation.run_page import change, quantity
from ulsam.explanation.trained_runs import Result, TrainedRun, read_runs
from ulsam.training.config import TrainConfig
from ulsam.training.train import train

CHROMIUM = os.environ.get("ULSAM_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
EVIL = '<img src=x onerror="alert(1)">'
NAMES = ("base", "slim & <i>thin<")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of three classes, one of a strange name, and two finished runs on them, with and without an edit.

    Five images lie in a wrong folder, so the models make errors both ways; the second one has learned less.
    """
    folder = tmp_path_factory.mktemp("report")
    data = draw_splits(folder / "data", train=24, val=12, noise=120)
    for split in ("train", "val"):
        (data / split / "class1").rename(data / split / EVIL)
    for label, other, numbers in ((0, 2, (0, 1)), (2, 0, (5, 6)), (0, 1, (9,))):
        for number in numbers:
            names = [data / "val" / ("class0", EVIL, "class2")[index] for index in (label, other)]
            (names[0] / f"{number:03}.png").rename(names[1] / f"moved{number}.png")
    for name, edits, lr in zip(NAMES, ([], ["insert blocks.2 g=4"]), (0.05, 0.015), strict=True):
        settings = {**SETTINGS, "data": str(data), "edits": edits, "lr": lr, "val_every": 2}
        train(TrainConfig(**settings), folder / name)
    return folder


def report(root: Path, out: Path, *words: str, runs: tuple[str, ...] = NAMES, code: int = 0) -> str:
    argv = [
        "report",
        *(str(root / name) for name in runs),
        "--out",
        str(out),
        *(["--replace"] * (code == 0 and out.exists())),
        *words,
    ]
    assert main(argv) == code
    return out.read_text() if code == 0 else ""


def summary(run: Path) -> dict:  # type: ignore[type-arg]
    return json.loads((run / "summary.json").read_text())


def words_of(html: str) -> str:
    """What a person reads of a piece of HTML, in one line."""
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).split())


def section(text: str, name: str) -> str:
    """From a heading to the next one."""
    found = re.search(rf'<h2 id="{name}">.*?(?=<h2|<footer)', text, re.DOTALL)
    assert found, name
    return found[0]


def rows_of(html: str) -> list[list[str]]:
    """The body cells of the tables in it."""
    bodies = re.findall(r"<tbody>(.*?)</tbody>", html, re.DOTALL)
    lines = re.findall(r"<tr[^>]*>(.*?)</tr>", "".join(bodies), re.DOTALL)
    return [[words_of(cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", line, re.DOTALL)] for line in lines]


def test_figures_are_those_of_the_runs(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = report(root, tmp_path / "page.html", "--no-images")
    printed = capsys.readouterr().out
    found = [summary(root / name) for name in NAMES]
    cards = re.findall(r"<article.*?</article>", section(text, "runs"), re.DOTALL)
    assert len(cards) == 2 and "<img" not in text and "Confusions</h2>" not in text
    for key, name, card, run in zip("AB", NAMES, cards, found, strict=True):
        read, scores = words_of(card), run["scores"]
        low, high = scores["top1_interval_95"]
        assert f"{key} {name}" in read
        assert f"{100 * scores['top1']:.2f} % top-1, validation" in read
        assert f"95 % interval {100 * low:.1f} to {100 * high:.1f}, over the choice of the 36 images" in read
        assert f"top-5 {100 * scores['top5']:.2f} % loss {scores['loss']:.4f}" in read
        assert f"parameters {quantity(run['cost']['params'])} MACs {quantity(run['cost']['macs'])}" in read
        assert f"{name}: top-1 {100 * scores['top1']:.2f} %" in printed
    cost = rows_of(section(text, "cost"))
    assert len(cost) == 2  # the first run is the base model of the second one
    for cells, run in zip(cost, found, strict=True):
        for cell, what in zip(cells[1:], ("params", "macs", "activations"), strict=True):
            now, base = run["cost"][what], run["base_cost"][what]
            assert cell == f"{quantity(now)} {change(now, base)}"
    assert cost[0][1].endswith("as base") and re.search(r"\+\d+\.\d %$", cost[1][1])
    for number, name, images, *top1 in rows_of(section(text, "classes")):
        assert sorted(found[0]["scores"]["per_class"]).index(name) == int(number) - 1
        for cell, run in zip(top1, found, strict=True):
            entry = run["scores"]["per_class"][name]
            assert (int(images), cell) == (entry["images"], f"{100 * entry['top1']:.1f} %")
    lines = []
    for key, name in zip("AB", NAMES, strict=True):
        for row in csv.DictReader((root / name / "metrics.csv").open()):
            measured = row["val_loss"] and f"{float(row['val_loss']):.4f}"
            lines.append([key, row["epoch"], f"{float(row['train_loss']):.4f}", measured or "–"])
    assert [[*cells[:2], *cells[3:5]] for cells in rows_of(section(text, "curves"))] == lines
    assert "--config" in section(text, "repeat") and str(root / "base" / "config.yaml") in text
    settings = rows_of(section(text, "repeat"))
    assert settings[:2] == [["edits", "none", "insert blocks.2 g=4"], ["lr", "0.05", "0.015"]]
    assert all(first == second for _, first, second in settings[2:])


def guesses_of(root: Path, name: str) -> dict[str, tuple[str, str]]:
    """The true and the named class of every validation image, the plain way."""
    paths = sorted((root / "data" / "val").rglob("*.png"))
    found = predict(root / name / "model.safetensors", [str(path) for path in paths], top=1)
    return {path.as_posix(): (path.parent.name, one.classes[0][0]) for path, one in zip(paths, found, strict=True)}


def test_confusions_are_those_of_the_models(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = report(root, tmp_path / "page.html")
    assert "note" not in capsys.readouterr().out
    plain = {key: guesses_of(root, name) for key, name in zip("AB", NAMES, strict=True)}
    classes = sorted({truth for truth, _ in plain["A"].values()})
    tables = re.findall(r'<table class="counts">.*?</table>', section(text, "confusions"), re.DOTALL)
    totals: Counter[tuple[str, ...]] = Counter()
    for table, pairs in zip(tables, plain.values(), strict=True):
        counts = Counter(pairs.values())
        expected = [[str(counts[a, b] or "") for b in classes] for a in classes]
        assert [cells[1:] for cells in rows_of(table)] == expected
        totals += Counter(tuple(sorted(pair)) for pair in pairs.values() if pair[0] != pair[1])
    articles = re.findall(r'<article class="pair">.*?</article>', text, re.DOTALL)
    ranked = sorted(totals, key=lambda pair: (-totals[pair], pair))
    assert ranked and len(articles) == len(ranked)
    for article, (first, second) in zip(articles, ranked, strict=True):
        read = words_of(article)
        assert read.startswith(f"{first} ↔ {second} ")
        for key, pairs in plain.items():
            counts = Counter(pairs.values())
            one, other = counts[first, second], counts[second, first]
            assert f"{key} {one + other} error" in read
            assert f"{one} × {first} predicted as {second}, {other} × the reverse" in read
        wrong = [
            path for path, (truth, _) in plain["A"].items()
            if any((truth, pairs[path][1]) in ((first, second), (second, first)) for pairs in plain.values())
        ]  # fmt: skip
        good = {
            truth for path, (truth, _) in plain["A"].items() if all(p[path][0] == p[path][1] for p in plain.values())
        }
        assert article.count("<figure>") == min(6, len(wrong))
        assert article.count('<figure class="reference">') == len({first, second} & good)
    for cells in rows_of(section(text, "classes")):
        for key, cell in zip("AB", cells[4::2], strict=True):
            taken = Counter(named for truth, named in plain[key].values() if truth == cells[1] != named)
            if not taken:
                assert not cell
            else:
                name, count = re.fullmatch(r"(.*) \((\d+)\)", cell).groups()  # type: ignore[union-attr]
                assert taken[name] == int(count) == max(taken.values())
    samples = section(text, "samples")
    verdicts = re.findall(r'<article [^>]*data-verdict="(\w+)"', samples)
    assert len(verdicts) == 6 and verdicts[3:] == ["right"] * 3 and {*verdicts[:3]} <= {"wrong", "unknown"}
    assert "B: blocks.2" in samples and "A: blocks" not in samples  # only the second model has attention maps


class Tags(HTMLParser):
    """The tags of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_needs_nothing_else_and_escapes_every_name(root: Path, tmp_path: Path) -> None:
    text = report(root, tmp_path / "page.html")
    assert EVIL not in text and EVIL in unescape(text) and "<i>" not in text and "<script" not in text
    plain = re.sub(r"data:image/\w+;base64,[\w+/=]*", "", text)
    assert not re.search(r"(?:https?:)?//|@import|<link|<iframe|<base", plain)
    ids = [attributes["id"] for _, attributes in Tags(text).found if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in Tags(text).found:
        assert not {"onload", "onerror", "srcset", "srcdoc", "action"} & attributes.keys()
        assert attributes.get("src", "data:image/").startswith("data:image/"), tag
        assert (attributes.get("href") or "#")[1:] in ["", *ids]
        assert tag != "img" or attributes.get("alt")
        assert attributes.get("role") != "img" or {"aria-label", "aria-labelledby"} & attributes.keys()
        assert set((attributes.get("aria-labelledby") or "").split()) <= set(ids)
    assert all(target.startswith("data:image/") for target in re.findall(r"url\((.*?)\)", text))


def test_a_report_is_not_replaced_unasked(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.html"
    out.write_text("mine")
    report(root, out, "--no-images", code=2)
    assert capsys.readouterr().err == f"ulsam: error: {out} exists: name another --out, or give --replace\n"
    assert out.read_text() == "mine"
    assert "<h1>2 training runs</h1>" in report(root, out, "--no-images", "--replace")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_on_paper_and_on_a_phone_nothing_is_lost(root: Path, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    out = tmp_path / "report.html"
    report(root, out)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
        page.goto(out.as_uri())
        table = page.locator(".scroll.whole").first
        table.scroll_into_view_if_needed()
        assert table.evaluate("it => it.scrollWidth > it.clientWidth + 20")

        def shadows() -> list[bool]:
            """Whether the left and the right edge of the table, below its head, are unlike the page."""
            image = Image.open(io.BytesIO(table.screenshot())).convert("L")
            y = image.height - 6
            paper = image.getpixel((image.width // 2, y))
            return [abs(image.getpixel((x, y)) - paper) > 20 for x in (3, image.width - 4)]

        assert shadows() == [False, True]
        table.evaluate("it => it.scrollTo(it.scrollWidth, 0)")
        page.wait_for_timeout(200)
        assert shadows() == [True, False]
        page.emulate_media(media="print")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        lost = page.evaluate(
            """() => [...document.querySelectorAll("body *")].filter((it) => {
                const style = getComputedStyle(it), box = it.getBoundingClientRect();
                const drawn = style.backgroundImage !== "none" || it.localName === "img";
                return (drawn && style.printColorAdjust !== "exact")
                    || (it.localName === "img" && !(it.complete && it.naturalWidth && box.width))
                    || (it.matches(".scroll") && (style.overflowX !== "visible" || style.maxHeight !== "none"));
            }).map((it) => it.outerHTML.slice(0, 80))"""
        )
        assert lost == []
        assert page.pdf().count(b"/Subtype /Image") >= 8
        browser.close()


def test_differences_are_paired_by_image(root: Path, tmp_path: Path) -> None:
    text = report(root, tmp_path / "page.html", "--no-images")
    plain = [guesses_of(root, name) for name in NAMES]
    right = [[truth == named for truth, named in guesses.values()] for guesses in plain]
    only_a = sum(a and not b for a, b in zip(*right, strict=True))
    only_b = sum(b and not a for a, b in zip(*right, strict=True))
    (row,) = rows_of(section(text, "differences"))
    assert row[0] == "B minus A"
    assert row[1] == f"{100 * (only_b - only_a) / 36:+.2f}".replace("-", "−")
    assert row[-2:] == [str(only_b), str(only_a)]
    runs = read_runs([root / name for name in NAMES])
    (pair,) = differences(runs)
    assert pair.gap and pair.gap.low is not None and pair.gap.over == "images"
    assert pair.gap.low < pair.gap.mean < (pair.gap.high or 0)
    other = dataclasses.replace(runs[1], result=_with(runs[1], split="test"))
    (pair,) = differences([runs[0], other])
    assert pair.gap is None and "their split differs" in pair.why_not
    unknown = dataclasses.replace(runs[1], result=_with(runs[1], outcomes=None))
    (pair,) = differences([runs[0], unknown])
    assert pair.gap and pair.gap.low is None and pair.only_run is None
    three = [dataclasses.replace(runs[0], number=number) for number in range(3)]
    assert [(one.run.key, one.minus.key) for one in differences(three)] == [("B", "A"), ("C", "A"), ("C", "B")]


def _with(run: TrainedRun, **entries: object) -> Result:
    assert run.result
    return dataclasses.replace(run.result, summary={**run.result.summary, **entries})


def test_images_that_are_gone_are_reported(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, away = root / "data", root / "away"
    data.rename(away)
    try:
        text = report(root, tmp_path / "page.html")
        message = f"no confusions and no images of A, B: no such folder: {data}"
        assert message in words_of(text) and message in capsys.readouterr().out
        assert "<img" not in text and f"{100 * summary(root / 'base')['scores']['top1']:.2f} %" in text
        back = report(root, tmp_path / "page.html", "--data", str(away))
        assert "<img" in back and "no confusions" not in back
        image = next((away / "val" / "class0").iterdir())
        image.rename(image.with_name("other.png"))
        text = report(root, tmp_path / "page.html", "--data", str(away))
        assert "holds other images than those that it was measured on" in text and "<img" not in text
        image.with_name("other.png").rename(image)
        shutil.copy(image, image.with_name("more.png"))
        text = report(root, tmp_path / "page.html", "--data", str(away))
        assert "no longer holds the 36 validation images of 3 classes" in text
        image.with_name("more.png").unlink()
    finally:
        away.rename(data)


def test_outcomes_that_are_others_now_are_counted(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "base", tmp_path / "base")
    entry = summary(root / "base")
    bits = bytearray.fromhex(entry["outcomes"]["right"])
    bits[0] ^= 0b10000001
    entry["outcomes"]["right"] = bits.hex()
    (tmp_path / "base" / "summary.json").write_text(json.dumps(entry))
    text = report(tmp_path, tmp_path / "page.html", runs=("base",))
    assert "here 2 of 36 images come out otherwise than in the run" in words_of(text) and "<img" in text


def test_a_run_that_is_not_finished_shows_what_there_is(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, epochs in (("begun", 0), ("stopped", 1)):
        (tmp_path / name).mkdir()
        shutil.copy(root / "base" / "config.yaml", tmp_path / name)
        if epochs:
            lines = (root / "base" / "metrics.csv").read_text().splitlines(keepends=True)
            (tmp_path / name / "metrics.csv").write_text("".join(lines[: 1 + epochs]))
    runs = [str(tmp_path / "stopped"), str(tmp_path / "begun"), str(root / "base")]
    assert main(["report", *runs, "--out", str(tmp_path / "page.html")]) == 0
    printed, text = capsys.readouterr().out, (tmp_path / "page.html").read_text()
    assert re.search(r"^A .*stopped: not finished: 1 of 2 epochs$", printed, re.MULTILINE)
    assert "not finished: 0 of 2 epochs" in words_of(section(text, "runs"))
    assert [cells[0] for cells in rows_of(section(text, "curves"))] == ["A", "C", "C"]
    assert "<img" in text and "no confusions and no images of A, B: the run is not finished" in words_of(text)
    assert main(["report", runs[1], "--replace", "--out", str(tmp_path / "page.html")]) == 0
    alone = (tmp_path / "page.html").read_text()
    assert "not finished: 0 of 2 epochs" in alone and "<svg" not in alone and 'id="cost"' not in alone


def test_a_model_without_a_spec_has_figures_and_no_images(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "base", tmp_path / "prepared")
    (tmp_path / "prepared" / "model.safetensors").unlink()
    (tmp_path / "prepared" / "summary.json").write_text(json.dumps({**summary(root / "base"), "prepared": True}))
    text = report(tmp_path, tmp_path / "page.html", runs=("prepared",))
    assert "no spec builds its model" in text and "made again" not in text
    assert f"{100 * summary(root / 'base')['scores']['top1']:.2f} %" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data"], "data is not the folder of a run: there is neither summary.json nor config.yaml in it"),
        (["."], "is not the folder of a run: .* in it; it holds runs, name these: .*base"),
        (["nothing"], "no such folder: .*nothing"),
        (["base", "base/../base"], "base is named twice"),
        (["base", "others"], "base and .*others have other classes, .*: only .*base has '<img"),
        (["damaged"], "damaged/summary.json is damaged, or not of a run: KeyError 'scores'"),
        (["short"], "short/summary.json is damaged, or not of a run: ValueError its outcomes are not those of all"),
        (["cut"], "cut/metrics.csv is damaged, or not of a run: ValueError"),
        (["base", "--out", "page.txt"], "the report is a page: name it .*page.html, not "),
        (["base", "--out", "base/summary.json"], "the report is a page"),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(
    root: Path, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = summary(root / "base")
    other = json.loads(json.dumps(entry).replace(json.dumps(EVIL), '"wren"'))
    short = {**entry, "outcomes": {**entry["outcomes"], "right": "ff"}}
    damaged = {name: value for name, value in entry.items() if name != "scores"}
    for name, content in (("others", other), ("damaged", damaged), ("short", short)):
        (root / name).mkdir(exist_ok=True)
        (root / name / "summary.json").write_text(json.dumps(content))
    (root / "cut").mkdir(exist_ok=True)
    shutil.copy(root / "base" / "config.yaml", root / "cut")
    (root / "cut" / "metrics.csv").write_text((root / "base" / "metrics.csv").read_text().replace("1,0", "one,0", 1))
    before = sorted(path for path in root.rglob("*") if path.is_file())
    given = words if "--out" in words else [*words, "--out", "new/page.html"]
    assert main(["report", *(word if word.startswith("--") else str(root / word) for word in given)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ulsam: error: ") and error.count("\n") == 1 and re.search(message, error)
    assert sorted(path for path in root.rglob("*") if path.is_file()) == before and not (root / "new").exists()


@pytest.mark.slow
def test_latency_is_that_of_the_model_beside_its_base(root: Path, tmp_path: Path) -> None:
    times = time_runs(read_runs([root / name for name in NAMES]))
    assert times and times.runs["A"] == times.bases["A"] == times.bases["B"]
    assert 0 < times.runs["B"]["seconds"] < 5 and times.runs["B"]["turns"] >= 15
    text = report(root, tmp_path / "page.html", "--time", "--no-images")
    assert re.search(r"\d ms × \d\.\d\d", words_of(section(text, "cost")))
