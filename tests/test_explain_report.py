"""Panels, figures and the report: what they show is what was found, and whatever a file or a class is called."""

import json
import re
import signal
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scripts import load_benchmark
from tiny import TINY_MODEL, draw, warm
from ulsam.cli import main
from ulsam.data.birds import draw_birds
from ulsam.explanation import Explanation, LayerMaps
from ulsam.explanation.drawing import STRENGTH, colored, grayed, overlaid, palette
from ulsam.explanation.explain_images import panel_name
from ulsam.explanation.explain_page import MAX_CARDS, card, page
from ulsam.explanation.explainer import Explainer
from ulsam.explanation.image_list import list_images, reading_order
from ulsam.explanation.measured_batches import explained
from ulsam.explanation.panel import HEAD, IMAGE, MARGIN, TILE, panel
from ulsam.model.build import build, make_spec, save
from ulsam.model.spec import Edit

CLASSES = ["class0", "class1", "class2"]


def found(
    *groups: int, classes: tuple[str, ...] = ("wren", "robin"), size: int = 64, peak: tuple[int, int] = (1, 2)
) -> Explanation:
    """An explanation of a gray image with layers of so many maps of 4 x 4, all of them with this peak."""
    maps = np.full((4, 4), 0.5 / 15, np.float32)
    maps[peak] = 0.5
    layers = tuple(LayerMaps(f"blocks.{n}", None, "equations", np.stack([maps] * g)) for n, g in enumerate(groups))
    shares = np.array([0.7, 0.3] + [0.0] * (len(classes) - 2), np.float32)
    cam = np.zeros((4, 4), np.float32)
    cam[peak] = 1
    return Explanation(np.full((size, size, 3), 90, np.uint8), classes, shares, 0, layers, cam, "bn2")


# ------------------------------------------------------------------------------------------ panels


def test_a_map_on_an_image_has_its_colors_where_its_values_are() -> None:
    values = np.array([[0.0, 1.0], [0.5, 0.25]])
    large = colored(values, (200, 100))
    for (row, column), value in np.ndenumerate(values):
        assert np.array_equal(large[99 * row, 199 * column], palette()[round(255 * value)])
    gray = grayed(np.full((50, 100, 3), (200, 20, 20), np.uint8), 200)
    assert (gray.size, gray.mode) == ((200, 100), "L")
    expected = (1 - STRENGTH) * np.asarray(gray)[..., None] + STRENGTH * large
    assert np.abs(np.asarray(overlaid(gray, values)) - expected).max() <= 1.5


