"""Packed files: what is written comes back, in the same bytes; damage and names outside the folder are refused."""

import gzip
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ulsam.base.errors import UlsamError
from ulsam.base.packed import read_lines, read_packed, unpack, write_packed

ROOT = Path(__file__).parents[1]
FILES = {"grid.json": {"b": 1, "a": [1, None, "ü"]}, "arms/x/one.failed": "cannot read it\n", "arms/x/a.json": {"c": 2}}


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_lines(path: Path, *lines: Any) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))


def test_what_is_written_comes_back_in_the_same_bytes(tmp_path: Path) -> None:
    one, other = tmp_path / "one.jsonl.gz", tmp_path / "new" / "other.jsonl.gz"
    write_packed(one, FILES)
    write_packed(other, dict(reversed(FILES.items())))
    assert read_packed(one) == FILES
    assert one.read_bytes() == other.read_bytes()
    assert one.read_bytes()[4:8] == bytes(4)  # no time
    unpack(read_packed(one), tmp_path / "folder")
    assert (tmp_path / "folder" / "arms" / "x" / "one.failed").read_text() == "cannot read it\n"
    assert json.loads((tmp_path / "folder" / "grid.json").read_text()) == FILES["grid.json"]


def test_files_that_are_there_stay(tmp_path: Path) -> None:
    write_packed(tmp_path / "x.jsonl.gz", FILES)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "grid.json").write_text("mine")
    unpack(read_packed(tmp_path / "x.jsonl.gz"), tmp_path / "folder")
    assert (tmp_path / "folder" / "grid.json").read_text() == "mine"
    assert json.loads((tmp_path / "folder" / "arms" / "x" / "a.json").read_text()) == {"c": 2}


@pytest.mark.parametrize(
    "line",
    [
        {"file": "../a.json", "content": {}},
        {"file": "/etc/a.json", "content": {}},
        {"file": "a\\..\\b.json", "content": {}},
        {"file": "c:a.json", "content": {}},
        {"file": "", "content": {}},
        {"file": 1, "content": {}},
        {"file": "a.json"},
        {"file": "a.json", "content": {}, "in": "b.jsonl.gz"},
        {"file": "a.json", "in": "../b.jsonl.gz"},
        ["a.json"],
    ],
)
def test_a_line_that_leaves_the_folder_or_has_no_content_is_refused(line: Any, tmp_path: Path) -> None:
    write_lines(tmp_path / "x.jsonl.gz", line)
    with pytest.raises(UlsamError, match=r"x\.jsonl\.gz is damaged, or is no packed file: a line names no file"):
        unpack(read_packed(tmp_path / "x.jsonl.gz"), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("kind", ["cut", "text", "no JSON", "flipped"])
def test_a_damaged_file_is_one_line(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    write_packed(path, {f"{number}.json": {"value": number} for number in range(100)})
    whole = path.read_bytes()
    middle = len(whole) // 2
    damaged = {
        "cut": whole[:middle],
        "text": b"{}\n",
        "no JSON": gzip.compress(b"{"),
        "flipped": whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :],
    }
    path.write_bytes(damaged[kind])
    with pytest.raises(UlsamError, match="is damaged, or is no packed file") as error:
        read_packed(path)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_another_ending_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UlsamError, match="no packed file"):
        read_packed(tmp_path / "x.jsonl.gz")
    with pytest.raises(UlsamError, match=r"birds must end in .jsonl.gz"):
        write_packed(tmp_path / "birds", FILES)


def test_a_run_of_two_comparisons_is_kept_once(tmp_path: Path) -> None:
    share = load_script("share_runs").share
    packed = {
        "a.jsonl.gz": {"run.json": {"top1": 1}, "other.json": {"top1": 2}},
        "b.jsonl.gz": {"run.json": {"top1": 1}, "other.json": {"top1": 3}},
        "c.jsonl.gz": {"run.json": {"top1": 1}},
    }
    for name, files in packed.items():
        write_packed(tmp_path / name, files)
    for _ in range(2):
        share(tmp_path)
        assert {name: read_packed(tmp_path / name) for name in packed} == packed
        kept = [[line.get("in") for line in read_lines(tmp_path / name)] for name in packed]
        assert kept == [[None, None], [None, "a.jsonl.gz"], ["a.jsonl.gz"]]
    write_packed(tmp_path / "a.jsonl.gz", {"other.json": {}})
    with pytest.raises(UlsamError, match=r"b\.jsonl\.gz takes run\.json from .*a\.jsonl\.gz, which lacks it"):
        read_packed(tmp_path / "b.jsonl.gz")


def test_no_published_run_is_kept_twice() -> None:
    kept = [
        (line["file"], json.dumps(line["content"]))
        for path in sorted((ROOT / "results").glob("*.jsonl.gz"))
        for line in read_lines(path)
        if "content" in line
    ]
    assert len(kept) > 400 and len(set(kept)) == len(kept), "python scripts/share_runs.py results"


def test_a_comparison_of_an_older_version_is_put_into_new_words(tmp_path: Path) -> None:
    out = tmp_path / "out"
    spec = {"base": "mobilenetv2_100", "edits": ["replace 14,17 g=4 width=32", "drop 3"], "classes": ["net", "thin"]}
    old = {
        "grid.json": {
            "arms": [{"name": "ULSAM thin 32 14,17", "edits": ["drop 14"], "settings": {"fit_pictures": 0}}],
            "command": "ulsam compare x --arm 'removed 14: drop 14; fit_pictures=0' --out arms/ulsam-thin-32-14-17",
        },
        "arms/ulsam-thin-32-14-17/seed-0/summary.json": {"recipe": spec, "scores": {"pictures": 3}},
        "arms/thin-32-14-17/guest.json": {"name": "thin 32 14,17"},
        "arms/unfitted-thin-32-14/external_arm.json": {"name": "unfitted thin 32 14"},
        "arms/removed-14/seed-0/summary.json": {"config": {"teacher": "removed", "fit_pictures": 512}},
    }
    for name, value in old.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(json.dumps(value))
    migrate = load_script("migrate_results").migrate
    for _ in range(2):  # what is in the new words stays
        migrate(out)
        found = {path.relative_to(out).as_posix(): json.loads(path.read_text()) for path in out.rglob("*.json")}
        edits = ["replace 14,17 g=4 width=32", "remove 3"]
        assert found == {
            "grid.json": {
                "arms": [
                    {
                        "name": "ULSAM + inverted residual 32 14,17",
                        "edits": ["remove 14"],
                        "settings": {"reconstruct_images": 0},
                    }
                ],
                "command": "ulsam compare x --arm 'remove 14: remove 14; reconstruct_images=0' "
                "--out arms/ulsam-inverted-residual-32-14-17",
            },
            "arms/ulsam-inverted-residual-32-14-17/seed-0/summary.json": {
                "spec": {**spec, "edits": edits},
                "scores": {"images": 3},
            },
            "arms/inverted-residual-32-14-17/external_arm.json": {"name": "inverted residual 32 14,17"},
            "arms/not-reconstructed-inverted-residual-32-14/external_arm.json": {
                "name": "not reconstructed inverted residual 32 14"
            },
            "arms/remove-14/seed-0/summary.json": {"config": {"teacher": "removed", "reconstruct_images": 512}},
        }
