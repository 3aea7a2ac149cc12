"""The best epoch's weights, and stopping early: what is kept, what is said of it, and runs that resume to the same."""

import copy
import json
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stopping import stop_after
from tiny import SETTINGS, command, draw, draw_splits, options
from ulsam.base.distributed import World
from ulsam.base.errors import Interrupted, UlsamError
from ulsam.cli import main
from ulsam.explanation.run_report import report_runs
from ulsam.study.arms import Arm, check_shared
from ulsam.study.slim import slim
from ulsam.training import callbacks
from ulsam.training.best import best_row, kept_entry, kept_lines
from ulsam.training.checkpoint import read_checkpoint, write_checkpoint
from ulsam.training.config import TrainConfig
from ulsam.training.loop import Trainer
from ulsam.training.train import resume, train

ALONE = World(0, 1, torch.device("cpu"))
UPDATES = 3  # in an epoch


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training and 24 validation images under much noise."""
    return draw_splits(tmp_path_factory.mktemp("data"), train=8, val=8, noise=120)


def config(data: Path | str, **settings: Any) -> TrainConfig:
    """A rate at which the model learns the set in 4 epochs, and then falls apart."""
    unsteady = {"lr": 0.05, "sched": "constant", "warmup_epochs": 0, "epochs": 7, "amp": "none", "layout": "contiguous"}
    return TrainConfig.from_mapping({**SETTINGS, "data": str(data), **unsteady, **settings})


class Copies(callbacks.Callback):
    """Keeps what is measured at the end of each epoch."""

    trainer: Trainer

    def start(self, run: Path, settings: Mapping[str, Any], updates: int) -> None:
        self.states: list[dict[str, Tensor]] = []

    def epoch(self, row: Mapping[str, Any], update: int) -> None:
        model = self.trainer.ema.module if self.trainer.ema else self.trainer.model
        self.states.append(copy.deepcopy(model.state_dict()))


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_the_saved_weights_are_those_of_the_best_epoch(ema: float, data: Path, tmp_path: Path) -> None:
    run, copies = tmp_path / "run", Copies()
    run.mkdir()
    copies.trainer = Trainer(config(data, keep="best", ema=ema), run, ALONE, callbacks=[copies])
    copies.trainer.prepare()
    summary = copies.trainer.fit()
    rows = summary["epochs"]
    best = max(rows, key=lambda row: (row["val_top1"], -row["val_loss"]))
    assert 1 < best["epoch"] < 7  # else this would show nothing
    saved = load_file(run / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in copies.states[best["epoch"] - 1].items())
    assert (summary["scores"]["top1"], summary["scores"]["loss"]) == (best["val_top1"], best["val_loss"])
    assert summary["kept"] == {
        **{"keep": "best", "epoch": best["epoch"], "trained": 7, "best": best["epoch"], "chosen_on": "validation"}
    }


def test_of_equal_top1_the_lower_loss_is_better_and_of_equal_epochs_the_first() -> None:
    scores = [(0.5, 2.0), (0.75, 1.5), (None, None), (0.75, 1.0), (0.75, 1.0), (0.7, 0.1)]
    rows = [{"epoch": epoch, "val_top1": a, "val_loss": b} for epoch, (a, b) in enumerate(scores, 1)]
    assert [best_row(rows[:count])["epoch"] for count in range(1, 7)] == [1, 2, 2, 4, 4, 4]  # type: ignore[index]
    assert best_row(rows[2:3]) is None


def test_the_default_keeps_the_last_epoch(data: Path, tmp_path: Path) -> None:
    run, copies = tmp_path / "run", Copies()
    run.mkdir()
    copies.trainer = Trainer(config(data), run, ALONE, callbacks=[copies])
    copies.trainer.prepare()
    summary = copies.trainer.fit()
    saved = load_file(run / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in copies.states[-1].items())
    assert summary["kept"]["chosen_on"] is None and summary["kept"]["epoch"] == 7
    state = read_checkpoint(run)
    assert state is not None and state["best"] is None


def test_training_stops_where_no_epoch_is_better_for_long(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(config(data), tmp_path / "whole")
    best = whole["kept"]["best"]
    chosen = {name: value for name, value in vars(config(data)).items() if name in ("lr", "sched", "warmup_epochs")}
    words = ["train", str(data), "--patience", "2", "--out", str(tmp_path / "run"), "--epochs", "7", "--amp", "none"]
    rest = {name: value for name, value in SETTINGS.items() if name != "epochs"}
    assert main([*words, "--layout", "contiguous", *options({**rest, **chosen})]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert len(summary["epochs"]) == best + 2 < 7
    assert [row["val_loss"] for row in summary["epochs"]] == [row["val_loss"] for row in whole["epochs"][: best + 2]]
    assert summary["kept"] == {
        **{"keep": "last", "epoch": best + 2, "trained": best + 2, "best": best, "chosen_on": "validation"}
    }
    assert summary["scores"]["top1"] == summary["epochs"][-1]["val_top1"]
    printed = capsys.readouterr().out
    assert f"note    stopped after epoch {best + 2} of 7: epoch {best} was the best" in printed
    assert f"those of epoch {best + 2}, which was chosen on the validation images: the score on them is" in printed
    with pytest.raises(UlsamError, match="is finished"):
        resume(tmp_path / "run")


def test_patience_counts_epochs_where_not_every_one_is_measured(data: Path, tmp_path: Path) -> None:
    whole = train(config(data, val_every=2), tmp_path / "whole")
    best = whole["kept"]["best"]
    summary = train(config(data, val_every=2, patience=1), tmp_path / "run")
    measured = [row["epoch"] for row in summary["epochs"] if row["val_top1"] is not None]
    assert measured[-2] == best and len(summary["epochs"]) == best + 2


@pytest.mark.parametrize("ema", [0.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_a_run_that_is_stopped_after_the_best_epoch_ends_the_same(ema: float, data: Path, tmp_path: Path) -> None:
    chosen = config(data, keep="best", patience=2, ema=ema)
    whole = train(chosen, tmp_path / "whole")
    best = whole["kept"]["best"]
    assert best + 2 == whole["kept"]["trained"] < 7
    moments = {"before": UPDATES * best - 2, "after": UPDATES * best + 1}
    for name, updates in moments.items():
        with stop_after(updates), pytest.raises(Interrupted):
            train(chosen, tmp_path / name)
        assert_same_end(resume(tmp_path / name), whole, tmp_path / name, tmp_path / "whole")
    for lacking in ("summary.json", "model.safetensors"):  # killed before it wrote them
        (tmp_path / "whole" / lacking).rename(tmp_path / lacking)
    shutil.copytree(tmp_path / "whole", tmp_path / "end")
    for lacking in ("summary.json", "model.safetensors"):
        (tmp_path / lacking).rename(tmp_path / "whole" / lacking)
    assert_same_end(resume(tmp_path / "end"), whole, tmp_path / "end", tmp_path / "whole")


def assert_same_end(summary: dict[str, Any], other: dict[str, Any], run: Path, its: Path) -> None:
    assert (run / "model.safetensors").read_bytes() == (its / "model.safetensors").read_bytes()
    assert summary["scores"] == other["scores"] and summary["kept"] == other["kept"]
    assert [row["val_loss"] for row in summary["epochs"]] == [row["val_loss"] for row in other["epochs"]]


@pytest.mark.parametrize("wrong", [None, {}, {"conv_stem.weight": torch.zeros(1)}, 3])
def test_a_checkpoint_without_the_best_weights_is_refused(wrong: Any, data: Path, tmp_path: Path) -> None:
    with stop_after(UPDATES + 1), pytest.raises(Interrupted):
        train(config(data, keep="best"), tmp_path / "run")
    state = read_checkpoint(tmp_path / "run")
    assert state is not None
    del state["version"]
    write_checkpoint(tmp_path / "run", {**state, "best": wrong})
    with pytest.raises(UlsamError, match=r"the checkpoint in .* is not of this run: "):
        resume(tmp_path / "run")


# on which images an epoch may be chosen


@pytest.mark.parametrize("settings", [{"keep": "best"}, {"patience": 3}])
def test_no_epoch_is_chosen_on_test_images(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(tmp_path / "data" / "train", 8)
    draw(tmp_path / "data" / "test", 2, seed=1)
    what = "keep=best" if "keep" in settings else "patience"
    with pytest.raises(UlsamError, match=rf"^{what} would choose an epoch by its score on test images"):
        train(config(tmp_path / "data", **settings), tmp_path / "run")
    words = ["train", str(tmp_path / "data"), "--out", str(tmp_path / "run"), *options({**SETTINGS, **settings})]
    assert main(words) == 2
    assert "hold training images out with --val-fraction, or name another split with" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    summary = train(config(tmp_path / "data", epochs=1, val_fraction=0.25, **settings), tmp_path / "run")
    assert summary["split"] == "held-out"


def test_a_measurement_on_the_images_that_the_epoch_was_chosen_on_says_so(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config(data, keep="best", epochs=2), tmp_path / "best")
    train(config(data, epochs=2), tmp_path / "last")
    for name, said in (("best", True), ("last", False)):
        assert main(["eval", str(tmp_path / name), str(data), "-j", "0"]) == 0
        note = "note    the epoch was chosen by the score on 24 of these 24 images: their score is optimistic"
        assert (note in capsys.readouterr().err) == said


def test_so_it_does_on_a_table(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"{path.relative_to(data)},{path.parent.name}" for path in sorted(data.glob("train/*/*.png"))]
    table = data / "labels.csv"
    table.write_text("\n".join(["path,label", *rows]))
    train(config(table, keep="best", epochs=2), tmp_path / "best")
    assert main(["eval", str(tmp_path / "best"), str(table), "-j", "0"]) == 0
    said = capsys.readouterr()
    assert "note    the epoch was chosen by the score on " in said.out + said.err


def test_what_no_epoch_could_decide_is_not_said_to_be_chosen() -> None:
    rows = [{"epoch": epoch, "val_map": None, "val_loss": 1.0} for epoch in (1, 2)]
    kept = kept_entry(TrainConfig("birds", keep="best", epochs=2), rows, "held-out")
    assert (kept["epoch"], kept["best"], kept["chosen_on"]) == (2, None, None)
    assert kept_lines(kept, 2) == [
        "note    no epoch could be scored, so none is the best: the weights are those of the last one"
    ]


def test_one_measured_epoch_is_no_choice() -> None:
    measured = [None, None, 0.5]
    rows = [{"epoch": number, "val_top1": top1, "val_loss": 1.0} for number, top1 in enumerate(measured, 1)]
    kept = kept_entry(TrainConfig("birds", keep="best", epochs=3, val_every=3), rows, "held-out")
    assert (kept["epoch"], kept["best"], kept["chosen_on"]) == (3, 3, None)
    assert kept_lines(kept, 3) == []


def test_a_report_says_that_the_score_chose_the_epoch(data: Path, tmp_path: Path) -> None:
    train(config(data, keep="best", epochs=2), tmp_path / "best")
    written = report_runs([str(tmp_path / "best")], tmp_path / "report.html", images=False)
    assert any("chosen on the validation images: its score on them is optimistic" in note for note in written.notes)
    assert "its score on them is optimistic" in (tmp_path / "report.html").read_text()


def test_a_comparison_and_slimming_choose_no_epoch(data: Path, tmp_path: Path) -> None:
    for settings in ({"keep": "best"}, {"patience": 3}):
        with pytest.raises(UlsamError, match=r"measured once, after its last epoch, .*: leave keep and patience out"):
            check_shared(config(data, **settings))
        ((name, value),) = settings.items()
        with pytest.raises(UlsamError, match=rf"^the arm '{name}={value}': every run is measured once"):
            Arm.parse(f"{name}={value}")
        run = tmp_path / name
        if not (tmp_path / "base").exists():
            train(config(data, epochs=1), tmp_path / "base")
        with pytest.raises(UlsamError, match=f"^slimming decides {name}: leave it out of the settings$"):
            slim(tmp_path / "base" / "model.safetensors", str(data), run, macs=0.9, settings=settings)


# several processes


@pytest.mark.slow
def test_two_processes_keep_the_best_epoch_and_stop_together(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    run = tmp_path / "run"
    rest = {**SETTINGS, "batch_size": 4, "epochs": 9, "lr": 0.05, "sched": "constant", "warmup_epochs": 0, "ema": 0.5}
    words = ["train", str(data), "--out", str(run), "--keep", "best", "--patience", "2", *options(rest)]
    process = command(words, launcher=["torch.distributed.run", "--nproc-per-node", "2", "--master-port", port])
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    summary = json.loads((run / "summary.json").read_text())
    kept = summary["kept"]
    assert kept["epoch"] == kept["best"] == kept["trained"] - 2 and kept["trained"] < 9
    assert summary["scores"]["top1"] == summary["epochs"][kept["best"] - 1]["val_top1"]
    assert main(["eval", str(run), str(data), "-j", "0", "--device", "cpu", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert scores["top1"] == summary["scores"]["top1"]
    assert scores["loss"] == pytest.approx(summary["scores"]["loss"], rel=1e-4)
