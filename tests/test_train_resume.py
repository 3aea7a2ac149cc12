"""Runs that are stopped and resumed in one process, and what cannot be resumed."""

import io
import json
import math
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from stopping import stop_after
from tiny import TINY_MODEL, draw_shards, draw_splits
from training_runs import FILES, config, same, weights
from ulsam.base.errors import Interrupted, UlsamError
from ulsam.training.checkpoint import read_checkpoint
from ulsam.training.machine import why_not_compiled
from ulsam.training.train import resume, train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An easy set: 36 training and 15 validation images of 3 colors."""
    return draw_splits(tmp_path_factory.mktemp("data"), noise=30)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    run = tmp_path_factory.mktemp("runs") / "trained"
    train(config(data, rand_augment="rand-m5-n1", edits=["insert blocks.2 g=8"]), run)
    return run


@pytest.fixture(scope="module")
def stopped(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 epochs with 4 updates each, stopped after the sixth."""
    run = tmp_path_factory.mktemp("runs") / "stopped"
    with (
        stop_after(5),
        pytest.raises(Interrupted, match=r"stopped in epoch 2, step 2; resume with: ulsam.resume"),
    ):
        train(config(data, epochs=2, ema=0.5), run)
    return run


@pytest.fixture
def copied(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "copied"))


def edit_checkpoint(run: Path, **entries: Any) -> None:
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    torch.save({**state, **entries}, run / "checkpoint.pt")


def test_a_stopped_run_ends_as_an_unbroken_one(
    data: Path, copied: Path, tmp_path: Path, logged: Callable[[], str]
) -> None:
    train(config(data, epochs=2, ema=0.5), tmp_path / "unbroken")
    (copied / ".checkpoint.pt.123.part").write_bytes(b"left by a killed process")
    logged()
    moved = Path(shutil.copytree(data, tmp_path / "moved"))
    summary = resume(copied, {"data": str(moved), "workers": 1, "epochs": 2})
    out = logged()
    assert "resume  in epoch 2, after 2 of its batches" in out
    assert "warning" not in out
    assert sorted(os.listdir(copied)) == FILES
    assert (copied / "model.safetensors").read_bytes() == (tmp_path / "unbroken" / "model.safetensors").read_bytes()
    assert summary["config"]["data"] == str(moved)
    unbroken = json.loads((tmp_path / "unbroken" / "summary.json").read_text())
    assert summary["scores"] == unbroken["scores"]
    timing = ("seconds", "images_per_second")
    for row, other in zip(summary["epochs"], unbroken["epochs"], strict=True):
        assert {key: row[key] for key in row if key not in timing} == {k: other[k] for k in other if k not in timing}


COMPILED = pytest.param(
    {"compile": "inductor", "drop_rate": 0.3},
    marks=[pytest.mark.slow, pytest.mark.skipif(why_not_compiled() is not None, reason="no C++ compiler")],
)


@pytest.mark.parametrize("settings", [{"amp": "bf16"}, {"layout": "contiguous"}, COMPILED], ids=str)
def test_so_it_does_in_any_precision_layout_and_form(settings: dict[str, Any], data: Path, tmp_path: Path) -> None:
    chosen = config(data, epochs=2, ema=0.5, edits=["insert blocks.2 g=4"], **settings)
    train(chosen, tmp_path / "unbroken")
    with stop_after(5), pytest.raises(Interrupted, match="stopped in epoch 2, step 2"):
        train(chosen, tmp_path / "run")
    resume(tmp_path / "run")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "unbroken"))


