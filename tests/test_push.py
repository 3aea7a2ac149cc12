"""Models on the hub: what is written, that timm and ulsam load it, and the upload to a server like it."""

import base64
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import ulsam
from tiny import TINY_MODEL
from ulsam.cli import main
from ulsam.deploy.hub import FILES
from ulsam.deploy.model_card import model_card
from ulsam.model.build import build, load, make_spec, save
from ulsam.model.spec import Edit, ModelSpec

CLASSES = ("wren", "robin", "a*b_c")
SUMMARY: dict[str, Any] = {
    "command": "ulsam train /home/me/secret/birds",
    "config": {"data": "/home/me/secret/birds", "epochs": 3, "opt": "sgd", "lr": 0.1, "batch_size": 8, "seed": 4},
    "teacher": None,
    "images": {"train": 36, "val": 9},
    "split": "held-out",
    "scores": {"images": 9, "top1": 0.75, "top1_interval_95": [0.5, 0.9], "top5": 1.0, "loss": 0.5},
    "cost": {"params": 2_250_000, "macs": 75_000_000},
    "base_cost": {"params": 3_000_000, "macs": 100_000_000},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of two runs, `plain` and `edited`."""
    root = tmp_path_factory.mktemp("runs")
    for name, edits in (("plain", []), ("edited", [Edit("insert", "blocks.2", 4)])):
        spec = make_spec(TINY_MODEL, CLASSES, edits, size=48, mean=(0.1, 0.2, 0.3), crop_pct=0.9)
        torch.manual_seed(0)
        (root / name).mkdir()
        save(build(spec)[0], spec, root / name / "model.safetensors")
        (root / name / "summary.json").write_text(json.dumps(SUMMARY))
    return root


def test_a_folder_claims_nothing_that_is_not_known(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither timm's license of weights that may not be there, nor that it was uploaded under its own name."""
    assert main(["push", str(runs / "plain"), str(tmp_path / "birds")]) == 0
    assert capsys.readouterr().out == (
        f"wrote   the folder {tmp_path / 'birds'}; the target hf-hub:USER/NAME uploads it\n"
    )
    assert (
        not {"license", "tag"} & json.loads((tmp_path / "birds" / "config.json").read_text())["pretrained_cfg"].keys()
    )
    assert 'timm.create_model("hf-hub:USER/birds", pretrained=True)' in (tmp_path / "birds" / "README.md").read_text()


def test_a_pushed_folder_keeps_its_card(runs: Path, tmp_path: Path) -> None:
    """Its results, which are of no other file there, and what its owner has written into it."""
    card = Path(ulsam.push(runs / "edited", tmp_path / "birds"), "README.md")
    card.write_text(card.read_text() + "\nNot for rare birds.\n")
    again = Path(ulsam.push(tmp_path / "birds", tmp_path / "wrens"), "README.md").read_text()
    assert "| top-1 | 75.00 %" in again and again.endswith("\nNot for rare birds.\n")
    assert again.count('"hf-hub:USER/wrens"') == 2 and "hf-hub:USER/birds" not in again


def test_a_gray_model_is_written_without_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = make_spec(TINY_MODEL, CLASSES, size=48, model_args={"in_chans": 1})
    save(build(spec)[0], spec, tmp_path / "gray.safetensors")
    folder = Path(ulsam.push(tmp_path / "gray.safetensors", tmp_path / "gray"))
    assert not caplog.records
    config = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    assert (config["mean"], config["std"]) == (list(spec.mean), list(spec.std)) and len(spec.mean) == 1


@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_known_within_seconds(runs: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        done = pushed(runs, f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path / "home", Hub.token)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "cannot upload me/birds: 127.0.0.1:" in done.stderr and "cannot be reached" in done.stderr


def test_timm_loads_a_model_without_edits(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "birds"
    assert ulsam.push(runs / "plain", folder) == str(folder)
    assert sorted(path.name for path in folder.iterdir()) == list(FILES)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    ours, spec = load(folder)
    x = torch.randn(2, 3, 48, 48)
    assert torch.equal(theirs(x), ours(x))
    assert theirs.pretrained_cfg["label_names"] == list(CLASSES) == list(spec.classes)
    config = timm.data.resolve_model_data_config(theirs)
    assert (config["input_size"], config["mean"], config["crop_pct"]) == ((3, 48, 48), [0.1, 0.2, 0.3], 0.9)
    assert ModelSpec.from_json((folder / "ulsam.json").read_text()) == spec


def test_ulsam_loads_a_model_with_edits_and_timm_refuses_it(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "birds"
    assert main(["push", str(runs / "edited"), str(folder)]) == 0
    model, spec = load(folder)
    assert [str(edit) for edit in spec.edits] == ["insert blocks.2 g=4"]
    x = torch.randn(2, 3, 48, 48)
    assert torch.equal(model(x), load(runs / "edited")[0](x))
    by_name, same = load(f"local-dir:{folder}")
    assert same == spec and not by_name.training and torch.equal(model(x), by_name(x))
    with pytest.raises(RuntimeError, match="ulsam"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)


def test_the_card_has_the_results_and_no_path_of_this_machine(runs: Path, tmp_path: Path) -> None:
    for name, library in (("plain", "timm"), ("edited", "ulsam")):
        ulsam.push(runs / name, tmp_path / name)
        text = (tmp_path / name / "README.md").read_text()
        assert text.startswith(f"---\nlibrary_name: {library}\n")
        assert "secret" not in text and "home" not in text
        assert "| top-1 | 75.00 % (95 % interval 50.0 to 90.0, over images) |" in text
        assert "| MACs | 75.0 M (-25.0 % against the base model) |" in text
        assert "On 9 held-out images of birds; trained on 36." in text
        assert r"a\*b\_c" in text
    kept = {"keep": "best", "epoch": 2, "trained": 3, "best": 2, "chosen_on": "validation"}
    text = model_card("me/birds", ModelSpec(TINY_MODEL, CLASSES), {**SUMMARY, "kept": kept})
    assert "3 epochs of sgd, of which the weights of epoch 2 are kept, with" in text
    assert "birds, which also chose the epoch (the scores are optimistic); trained on 36." in text
    assert "## Results" not in model_card("me/birds", ModelSpec(TINY_MODEL, CLASSES))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("FULL", "FULL is not an empty folder: name one that does not exist yet, or empty it first"),
        ("hf-hub:birds", "a model on the hub is called hf-hub:USER/NAME, not hf-hub:birds"),
    ],
)
def test_mistakes_get_one_line(
    target: str, message: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    words = [text.replace("FULL", str(tmp_path)) for text in (target, message)]
    assert main(["push", str(runs / "plain"), words[0]]) == 2
    assert capsys.readouterr().err == f"ulsam: error: {words[1]}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload takes: the model file goes to the storage of large files, others inline."""

    token = "hf_right"
    stored: dict[str, bytes]
    made: list[dict[str, Any]]

    def answer(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        here = f"http://{self.headers['Host']}"
        if self.headers.get("Authorization") != f"Bearer {self.token}":
            self.answer(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            self.made.append(json.loads(body))
            self.answer(200, {"url": f"{here}/me/birds", "name": "me/birds", "id": "me/birds"})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            modes = [
                {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith("tensors") else "regular",
                 "shouldIgnore": False, "oid": None}
                for one in asked
            ]  # fmt: skip
            self.answer(200, {"files": modes})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "authenticated": True, "actions": {"upload": {"href": f"{here}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            self.answer(200, {"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.stored[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.stored[value["path"]] = self.stored.pop(value["oid"])
            found = {"commitUrl": f"{here}/me/birds/commit/1", "commitOid": "1" * 40, "hookOutput": ""}
            self.answer(200, {"success": True, **found})
        else:
            self.answer(200, {})

    def do_GET(self) -> None:
        repository = {"id": "me/birds", "modelId": "me/birds", "sha": "0" * 40, "siblings": [], "tags": []}
        self.answer(200, repository)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.stored[hashlib.sha256(body).hexdigest()] = body
        self.answer(200, {})

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, type[Hub]]]:
    kind = type("OneHub", (Hub,), {"stored": {}, "made": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", kind
    server.shutdown()
    server.server_close()


def pushed(runs: Path, address: str, home: Path, token: str) -> "subprocess.CompletedProcess[str]":
    """`ulsam push` in a process of its own: the hub's address is read when its client is imported."""
    about = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
    words = [sys.executable, "-m", "ulsam", "push", str(runs / "edited"), "hf-hub:me/birds", "--private"]
    env = {**os.environ, **about, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    return subprocess.run(words, capture_output=True, text=True, env=env, timeout=120, check=False)


@pytest.mark.slow
def test_a_model_is_uploaded(runs: Path, tmp_path: Path, hub: tuple[str, type[Hub]]) -> None:
    address, kind = hub
    done = pushed(runs, address, tmp_path / "home", Hub.token)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, f"pushed  {address}/me/birds"), done.stderr
    assert kind.made[0]["name"] == "birds" and kind.made[0]["organization"] == "me"
    assert sorted(kind.stored) == list(FILES)
    ulsam.push(runs / "edited", tmp_path / "local")
    for name in set(FILES) - {"README.md"}:
        assert kind.stored[name] == (tmp_path / "local" / name).read_bytes()
    assert 'ulsam.load("hf-hub:me/birds")' in kind.stored["README.md"].decode()


@pytest.mark.slow
def test_a_refusal_is_one_line(runs: Path, tmp_path: Path, hub: tuple[str, type[Hub]]) -> None:
    done = pushed(runs, hub[0], tmp_path / "home", "hf_wrong")
    line = "ulsam: error: the hub refuses me/birds: `hf auth login` with a token that may write\n"
    assert (done.returncode, done.stderr) == (2, line)
    assert not hub[1].stored
    gone = pushed(runs, "http://127.0.0.1:9", tmp_path / "home", Hub.token)
    assert gone.returncode == 2
    assert gone.stderr.startswith("ulsam: error: cannot upload me/birds: ") and gone.stderr.count("\n") == 1
