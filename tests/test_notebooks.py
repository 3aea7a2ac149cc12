"""The notebooks: each one runs from its first cell to its last, and is stored without outputs."""

import json
from pathlib import Path
from typing import Any

import pytest

import ulsam

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = ("add_attention", "compare_honestly", "slim_classifier")


def read(name: str) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]
    return cells


def run(name: str) -> dict[str, Any]:
    """What the notebook's names hold after its last cell."""
    names: dict[str, Any] = {}
    for cell in read(name):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{name}.ipynb, {cell['id']}", "exec"), names)
    return names


def test_these_are_all_of_them():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_stored_without_outputs(name):
    code = [cell for cell in read(name) if cell["cell_type"] == "code"]
    assert code
    assert [cell["id"] for cell in code if cell["outputs"] or cell["execution_count"]] == []


@pytest.mark.slow
def test_add_attention(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run("add_attention")
    assert [place.name for place in names["blocks"]][-2:] == ["blocks.5.1", "blocks.5.2"]
    assert set(names["layers"]) == {"blocks.4.2", "blocks.5.2"}
    assert all(found.after <= found.before for found in names["repaired"])
    assert ulsam.load("model.safetensors")[1] == names["spec"]


@pytest.mark.slow
def test_slim_classifier(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run("slim_classifier")
    assert names["found"]["chosen"]["blocks"]
    assert {edit.layer for edit in names["spec"].edits} == {"ulsam"}
    assert 0.5 < names["share"] <= 0.85


@pytest.mark.slow
def test_compare_honestly(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("compare_honestly")["result"]
    assert [(arm["name"], arm["seeds"]) for arm in result["arms"]] == [
        ("base", [0, 1]),
        ("removal", [0, 1]),
        ("ULSAM", [0, 1]),
    ]
    assert {(pair["arm"], pair["minus"]) for pair in result["differences"]} >= {("ULSAM", "removal"), ("ULSAM", "base")}
    assert result["arms"][1]["cost"]["macs"] < result["arms"][0]["cost"]["macs"]
