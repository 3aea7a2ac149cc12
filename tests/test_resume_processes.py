"""Runs of several processes under torchrun: one writer, every image once, and resuming."""

import json
import os
import signal
import socket
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from resuming import TIMEOUT, assert_same_end, changed, check_whole, wait_for
from tiny import SETTINGS, Warm, command, draw, draw_shards, draw_splits, options
from ulsam.cli import main
from ulsam.training.checkpoint import read_checkpoint
from ulsam.training.config import TrainConfig
from ulsam.training.machine import why_not_compiled
from ulsam.training.probe import undecided

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes as Linux lists them")


@pytest.fixture(scope="module")
def odd_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """72 training images and 13 validation images, one of which cannot be read."""
    root = tmp_path_factory.mktemp("odd")
    draw(root / "train", 24)
    draw(root / "val", 5, seed=1)
    for name in ("000.png", "001.png"):
        (root / "val" / "class2" / name).unlink()
    (root / "val" / "class1" / "002.png").write_bytes(b"")
    return root


PAIR = {**SETTINGS, "workers": 1, "batch_size": 4, "accumulate": 2, "ema": 0.5, "insert": "blocks.2", "lr": 0.02}
TORCHRUN = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port"]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start_pair(interpreter: Warm, words: list[str], log: Path) -> list[int]:
    """Two processes as torchrun starts them."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    env = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return [interpreter.start(words, Path(f"{log}{rank}"), env=env[rank]) for rank in range(2)]


@pytest.fixture(scope="module")
def pair(odd_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A run of two processes under torchrun: its folder, output and errors."""
    run = tmp_path_factory.mktemp("runs") / "pair"
    words = ["train", str(odd_data), "--out", str(run), *options(PAIR)]
    process = command(words, launcher=[*TORCHRUN, free_port()])
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, err
    return run, out, err