@pytest.mark.slow
def test_a_run_without_a_checkpoint_starts_again(data: Path, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(trained / "config.yaml", tmp_path / "run")
    resume(tmp_path / "run")
    assert same(weights(tmp_path / "run"), weights(trained))


def test_a_run_killed_at_its_very_end_is_finished(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "checkpoint.pt", "metrics.csv"):
        shutil.copy(trained / name, run)
    resume(run)
    assert sorted(os.listdir(run)) == FILES
    assert (run / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    assert (run / "metrics.csv").read_bytes() == (trained / "metrics.csv").read_bytes()


def test_a_changed_environment_is_a_warning(copied: Path, logged: Callable[[], str]) -> None:
    state = read_checkpoint(copied)
    assert state is not None
    edit_checkpoint(copied, environment={**state["environment"], "torch": "1.0", "threads": "7", "device": "cuda"})
    resume(copied)
    warnings = [line for line in logged().splitlines() if line.startswith("warning ")]
    assert [
        line.removesuffix("; the weights will not be bit for bit those of an unbroken run") for line in warnings
    ] == [
        f"warning torch: 1.0 before, {torch.__version__} now",
        "warning threads: 7 before, 1 now",
        "warning device: cuda before, cpu now",
    ]


@pytest.mark.slow
def test_a_stream_resumes_from_the_start_of_an_epoch(data: Path, tmp_path: Path, logged: Callable[[], str]) -> None:
    pytest.importorskip("webdataset")
    (tmp_path / "shards").mkdir()
    root = draw_shards(tmp_path / "shards", data / "train")
    stream = {"data_dir": str(root), "class_names": str(root / "names.txt"), "workers": 1}
    settings = config(Path("wds/birds"), **stream, epochs=2, save_seconds=0, random_erasing=0.5)
    train(settings, tmp_path / "unbroken")
    assert "note    a stream of shards: epochs are whole batches" in logged()
    with stop_after(8), pytest.raises(Interrupted, match=r"stopped in epoch 2, step 3; resume with"):
        train(settings, tmp_path / "run")
    summary = resume(tmp_path / "run")
    assert "resume  in epoch 2, after 0 of its batches" in logged()
    assert same(weights(tmp_path / "run"), weights(tmp_path / "unbroken"))
    assert summary["images"] == {"train": 44, "val": 14}
    assert summary["scores"]["images"] == 14
    (root / "names.txt").write_text("robin\nwren\n")
    with pytest.raises(UlsamError, match="class number 2, but the 2 classes are numbered from 0: check `class_names`"):
        train(settings, tmp_path / "short")


@pytest.mark.filterwarnings("error:This DataLoader will create")
def test_a_stream_with_fewer_shards_than_workers(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    root = draw_shards(tmp_path, data / "train")
    stream = {"data_dir": str(root), "class_names": str(root / "names.txt"), "workers": 6}
    with pytest.raises(UlsamError, match="has ended before its epoch: use no more `workers` than shards"):
        train(config(Path("wds/birds"), **stream, batch_size=4), tmp_path / "run")


def test_an_image_less_is_a_warning(copied: Path, data: Path, tmp_path: Path, logged: Callable[[], str]) -> None:
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "train" / "class0" / "000.png").unlink()
    resume(copied, {"data": str(tmp_path / "data")})
    log = logged()
    assert re.search(r"warning training images: 36 \(names \w{8}\) before, 35 \(names \w{8}\) now", log)


def test_another_image_is_a_warning(copied: Path, data: Path, tmp_path: Path, logged: Callable[[], str]) -> None:
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "train" / "class0" / "000.png").rename(tmp_path / "data" / "train" / "class0" / "0000.png")
    resume(copied, {"data": str(tmp_path / "data")})
    assert re.search(r"warning training images: 36 \(names \w{8}\) before, 36 ", logged())


@pytest.mark.parametrize("change", ["size", "time"])
def test_an_image_that_was_exchanged_is_a_warning(
    change: str, copied: Path, data: Path, tmp_path: Path, logged: Callable[[], str]
) -> None:
    shutil.copytree(data, tmp_path / "data")
    resume(shutil.copytree(copied, tmp_path / "same"), {"data": str(tmp_path / "data")})
    assert "warning" not in logged()
    one = tmp_path / "data" / "train" / "class0" / "000.png"
    time = one.stat().st_mtime
    if change == "size":
        one.write_bytes(one.read_bytes() + b"x")
    os.utime(one, (time, time + 60 * (change == "time")))
    resume(copied, {"data": str(tmp_path / "data")})
    digests = r"sizes (\w{8}), times (\w{8})"
    found = re.search(f"warning image files: {digests} before, {digests} now; the weights", logged())
    assert found and (found[1] != found[3], found[2] != found[4]) == (change == "size", change == "time")


@pytest.mark.parametrize("change", [{"lr": 0.1}, {"edits": ["insert blocks.2"]}, {"epochs": 3}, {"opt": "adamw"}])
def test_edited_settings_are_refused(change: dict[str, Any], copied: Path) -> None:
    settings = yaml.safe_load((copied / "config.yaml").read_text())
    (copied / "config.yaml").write_text(yaml.safe_dump({**settings, **change}))
    ((name, now),) = change.items()
    with pytest.raises(
        UlsamError, match=re.escape(f"config.yaml was changed: {name} was {settings[name]} and is {now}")
    ):
        resume(copied)


# of the 4 batches of epoch 2 and the 4 of epoch 3
@pytest.mark.slow
@pytest.mark.parametrize("moment", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_stopped_in_measuring_it_measures_when_it_resumes(moment: int, data: Path, tmp_path: Path) -> None:
    settings = config(data, epochs=3, batch_size=4, ema=0.5, val_every=2)
    train(settings, tmp_path / "unbroken")
    measured = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal measured
        if isinstance(module, nn.Linear) and not module.training and len(inputs[0]) > 1:  # a batch of validation
            measured += 1
            if measured == moment:
                signal.raise_signal(signal.SIGINT)

    handle = register_module_forward_pre_hook(count)
    try:
        where = r"stopped in the measurement of epoch [23]; resume with: ulsam.resume"
        with pytest.raises(Interrupted, match=where):
            train(settings, tmp_path / "run")
    finally:
        handle.remove()
    assert measured == moment  # at once, not after the other batches
    summary = resume(tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (
        tmp_path / "unbroken" / "model.safetensors"
    ).read_bytes()
    unbroken = json.loads((tmp_path / "unbroken" / "summary.json").read_text())
    assert summary["scores"] == unbroken["scores"]
    assert [row["val_loss"] for row in summary["epochs"]] == [row["val_loss"] for row in unbroken["epochs"]]


def refuse(message: str, run: Path, **overrides: Any) -> None:
    """The run is not resumed, for a reason given in one line, and nothing of it changes."""
    before = {path: path.read_bytes() for path in run.glob("*.*")}
    with pytest.raises(UlsamError, match=message) as caught:
        resume(run, overrides)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in run.glob("*.*")} == before


def test_what_cannot_be_resumed(copied: Path, trained: Path, data: Path, tmp_path: Path) -> None:
    refuse(r"nowhere is not the folder of a run: there is no config.yaml", tmp_path / "nowhere")
    refuse(r"val is not the folder of a run", data / "val")
    refuse(r"trained is finished: its result is in .*summary.json", trained)
    refuse(r"a resumed run keeps its own settings: lr was 0.05 and cannot be changed", copied, lr=0.1)
    refuse(
        r"a resumed run keeps its own settings: edits was \[\] and cannot be changed", copied, edits=["insert blocks.2"]
    )
    refuse(r"no such folder: nowhere", copied, data="nowhere")
    other = draw_splits(tmp_path / "other")
    for split in ("train", "val"):
        (other / split / "class1").rename(other / split / "wren")
    refuse(r"the data has other classes than this run", copied, data=str(other))
    state = read_checkpoint(copied)
    assert state is not None
    edit_checkpoint(copied, environment={**state["environment"], "processes": "4"})
    refuse(r"this run has 4 process\(es\), not 1", copied)
    edit_checkpoint(copied, environment=state["environment"], model={})
    refuse(r"the checkpoint in .* is not of this run: .*Missing key", copied)
    edit_checkpoint(copied, model=state["model"], position={"step": 1})
    refuse(r"the checkpoint in .* is not of this run", copied)
    edit_checkpoint(copied, position=state["position"], optimizer={"state": state["optimizer"]["state"]})
    refuse(r"the checkpoint in .* is not of this run: ", copied)
    edit_checkpoint(copied, version=0)
    refuse(r"no checkpoint of this version of ulsam", copied)


@pytest.mark.slow
def test_no_foreign_entry_of_a_checkpoint_is_taken(copied: Path) -> None:
    state = read_checkpoint(copied)
    assert state is not None
    rows = state["position"]["rows"]
    for wrong in (
        *({"epoch": value} for value in ("x", -3, 3, 1.0, True, None)),
        *({"batch": value} for value in (10**6, -1, "2")),
        *({"updates": -1}, {"loss_sum": math.nan}, {"loss_sum": "x"}, {"seconds": None}, {"images": 0}),
        *({"rows": value} for value in ([], rows * 2, [{}], ["row"], [{**rows[0], "lr": "x"}], None)),
    ):
        edit_checkpoint(copied, position={**state["position"], **wrong})
        refuse(r"the checkpoint in .* is not of this run: ", copied)
    saved = state["optimizer"]
    groups = saved["param_groups"]
    foreign = timm.optim.create_optimizer_v2(timm.create_model(TINY_MODEL, num_classes=3), opt="adamw").state_dict()
    for wrong in (
        foreign,
        {**saved, "param_groups": groups[:1]},
        {**saved, "param_groups": [{**group, "momentum": "x"} for group in groups]},
        {**saved, "param_groups": [{k: v for k, v in group.items() if k != "momentum"} for group in groups]},
        {**saved, "state": {**saved["state"], 0: {"momentum_buffer": torch.zeros(7)}}},
        {**saved, "state": {**saved["state"], 0: {"exp_avg": saved["state"][0]["momentum_buffer"]}}},
        {**saved, "state": {**saved["state"], 0: {"momentum_buffer": 3}}},
    ):
        edit_checkpoint(copied, position=state["position"], optimizer=wrong)
        refuse(r"the checkpoint in .* is not of this run: ", copied)
    for entries in ({"unreadable": {"train": 3, "val": {}}}, {"settings": {}}, {"settings": None}, {"ema": None}):
        edit_checkpoint(copied, **{**state, **entries})
        refuse(r"the checkpoint in .* is not of this run: ", copied)


class Hostile:
    """Unpickled with trust, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_hostile_or_damaged_checkpoint_is_refused(copied: Path, tmp_path: Path) -> None:
    checkpoint = copied / "checkpoint.pt"
    whole = checkpoint.read_bytes()
    edit_checkpoint(copied, ema=Hostile(tmp_path / "proof"))
    hostile = checkpoint.read_bytes()
    torch.save({"version": Hostile(tmp_path / "proof")}, checkpoint, _use_new_zipfile_serialization=False)
    old_hostile = checkpoint.read_bytes()
    damaged = [whole[: len(whole) * part // 7] for part in range(7)]
    flipped = bytearray(whole)
    flipped[len(flipped) // 2] ^= 0xFF
    for content in [hostile, old_hostile, *damaged, b"nonsense" * 99, b"\x80\x02}q\x00."]:
        checkpoint.write_bytes(content)
        with pytest.raises(UlsamError, match=r"checkpoint\.pt is no checkpoint") as caught:
            resume(copied)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400
    assert not (tmp_path / "proof").exists()
    torch.load(io.BytesIO(hostile), weights_only=False)
    assert (tmp_path / "proof").exists()  # it would have worked
