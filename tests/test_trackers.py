"""What callbacks and trackers of experiments hear of a run."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ulsam
from tiny import SETTINGS, draw_splits
from ulsam.base.errors import UlsamError
from ulsam.training.trackers import numbers, open_trackers, place


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_splits(tmp_path_factory.mktemp("data"))


def settings(**changes: Any) -> Any:
    return {**SETTINGS, "epochs": 2, "lr": 0.05, **changes}


class Heard(ulsam.Callback):
    """All that a callback is called with; raises at an update, if it shall."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.fails_at = fails_at

    def start(self, run: Path, settings: Any, updates: int) -> None:
        self.calls.append(("start", run.name, settings["lr"], updates))

    def step(self, update: int, values: Any) -> None:
        self.calls.append(("step", update, values["loss"], values["lr"]))
        if update == self.fails_at:
            raise ValueError("no more")

    def epoch(self, row: Any, update: int) -> None:
        self.calls.append(("epoch", row["epoch"], row["train_loss"], update))

    def end(self, summary: Any) -> None:
        self.calls.append(("end", summary and summary["scores"]["top1"]))


def test_a_callback_hears_of_every_update_and_epoch(data: Path, tmp_path: Path) -> None:
    heard = Heard()
    summary = ulsam.train(data, tmp_path / "run", callbacks=[heard], **settings())
    assert heard.calls[0] == ("start", "run", 0.05, 0)
    assert heard.calls[-1] == ("end", summary["scores"]["top1"])
    steps = [call for call in heard.calls if call[0] == "step"]
    updates = len(steps) // 2
    assert [call[1] for call in steps] == list(range(1, 2 * updates + 1))
    for row, epoch in zip(summary["epochs"], [call for call in heard.calls if call[0] == "epoch"], strict=True):
        assert epoch[1:] == (row["epoch"], row["train_loss"], row["epoch"] * updates)
        mine = steps[(row["epoch"] - 1) * updates : row["epoch"] * updates]
        assert sum(call[2] for call in mine) / updates == pytest.approx(row["train_loss"])
        assert mine[-1][3] == row["lr"]


def test_an_error_of_a_callback_ends_a_run_that_resumes_to_the_same_weights(data: Path, tmp_path: Path) -> None:
    failing, resumed = Heard(fails_at=5), Heard()
    whole = settings(save_seconds=0.0)
    ulsam.train(data, tmp_path / "whole", **whole)
    with pytest.raises(ValueError, match="no more"):
        ulsam.train(data, tmp_path / "run", callbacks=[failing], **whole)
    assert failing.calls[-1] == ("end", None)
    ulsam.resume(tmp_path / "run", callbacks=[resumed])
    assert resumed.calls[0][:3] == ("start", "run", 0.05) and 0 < resumed.calls[0][3] < 5
    one, two = (ulsam.load(tmp_path / name)[0].state_dict() for name in ("whole", "run"))
    assert all(map(torch.equal, one.values(), two.values()))


def test_each_callback_hears_of_the_end_whatever_another_one_does(data: Path, tmp_path: Path) -> None:
    class Bad(Heard):
        def end(self, summary: Any) -> None:
            raise ValueError("cannot end")

    class Late(Heard):
        def start(self, run: Path, settings: Any, updates: int) -> None:
            raise ValueError("cannot start")

    for other, number in ((Bad(), "one"), (Late(), "two")):
        heard = [Heard(), Heard()]
        with pytest.raises(ValueError, match="cannot"):
            ulsam.train(data, tmp_path / number, callbacks=[heard[0], other, heard[1]], **settings(epochs=1))
        began = [one for one in heard if one.calls]
        assert began and all(one.calls[-1][0] == "end" for one in began)


def test_a_tracker_that_is_unknown_is_named_before_the_run_begins(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UlsamError, match="unknown tracker 'tensorbord'; valid: tensorboard, wandb, mlflow"):
        ulsam.train(data, tmp_path / "run", **settings(track=["tensorbord"]))
    assert not (tmp_path / "run").exists()


def test_a_run_of_a_comparison_is_grouped_with_it() -> None:
    assert place(Path("runs/base")) == ("base", None)
    assert place(Path("runs/x/arms/remove-14/choose-0.1-2")) == ("remove-14, choose-0.1-2", "x")
    assert numbers({"epoch": 1, "lr": 0.1, "val_top1": None}) == {"lr": 0.1}


def test_tensorboard_has_the_scalars_of_an_interrupted_run_once(data: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run, whole = tmp_path / "run", settings(save_seconds=0.0, track=["tensorboard"])
    with pytest.raises(ValueError, match="no more"):
        ulsam.train(data, run, callbacks=[Heard(fails_at=5)], **whole)
    summary = ulsam.resume(run)
    found = accumulator.EventAccumulator(str(run))
    found.Reload()
    top1 = [event.value for event in found.Scalars("epoch/val_top1")]
    assert top1 == pytest.approx([row["val_top1"] for row in summary["epochs"]])
    losses = found.Scalars("step/loss")
    assert [event.step for event in losses] == list(range(1, len(losses) + 1))


@pytest.mark.slow
def test_weights_and_biases_works_offline(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ulsam.train(data, tmp_path / "run", **settings(track=["wandb"]))
    (file,) = (tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb")
    written = file.read_bytes()  # of protobuf, uncompressed
    assert all(written.count(name) >= 2 for name in (b"epoch/val_top1", b"epoch/lr"))
    assert written.count(b"step/loss") >= 4


@pytest.mark.slow
def test_mlflow_has_the_metrics_by_update(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    whole = settings(track=["mlflow"], save_seconds=0.0)
    code = (
        "import sys, ulsam, json\n"
        "from mlflow.tracking import MlflowClient\n"
        "class Stop(ulsam.Callback):\n"
        "    def step(self, update, values):\n"
        "        if update == 5: raise ValueError('no more')\n"
        "try: ulsam.train(sys.argv[1], sys.argv[2], callbacks=[Stop()], **json.loads(sys.argv[3]))\n"
        "except ValueError: summary = ulsam.resume(sys.argv[2])\n"
        "client = MlflowClient()\n"
        "(run,) = client.search_runs([client.get_experiment_by_name('ulsam').experiment_id])\n"
        "top1 = [one.value for one in client.get_metric_history(run.info.run_id, 'epoch/val_top1')]\n"
        "print(run.info.status, run.data.params['lr'], top1 == [row['val_top1'] for row in summary['epochs']])\n"
    )
    words = [sys.executable, "-c", code, str(data), str(tmp_path / "run"), json.dumps(whole)]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": (tmp_path / "tracked").as_uri(), "MLFLOW_ALLOW_FILE_STORE": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1:] == ["FINISHED 0.05 True"], done.stderr


def test_nothing_is_tracked_unless_asked(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert open_trackers([]) == [] and not caplog.messages