@pytest.mark.slow
def test_torchrun_has_one_writer(pair: tuple[Path, str, str]) -> None:
    run, out, err = pair
    assert len(os.listdir(run)) == 6
    check_whole(run)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["versions"]["processes"] == "2"
    words = [line.split()[0] for line in out.splitlines()]
    assert words == ["start", "data", "cache", "model", "cost", "probe", "epoch", "epoch", "result", "note"]
    assert err.count("unreadable ") == 1
    assert read_checkpoint(run)["position"]["updates"] == 2 * (72 // (4 * 2) // 2)  # type: ignore[index]


@pytest.mark.slow
def test_torchrun_counts_every_image_once(
    pair: tuple[Path, str, str], odd_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = json.loads((pair[0] / "summary.json").read_text())
    words = ["--split", "val", "--device", "cpu", "--workers", "0", "--json"]
    assert main(["eval", str(pair[0] / "model.safetensors"), str(odd_data), *words]) == 0
    scores, expected = summary["scores"], json.loads(capsys.readouterr().out)["scores"]
    assert expected["unreadable"] == 1
    assert scores["images"] == 12
    assert scores["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    counted = {name: {key: row[key] for key in ("images", "top1")} for name, row in expected["per_class"].items()}
    assert scores["per_class"] == counted
    assert all(scores[key] == expected[key] for key in ("top1", "top1_interval_95", "top5"))
    assert [Path(name).parts[-2:] for name in summary["unreadable"]["val"]] == [("class1", "002.png")]


@pytest.mark.slow
def test_two_processes_resume_to_the_same_weights(
    interpreter: Warm, pair: tuple[Path, str, str], odd_data: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    pids = start_pair(
        interpreter, ["train", str(odd_data), "--out", str(run), *options({**PAIR, "save_seconds": 0})], log
    )
    wait_for(changed(run / "checkpoint.pt", 1))
    for pid in pids:
        interpreter.kill(pid)
    check_whole(run)
    pids = start_pair(interpreter, ["train", "--resume", str(run)], log)
    wait_for(changed(run / "checkpoint.pt", 1))
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    assert [interpreter.ask(wait=pid) for pid in pids] == [130, 130]
    assert f"resume with: torchrun --nproc-per-node 2 -m ulsam train --resume {run}\n" in Path(f"{log}0").read_text()
    assert "resume with" not in Path(f"{log}1").read_text()
    assert interpreter.run(["train", "--resume", str(run)], log) == 2  # alone
    assert "this run has 2 process(es), not 1: start as many" in log.read_text()
    pids = start_pair(interpreter, ["train", "--resume", str(run)], log)
    assert [interpreter.ask(wait=pid) for pid in pids] == [0, 0]
    assert_same_end(run, pair[0])


@pytest.mark.slow
def test_two_processes_take_one_choice(interpreter: Warm, odd_data: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    settings = {**PAIR, "epochs": 200, "save_seconds": 0}
    pids = start_pair(interpreter, ["train", str(odd_data), "--out", str(run), *options(settings)], log)
    wait_for(changed(run / "checkpoint.pt", 1))
    for pid in pids:
        interpreter.kill(pid)
    assert not undecided(TrainConfig(**yaml.safe_load((run / "config.yaml").read_text())))
    assert " ms a step" in Path(f"{log}0").read_text()
    assert "probe " not in Path(f"{log}1").read_text()


@pytest.mark.slow
@pytest.mark.skipif(why_not_compiled() is not None, reason="no C++ compiler")
def test_two_processes_train_compiled(
    interpreter: Warm, pair: tuple[Path, str, str], odd_data: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    settings = {**PAIR, "compile": "inductor"}
    pids = start_pair(interpreter, ["train", str(odd_data), "--out", str(run), *options(settings)], log)
    assert [interpreter.ask(wait=pid) for pid in pids] == [0, 0], Path(f"{log}0").read_text()
    ours, eager = (load_file(folder / "model.safetensors") for folder in (run, pair[0]))
    assert ours.keys() == eager.keys()
    for name, value in eager.items():
        torch.testing.assert_close(ours[name], value, atol=1e-2, rtol=1e-1)


@pytest.mark.slow
def test_too_many_bad_images_end_all_processes(interpreter: Warm, tmp_path: Path) -> None:
    data, log = draw_splits(tmp_path / "data"), tmp_path / "log"
    bad = sorted((data / "train").rglob("*.png"))[::4]
    for path in bad:
        path.write_bytes(b"")
    words = ["train", str(data), "--out", str(tmp_path / "run"), *options({**PAIR, "epochs": 50, "lr": 1e-4})]
    assert [interpreter.ask(wait=pid) for pid in start_pair(interpreter, words, log)] == [2, 2]
    first, second = (Path(f"{log}{rank}").read_text() for rank in range(2))
    named = [line for line in (first + second).splitlines() if line.startswith("unreadable ")]
    assert 4 <= len(set(named)) == len(named) <= len(bad)
    for printed in (first, second):
        assert printed.splitlines()[-1].startswith("ulsam: error: more than 3 images cannot be read (named above)")


@pytest.mark.slow
def test_two_processes_count_every_image_of_a_stream_once(interpreter: Warm, odd_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    root = draw_shards(tmp_path, odd_data / "train", val=(9, 1, 3))
    run, log = tmp_path / "run", tmp_path / "log"
    data = ["wds/birds", "--data-dir", str(root), "--class-names", str(root / "names.txt")]
    words = ["train", *data, "--out", str(run), *options({**SETTINGS, "epochs": 1, "batch_size": 3})]
    assert [interpreter.ask(wait=pid) for pid in start_pair(interpreter, words, log)] == [0, 0]
    summary = json.loads((run / "summary.json").read_text())
    words = ["eval", str(run / "model.safetensors"), *data, "--device", "cpu", "--workers", "1", "--json"]
    assert [interpreter.ask(wait=pid) for pid in start_pair(interpreter, words, log)] == [0, 0]
    measured = next(json.loads(line) for line in Path(f"{log}0").read_text().splitlines() if line[0] == "{")["scores"]
    assert measured["images"] == summary["scores"]["images"] == 13
    counts = {name: entry["images"] for name, entry in measured["per_class"].items()}
    assert counts == {"robin": 5, "wren": 4, "finch": 4}


def test_a_mistake_under_torchrun_is_reported_once(interpreter: Warm, odd_data: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    words = ["train", str(odd_data), "--out", str(tmp_path / "run"), *options({**PAIR, "insert": "blocks.99"})]
    first, second = start_pair(interpreter, words, log)
    assert interpreter.ask(wait=first) == 2
    assert interpreter.kill(second, signal.SIGTERM) == -signal.SIGTERM  # as torchrun does when one has failed
    printed = Path(f"{log}0").read_text() + Path(f"{log}1").read_text()
    assert printed.count("ulsam: error: no module is named 'blocks.99'") == 1
    assert "Traceback" not in printed


@pytest.mark.slow
def test_torchrun_stopped_and_resumed(pair: tuple[Path, str, str], odd_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = command(
        ["train", str(odd_data), "--out", str(run), *options({**PAIR, "save_seconds": 0})],
        launcher=[*TORCHRUN, free_port()],
    )
    wait_for(changed(run / "checkpoint.pt", 1))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=TIMEOUT)
    check_whole(run)
    assert not (run / "summary.json").exists()
    process = command(["train", "--resume", str(run)], launcher=[*TORCHRUN, free_port()])
    process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0
    assert_same_end(run, pair[0])


LOST = (
    "ulsam: error: one of the 2 processes is gone or does not answer (killed? memory full?): what is saved is whole; "
    "resume with: "
)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_who_loses_the_other_process_says_how_to_resume(
    interpreter: Warm, pair: tuple[Path, str, str], odd_data: Path, tmp_path: Path, lost: int
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    words = ["train", str(odd_data), "--out", str(run), *options({**PAIR, "save_seconds": 0})]
    pids = start_pair(interpreter, words, log)
    wait_for(changed(run / "checkpoint.pt", 1))
    interpreter.kill(pids[lost])
    assert interpreter.ask(wait=pids[1 - lost]) == 2
    printed = Path(f"{log}{1 - lost}").read_text()
    assert printed.endswith(f"{LOST}torchrun --nproc-per-node 2 -m ulsam train --resume {run}\n")
    assert "Traceback" not in printed
    pids = start_pair(interpreter, ["train", "--resume", str(run)], log)
    assert [interpreter.ask(wait=pid) for pid in pids] == [0, 0]
    assert_same_end(run, pair[0])


@pytest.mark.slow
def test_under_real_torchrun_one_process_says_that_another_is_gone(odd_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launcher = [*(word if word != "2" else "3" for word in TORCHRUN), free_port()]
    process = command(
        ["train", str(odd_data), "--out", str(run), *options({**PAIR, "epochs": 200, "save_seconds": 0})],
        launcher=launcher,
    )
    wait_for(changed(run / "checkpoint.pt", 1))
    first = next(one for one in psutil.Process(process.pid).children() if one.environ()["RANK"] == "0")
    first.kill()
    _, err = process.communicate(timeout=TIMEOUT)
    assert err.count("resume with: torchrun --nproc-per-node 3 -m ulsam train --resume") == 1
    assert "gloo" not in err


@pytest.mark.slow
def test_a_mistake_under_real_torchrun(odd_data: Path, tmp_path: Path) -> None:
    words = ["train", str(odd_data), "--out", str(tmp_path / "run"), *options({**PAIR, "insert": "blocks.99"})]
    process = command(words, launcher=[*TORCHRUN, free_port()])
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode != 0
    assert err.count("ulsam: error: no module is named 'blocks.99'") == 1
    assert not (tmp_path / "run").exists()
