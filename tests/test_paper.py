"""The paper's tables: every reduction agrees to the last printed digit, or its row says why not."""

import json
import re
from decimal import Decimal

import pytest

from ulsam.cli import main
from ulsam.model.paper import TABLES, PaperRow, report, rows
from ulsam.model.presets import PLACEMENTS

#: Which figures are off: table, model, and of the two columns the printed ones.
OFF = {
    ("Baselines", "mobilenetv2_100"): {"3.4M", "300M"},
    ("Replaced, ImageNet-1K", "ulsam_mobilenetv2_100_replace_14_17"): {"2.96M"},
    ("Replaced, ImageNet-1K", "ulsam_mobilenetv2_100_replace_16_17"): {"269.07M"},
    ("Replaced, fine-grained, V2", "ulsam_mobilenetv2_100_replace_13_14_16_17"): {"224.16M"},
}


@pytest.fixture(scope="module")
def found() -> list[PaperRow]:
    return rows()


def figures(row: PaperRow) -> list:
    return [figure for figure in (row.params, row.macs) if figure is not None]


def test_exactly_the_known_figures_are_off_and_say_why(found):
    off = {}
    for row in found:
        printed = {figure.printed for figure in figures(row) if not figure.agrees}
        if printed:
            off[row.table, row.name] = printed
            assert all(text in row.note for text in printed), row
    assert off == OFF
    explained = {(row.table, row.name or row.model) for row in found if row.note}
    assert explained == {*OFF, ("Attention modules at 512 x 14 x 14", "A2-Model")}


def test_agreement_means_every_printed_digit(found):
    for row in found:
        for figure in figures(row):
            digits = r"\d+(\.\d+)?[KM]"
            assert re.fullmatch(digits, figure.printed)
            assert len(figure.gives.partition(".")[2]) == len(figure.printed.partition(".")[2])
            assert figure.agrees == (figure.gives == figure.printed)


@pytest.mark.parametrize(
    ("model", "params", "macs"),
    [  # by hand: what the blocks cost, less ULSAM's 2m and 2m hw; V2 without BatchNorm's parameters
        ("ulsam_mobilenetv2_100_replace_14", 576 * (96 * 2 + 9) - 192, (576 * (96 * 2 + 9) - 192) * 196),
        ("ulsam_mobilenetv2_100_replace_17", 960 * (160 * 2 + 9) - 320, (960 * (160 * 2 + 9) - 320) * 49),
        ("ulsam_mobilenetv1_100_replace_12", 512 * (512 + 9) + 2048 - 1024, (512 * (512 + 9) - 1024) * 196),
        ("ulsam_mobilenetv1_050_replace_12", 256 * (256 + 9) + 1024 - 512, (256 * (256 + 9) - 512) * 196),
    ],
)
def test_the_counted_reductions_are_those_of_the_blocks(found, model, params, macs):
    for row in found:
        if row.name == model:
            assert (row.params.counted, row.macs.counted) == (-params, -macs)


def test_every_placement_and_table_appears(found):
    assert {row.name for row in found if row.place and row.name} == set(PLACEMENTS)
    assert {row.table for row in found} == set(TABLES)
    assert all(PLACEMENTS[row.name][1] == row.place for row in found if row.name in PLACEMENTS)
    count = {title: sum(row.table == title for row in found) for title in TABLES}
    assert list(count.values()) == [4, 4, 6, 1, 6, 6]


def test_the_stated_range_of_the_v2_base_is_right(found):
    """299.996M to 299.999M fit every V2 row of FLOPs but the two that are off; a step further does not."""
    fitting = [row.macs for row in found if "mobilenetv2" in row.name and row.place and row.macs.agrees]
    assert len(fitting) == 8

    def fits(base: str) -> bool:
        return all(
            (Decimal(base) + Decimal(figure.counted) / 1_000_000).quantize(Decimal("0.01"))
            == Decimal(figure.printed[:-1])
            for figure in fitting
        )

    assert [fits(base) for base in ("299.995", "299.996", "299.998", "299.999", "300.000")] == [
        False, True, True, True, False
    ]  # fmt: skip


def test_accuracies_are_typed_and_complete(found):
    scores = [score for row in found for score in row.scores]
    assert len(scores) == 7 + 2 + 20 + 5 + 2 + 2 + 3 + 12 + 6 * 4 + 4 * 4
    assert all(60 < score.top1 < 90 for score in scores)
    assert all(score.top5 is None or 84 < score.top5 < 91 for score in scores)
    assert {score.groups for score in scores} == {None, 1, 2, 4, 8, 16}
    best = {
        score.groups: (score.top1, score.top5)
        for row in found
        if row.name == "ulsam_mobilenetv2_100_insert_17"
        for score in row.scores
    }
    assert best[4] == (71.64, 90.27)


def test_the_report_shows_every_row_aligned_with_its_rule(found):
    text = report()
    for title, rule in TABLES.items():
        assert title in text
        assert rule.split(".")[0] in text.replace("\n", " ")
    for row in found:
        assert any(
            line.startswith(row.model)
            and all(figure.printed in line and figure.gives in line for figure in figures(row))
            for line in text.splitlines()
        ), row
    for block in text.split("\n\n")[1:]:
        lines = block.splitlines()
        width = len(lines[2])
        assert set(lines[2]) == {"-"}
        assert all(len(line) <= max(width, 120) for line in lines)
        assert lines[1].startswith("model") and "verdict" in lines[1]
    assert text.count("off [") == 5
    assert "multiply-accumulates" in text


def test_the_command_prints_the_report_or_json(capsys):
    assert main(["paper"]) == 0
    assert capsys.readouterr().out == report() + "\n"
    assert main(["paper", "--json"]) == 0
    data = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["name"] for row in data] == [row.name for row in rows()]
    assert data[0]["scores"][0] == {"data": "ImageNet-1K", "groups": None, "top1": 70.65, "top5": 89.76}