def test_a_panel_holds_the_image_the_maps_and_a_row_for_each_layer() -> None:
    one = found(4, 2)
    drawn = np.asarray(panel(one, title="a.jpg", truth="robin"))
    assert (drawn[HEAD : HEAD + IMAGE, MARGIN : MARGIN + IMAGE] == 90).all()
    hot = (np.abs(drawn.astype(int) - ((1 - STRENGTH) * 90 + STRENGTH * palette()[255])).max(2) <= 15).nonzero()
    lines = sorted({(y - HEAD) // (TILE + 40) for y in hot[0]})
    assert len(lines) == 3  # the CAM and two layers
    tall = [panel(found(*groups)).height for groups in ((), (4,), (4, 4), (4, 4, 4))]
    assert tall[1] <= tall[2] < tall[3]
    widths = [panel(found(groups)).width for groups in (1, 4, 5, 8, 16)]
    assert widths[0] == widths[1] < widths[2] == widths[3] == widths[4]
    assert panel(found(16, 16)).height > panel(found(8, 8)).height


def test_a_panel_of_two_models_shows_both_and_says_what_is_wrong() -> None:
    wrong, right = (
        np.asarray(panel(found(), found(peak=(3, 0)), truth=truth)).astype(int) for truth in ("robin", "wren")
    )
    alone = np.asarray(panel(found(), truth="wren")).astype(int)
    assert (wrong[50:64] != right[50:64]).any()
    x = MARGIN + IMAGE + 36 + TILE + 10  # where the base model's CAM is
    assert (right[HEAD + 30 : HEAD + TILE, x : x + TILE].std((0, 1)) > 5).any()
    assert (alone[HEAD + 30 : HEAD + TILE, x + 70 : x + TILE] == 255).all()


def test_any_size_name_and_number_of_classes_fits(tmp_path: Path) -> None:
    classes = tuple(f"a very long name of a class, number {n}, with <tags> & 鳥" for n in range(12))
    one = found(3, classes=classes)
    assert panel(one, title="x" * 500, truth=classes[0]).width == panel(found(3)).width
    wide = Explanation(np.zeros((40, 90, 3), np.uint8), ("a",), np.ones(1, np.float32), 0, (), np.ones((2, 5)), "x")
    panel(wide).save(tmp_path / "wide.png")
    figure = wide.figure()
    figure.savefig(tmp_path / "figure.png")
    assert Image.open(tmp_path / "figure.png").width > 300


def test_a_figure_has_every_map_on_one_scale_a_layer() -> None:
    one = found(4, 9)
    figure = one.figure()
    drawn = [image for axes in figure.axes for image in axes.get_images() if image.get_array().shape == (4, 4)]
    assert len(drawn) == 1 + 4 + 9
    for image in drawn[1:]:
        assert np.allclose(image.get_array(), one.layers[0].maps[0] * 16 / 8)
        assert image.get_clim() == (0, 1)
    words = "\n".join(text.get_text() for axes in figure.axes for text in (*axes.texts, axes.title))
    assert "70 %" in words and "for wren" in words and "peak 8.00×" in words


# ------------------------------------------------------------------------------------------ the page


class Reader(HTMLParser):
    """The tags of a page, and the text that a person sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_else_and_escapes_every_name() -> None:
    evil = '<script>alert("1")</script>'
    classes = (evil, "'\" onload=alert(2) x='")
    cards = [card(f"{evil}.jpg", classes[1], found(2, classes=classes), found(classes=classes, size=32), panel=evil)]
    text = page(cards, model=evil, base=evil, unreadable=[evil], numbers=evil, command=evil, versions=evil)
    read = Reader(text)
    assert "<script" not in text and evil in read.text
    assert not re.search(r"(?:https?:)?//|@import|<link|<iframe|<base", text)
    for tag, attributes in read.tags:
        assert not {"onload", "onerror", "srcset", "srcdoc", "action"} & attributes.keys()
        assert attributes.get("src", "data:image/").startswith("data:image/"), tag
        assert attributes.get("href", "#").startswith("#")
        assert tag != "img" or attributes.get("alt")
    assert all(target.startswith("data:image/") for target in re.findall(r"url\((.*?)\)", text))
    assert sum(tag == "img" for tag, _ in read.tags) == 2 + 2
    ids = {attributes["id"] for _, attributes in read.tags if "id" in attributes}
    assert {attributes["href"][1:] for _, attributes in read.tags if attributes.get("href")} <= ids


def test_a_long_page_lists_all_and_shows_the_first() -> None:
    one = card("1.jpg", None, found(1))
    text = page([one] * (MAX_CARDS + 3), model="a model")
    assert text.count("<article") == MAX_CARDS
    assert text.count("<tr data-verdict") == MAX_CARDS + 3
    assert f"The first {MAX_CARDS} are shown" in text
    assert "The true classes are not known." in text


def test_a_model_without_ulsam_says_so() -> None:
    text = page([card("1.jpg", "wren", found())], model="a model")
    assert "no ULSAM layer" in text and "1 image." in text and "0 of the 1 whose class is known are wrong" in text


def test_errors_come_first_and_folders_name_the_class(tmp_path: Path) -> None:
    shown = [("a", "a", 0.6), ("a", "b", 0.4), (None, "a", 0.9), ("a", "b", 0.8), (None, "b", 0.3), ("b", "b", 0.5)]
    assert [share for *_, share in sorted(shown, key=lambda one: reading_order(*one))] == [0.8, 0.4, 0.3, 0.9, 0.5, 0.6]
    draw(tmp_path / "a" / "class9", 1, classes=2)
    root = tmp_path / "a"
    listed = list_images([str(root)], CLASSES)
    assert [(one.name, one.truth) for one in listed] == [
        ("a/class9/class0/000.png", "class0"), ("a/class9/class1/000.png", "class1"),
    ]  # fmt: skip
    inner = root / "class9" / "class0"
    assert list_images([str(inner)], CLASSES)[0].truth == "class0"
    assert list_images([str(inner / "000.png")], CLASSES)[0].truth == "class0"
    assert list_images([str(root)], ["a", "class9"])[0].truth == "class9"
    assert list_images([str(inner)], ["a"])[0].truth is None  # that folder was not named
    names = {panel_name(number, 10, name) for number, name in enumerate(["a/1.jpg", "b/1.jpg", "a/1.png", "é/1.jpg"])}
    assert len(names) == 4
    assert panel_name(1, 9, "../../etc/" + "é" * 300 + ".jpg") == "1-" + "_" * 60 + ".png"


# ------------------------------------------------------------------------------------------ the command line


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a ULSAM layer, one without, and two folders of images of the same names, one image broken."""
    folder = tmp_path_factory.mktemp("explain")
    for name in ("here", "there"):
        draw(folder / name, 3)
    (folder / "here" / "class1" / "bad.png").write_bytes(b"no image")
    torch.manual_seed(0)
    for name, edits, size in (("model", [Edit("insert", "blocks.2", 4)], 64), ("plain", [], 48)):
        spec = make_spec(TINY_MODEL, CLASSES, edits, size=size)
        model, _ = build(spec)
        torch.nn.init.normal_(model.classifier.weight)
        save(model, spec, folder / f"{name}.safetensors")
    return folder


def test_a_folder_becomes_panels_a_report_and_numbers(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = root / "out"
    words = ["explain", str(root / "model.safetensors"), str(root / "here"), str(root / "there")]
    assert main([*words, "--against", str(root / "plain.safetensors"), "--out", str(out), "--numbers"]) == 2
    printed = capsys.readouterr()
    note, error = printed.err.splitlines()
    assert note.startswith("note    nothing says that the model was not trained on these images")
    assert error == "ulsam: error: 1 of 19 images could not be read; they are named above"
    assert re.search(r"^unreadable .*bad\.png: not an image", printed.out, re.MULTILINE)
    panels = sorted((out / "panels").iterdir())
    assert len(panels) == len({path.read_bytes() for path in panels}) == 18
    assert all(Image.open(path).format == "PNG" for path in panels)
    assert sorted(path.name for path in out.iterdir()) == ["numbers.json", "panels", "report.html"]

    text = (out / "report.html").read_text()
    rows = re.findall(r'<tr data-verdict="(\w+)">.*?#n\d+">(.*?)</a>.*?<td class="number">([^<]*) %', text, re.DOTALL)
    verdicts = [verdict for verdict, _, _ in rows]
    assert len(rows) == 18 and verdicts == sorted(verdicts, reverse=True)  # wrong before right
    wrong = verdicts.count("wrong")
    assert f"18 images, {wrong} of 18 with a known class wrong: {out / 'report.html'}" in printed.out
    shares = [float(share.strip("<> ")) for verdict, _, share in rows if verdict == "wrong"]
    assert wrong > 0 and shares == sorted(shares, reverse=True)
    assert {name for _, name, _ in rows} == {
        f"{a}/class{b}/00{c}.png" for a in ("here", "there") for b in range(3) for c in range(3)
    }
    assert "bad.png: not an image" in Reader(text).text

    numbers = json.loads((out / "numbers.json").read_text())
    assert numbers["models"]["this model"]["images"] == 18
    assert len(numbers["models"]["this model"]["layers"]) == 1 and numbers["models"]["base"]["layers"] == []
    deletion = numbers["models"]["base"]["cam"]["deletion"]["mean"]
    assert f"{deletion:.3f} ± " in printed.out and f"{deletion:.3f} ± " in text


def test_a_model_alone_and_images_of_unknown_class(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "loose").mkdir()
    (root / "loose" / "a & b.png").write_bytes((root / "here" / "class0" / "000.png").read_bytes())
    out = root / "alone"
    assert main(["explain", str(root / "plain.safetensors"), str(root / "loose"), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"1 image: {out / 'report.html'}\n"
    text = (out / "report.html").read_text()
    assert "no ULSAM layer" in text and "loose/a &amp; b.png" in text
    assert [path.name for path in (out / "panels").iterdir()] == ["1-a___b.png"]


def test_each_model_is_given_images_of_its_own_size(root: Path) -> None:
    """A third model with the size of the first one, behind another one of another size."""
    draw(root / "sized", 2)
    explainers = []
    for size in (32, 48, 32):
        spec = make_spec(TINY_MODEL, CLASSES, size=size)
        explainers.append(Explainer(build(spec)[0], spec))
    images = list_images([str(root / "sized")], CLASSES)
    (batch,) = explained(images, explainers, [])
    assert [[one.pixels.shape[:2] for one in each.explanations] for each in batch] == [
        [(32, 32), (48, 48), (32, 32)]
    ] * 6


def test_models_of_different_classes_do_not_compare(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = make_spec(TINY_MODEL, ["class0", "class1", "wren"], [], size=64)
    save(build(spec)[0], spec, root / "other.safetensors")
    words = ["explain", str(root / "model.safetensors"), str(root / "there")]
    assert main([*words, "--against", str(root / "other.safetensors"), "--out", str(root / "odd")]) == 0
    warning = "the models know different classes: only one has 'class2'"
    assert f"note {warning}" in capsys.readouterr().out
    assert warning in Reader((root / "odd" / "report.html").read_text()).text
    assert main([*words, "--against", str(root / "plain.safetensors"), "--out", str(root / "even")]) == 0
    assert "different classes" not in capsys.readouterr().out + (root / "even" / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.safetensors", "here/class1/bad.png"], "bad.png: not an image in a known format"),
        (["model.safetensors", "none.png"], "none.png: no such file or directory"),
        (["model.safetensors", "here", "--against", "no.safetensors"], "no model file .*no.safetensors"),
        (["no.safetensors", "here"], "no model file"),
        (["model.safetensors", "here", "--out", "here"], "here is not an empty folder: name one that does not exist"),
        (["model.safetensors", "here", "--out", "there/class0/000.png"], "000.png is not an empty folder"),
        (["model.safetensors", "here", "--out", "model.safetensors/x"], "cannot make the folder .*/x: Not a directory"),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(
    root: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = words if "--out" in words else [*words, "--out", "new"]
    assert main(["explain", *(word if word.startswith("--") else str(root / word) for word in given)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ulsam: error: ") and error.count("\n") == 1
    assert re.search(message, error)
    assert not (root / "new").exists()


def test_the_benchmark_writes_numbers_and_no_path(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = root / "explained.json"
    load_benchmark("explained").main(
        ["tiny", str(root / "model.safetensors"), str(root / "there"), "--images", "4", "--out", str(out)]
    )
    described = json.loads(out.read_text())
    assert (described["data"], described["images"], described["of"]) == ("there", 4, 9)
    model = described["models"]["this model"]
    assert model["images"] == 4 and set(model["layers"][0]["entropy_of_class"]) == set(CLASSES)
    assert f"{model['cam']['insertion']['mean']:.3f}" in capsys.readouterr().out
    assert str(root) not in out.read_text()


def test_tables_say_what_was_measured(root: Path, tmp_path: Path) -> None:
    tables = load_benchmark("tables_explain")
    birds = draw_birds(tmp_path / "birds", classes=2, train=1, val=2, size=64)
    model, plain = (str(root / f"{name}.safetensors") for name in ("model", "plain"))
    out = tmp_path / "explained_birds.json"
    load_benchmark("explained").main(["birds", model, str(birds / "val"), "--against", plain, "--out", str(out)])
    found = json.loads(out.read_text())["models"]["this model"]
    rows = [row.split(" | ") for row in tables.cam_table(tmp_path).splitlines()[2:]]
    assert [row[0] for row in rows] == ["| drawn birds, 4"] * 2
    apart = [found["cam"][name]["mean"] for name in ("deletion", "deletion_random")]
    assert float(rows[0][2]) == pytest.approx(apart[0], abs=5e-4)
    assert float(rows[0][3].split()[0]) == pytest.approx(apart[0] - apart[1], abs=5e-4)
    (row,) = tables.subspace_table(tmp_path).splitlines()[2:]
    assert [float(share) for share in row.split(" | ")[2].split(", ")] == pytest.approx(
        [100 * one["mean"] for one in found["layers"][0]["entropy_share"]], abs=0.05
    )
    marks = [row.split(" | ") for row in tables.mark_table(tmp_path).splitlines()]
    assert [row[0].strip("| ").partition(",")[0] for row in marks[3:]] == [
        "Grad-CAM++",
        *["attention"] * 4,
        "Grad-CAM++",
    ]
    names = list(found["marks"]["area"])
    own = found["marks"]["blocks.2.0.ulsam, map 3"]
    assert [float(cell.split(" ±")[0]) for cell in marks[6][1:]] == pytest.approx(
        [own[name]["times_area"] for name in names], abs=5e-3
    )
    classes = tables.class_table(tmp_path).splitlines()[2:]
    assert {row.split(" | ")[0].strip("| ") for row in classes} == found["layers"][0]["entropy_of_class"].keys()
    assert tables.waiting_table(tmp_path) == "Not measured yet."


@pytest.mark.slow
def test_the_speed_of_reports_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "explain_speed.json"
    load_benchmark("explain_speed").main(["--images", "4", "--size", "64", "--out", str(out)])
    described = json.loads(out.read_text())
    assert [case["images"] for case in described["cases"]] == [4, 4, 1]
    rates = [case["images"] / case["seconds"] for case in described["cases"]]
    assert [case["images_per_second"] for case in described["cases"]] == pytest.approx(rates)
    rows = load_benchmark("tables_explain").waiting_table(tmp_path).splitlines()
    assert len(rows) == 7 and f"{described['cases'][1]['images_per_second']:.1f} images a second" in rows[5]


@pytest.mark.slow
def test_ctrl_c_leaves_whole_files_alone(root: Path, tmp_path: Path) -> None:
    draw(tmp_path / "many", 120, size=64)
    out = tmp_path / "out"
    argv = ["explain", root / "model.safetensors", tmp_path / "many", "--out", out]
    with warm() as interpreter:
        pid = interpreter.start(argv, tmp_path / "log")
        deadline = time.monotonic() + 120
        while len(list(out.glob("panels/*.png"))) < 3:
            assert interpreter.poll(pid) is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.02)
        assert interpreter.kill(pid, signal.SIGINT) == 130
    assert (tmp_path / "log").read_text().endswith("ulsam: interrupted\n")
    assert not (out / "report.html").exists()
    files = [path for path in out.rglob("*") if path.is_file()]
    assert 3 <= len(files) < 360 and all(path.suffix == ".png" for path in files)
    for path in files:
        Image.open(path).load()
