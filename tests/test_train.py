"""What a run leaves behind, and what it does about images that cannot be read and numbers that are not finite."""

import csv
import dataclasses
import json
import os
import shutil
import struct
import zlib
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image

from stopping import stop_after
from tiny import SETTINGS, TINY_MODEL, draw, draw_splits, options
from training_runs import FILES, config, same, weights
from ulsam import __version__
from ulsam.base.errors import Interrupted, UlsamError
from ulsam.cli import main
from ulsam.data.images import read_image
from ulsam.layer.ulsam import ULSAM
from ulsam.model.build import load
from ulsam.surgery.cost import cost
from ulsam.training.checkpoint import read_checkpoint
from ulsam.training.config import TrainConfig
from ulsam.training.evaluate import spec_transform, wilson
from ulsam.training.train import resume, train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An easy set: 36 training and 15 validation images of 3 colors."""
    return draw_splits(tmp_path_factory.mktemp("data"), noise=30)


# the files of a run


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from the command line."""
    run = tmp_path_factory.mktemp("runs") / "trained"
    settings = {**SETTINGS, "epochs": 8, "lr": 0.01, "val_every": 3, "rand_augment": "rand-m5-n1"}
    words = ["train", str(data), "--insert", "blocks.2", "--groups", "8", "--out", str(run), *options(settings)]
    assert main(words) == 0
    return run


def test_a_run_leaves_its_files(trained: Path) -> None:
    assert sorted(os.listdir(trained)) == FILES
    with Image.open(trained / "curves.png") as curves:
        curves.load()
        assert curves.width > 300
    state = read_checkpoint(trained)
    assert state is not None
    assert state["position"]["epoch"] == 8


def test_metrics(trained: Path) -> None:
    rows = list(csv.DictReader((trained / "metrics.csv").open()))
    summary = json.loads((trained / "summary.json").read_text())
    assert [row["epoch"] for row in rows] == list("12345678")
    assert [row["epoch"] for row in rows if row["val_top1"]] == ["3", "6", "8"]
    assert all(float(row["images_per_second"]) > 0 for row in rows)
    assert [float(row["train_loss"]) for row in rows] == [row["train_loss"] for row in summary["epochs"]]
    assert float(rows[-1]["val_top1"]) == summary["scores"]["top1"]


def test_an_easy_set_is_learnt(trained: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    losses = [row["train_loss"] for row in summary["epochs"]]
    assert max(losses[4:]) < 0.7 * losses[0]
    assert summary["scores"]["top1"] >= 0.9


def test_scores_are_those_of_the_saved_model(trained: Path, data: Path) -> None:
    scores = json.loads((trained / "summary.json").read_text())["scores"]
    model, spec = load(trained / "model.safetensors")
    assert any(isinstance(module, ULSAM) for module in model.modules())
    transform = spec_transform(spec)
    right: Counter[str] = Counter()
    loss = 0.0
    for label, name in enumerate(spec.classes):
        for path in (data / "val" / name).iterdir():
            with torch.no_grad():
                logits = model(transform(read_image(path))[None])[0].double()
            right[name] += int(logits.argmax()) == label
            loss += float(logits.logsumexp(0) - logits[label])
    total = sum(right.values())
    assert spec.classes == ("class0", "class1", "class2")
    assert scores["images"] == 15
    assert scores["top1"] == total / 15
    assert scores["top5"] == 1.0
    assert scores["loss"] == pytest.approx(loss / 15, abs=1e-5)
    assert scores["top1_interval_95"] == list(wilson(total, 15))
    assert scores["per_class"] == {name: {"images": 5, "top1": right[name] / 5} for name in spec.classes}


def test_summary_states_cost_versions_and_command(trained: Path, data: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    opened, spec = load(trained / "model.safetensors")
    for entry, model in (
        (summary["cost"], opened),
        (summary["base_cost"], timm.create_model(TINY_MODEL, num_classes=3)),
    ):
        counted = cost(model, (3, 32, 32))
        assert [entry[key] for key in ("params", "macs", "activations")] == [
            counted.params,
            counted.macs,
            counted.activations,
        ]
        assert entry["input_size"] == [3, 32, 32]
    assert summary["cost"]["params"] > summary["base_cost"]["params"]
    assert summary["spec"] == json.loads(spec.to_json())
    assert summary["spec"]["edits"] == ["insert blocks.2 g=8"]
    assert summary["images"] == {"train": 36, "val": 15}
    assert summary["unreadable"] == {"train": [], "val": []}
    assert summary["config"] == yaml.safe_load((trained / "config.yaml").read_text())
    versions = summary["versions"]
    assert versions["ulsam"] == __version__
    assert versions["torch"] == torch.__version__
    assert versions["timm"] == timm.__version__
    assert (versions["threads"], versions["processes"], versions["device"]) == ("1", "1", "cpu")
    assert summary["command"]


def test_config_repeats_the_run_bit_for_bit(trained: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert main(["train", "--config", str(trained / "config.yaml"), "--out", str(again)]) == 0
    assert (again / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    assert (again / "config.yaml").read_bytes() == (trained / "config.yaml").read_bytes()


def test_options_come_before_the_config(trained: Path, tmp_path: Path) -> None:
    words = ["--epochs", "1", "--seed", "3", "--insert", "blocks.1"]
    assert main(["train", "--config", str(trained / "config.yaml"), "--out", str(tmp_path / "run"), *words]) == 0
    settings = json.loads((tmp_path / "run" / "summary.json").read_text())["config"]
    assert (settings["epochs"], settings["seed"], settings["lr"]) == (1, 3, 0.01)
    assert settings["edits"] == ["insert blocks.1 g=4"]
    assert not same(weights(tmp_path / "run"), weights(trained))


# bad images


def bomb() -> bytes:
    """A PNG of 60000 x 60000 pixels in a few bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


BROKEN = ["bomb.png", "corrupt.jpg", "truncated.jpg", "zero.png"]


@pytest.fixture(scope="module")
def bad_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One image of every odd kind among ordinary ones; those of `BROKEN` cannot be read, one of val neither."""
    root = draw_splits(tmp_path_factory.mktemp("bad"), train=12, val=5)
    folder = root / "train" / "class1"
    image = Image.effect_noise((48, 48), 60)
    rgb = image.convert("RGB")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    Image.new("I;16", (40, 40), 30000).save(folder / "sixteen.png")
    rgb.quantize(16).save(folder / "palette.gif")
    rgb.save(folder / "animated.gif", save_all=True, append_images=[rgb.rotate(90)])
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.save(folder / "rotated.jpg", exif=exif)
    rgb.save(folder / "misnamed.jpg", format="PNG")
    rgb.save(folder / "truncated.jpg", quality=95)
    whole = (folder / "truncated.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "corrupt.jpg").write_bytes(b"\xff\xd8\xff" + b"nonsense" * 20)
    (folder / "zero.png").touch()
    (folder / "bomb.png").write_bytes(bomb())
    (root / "val" / "class0" / "000.png").write_bytes(b"nonsense")
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_training_continues_past_bad_images(
    workers: int, bad_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = options({**SETTINGS, "workers": workers, "batch_size": 2, "epochs": 2})
    assert main(["train", str(bad_data), "--out", str(tmp_path / "run"), *words]) == 0
    out, err = capfd.readouterr()
    unreadable = [line for line in err.splitlines() if line.startswith("unreadable ")]
    names = sorted(Path(line.removeprefix("unreadable ").partition(": ")[0]).name for line in unreadable)
    assert names == sorted([*BROKEN, "000.png"])  # each once, though there were two epochs
    assert "note    5 images could not be read; they are named above and in summary.json" in out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [Path(name).name for name in summary["unreadable"]["train"]] == BROKEN
    assert [Path(name).name for name in summary["unreadable"]["val"]] == ["000.png"]
    assert summary["scores"]["images"] == 14
    assert summary["scores"]["unreadable"] == 1
    assert summary["scores"]["per_class"]["class0"]["images"] == 4


def test_too_many_bad_images_stop_the_run(bad_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UlsamError, match=r"more than 3 images cannot be read \(named above\): see `max_unreadable`"):
        train(config(bad_data, max_unreadable=0.05, batch_size=2), tmp_path / "run")


def test_nothing_but_bad_images(tmp_path: Path) -> None:
    draw(tmp_path / "data", 5)
    for path in (tmp_path / "data").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UlsamError, match=r"12 training images in a row cannot be read"):
        train(config(tmp_path / "data", max_unreadable=1.0), tmp_path / "run")


def test_a_resumed_run_remembers_bad_images(bad_data: Path, tmp_path: Path) -> None:
    with stop_after(22), pytest.raises(Interrupted):  # 23 updates an epoch
        train(config(bad_data, batch_size=2), tmp_path / "run")
    summary = resume(tmp_path / "run")
    assert [Path(name).name for name in summary["unreadable"]["train"]] == BROKEN


# numbers that are not finite


def test_a_loss_that_is_not_finite_stops_the_run(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = {"lr": 1e30, "warmup_epochs": 0, "save_seconds": 0, "epochs": 2}
    with pytest.raises(
        UlsamError, match=r"^diverged: the loss is (nan|inf) in epoch 1, step \d, at learning rate \d\S*e\+29: "
    ):
        train(config(data, **settings), run)
    state = read_checkpoint(run)
    assert state is not None
    assert 1 <= state["position"]["batch"] < 4
    assert sorted(os.listdir(run)) == [".lock", "checkpoint.pt", "config.yaml"]


def test_outputs_that_are_not_finite_stop_the_run(data: Path, tmp_path: Path) -> None:
    settings = {"lr": 1e38, "warmup_epochs": 0, "batch_size": 36}  # one update, then the model is measured
    with pytest.raises(UlsamError, match=r"^diverged: .* in epoch 1, step 1, at learning rate \S*e\+37: try a lower"):
        train(config(data, **settings), tmp_path / "run")


def test_an_error_in_measuring_loses_no_training(bad_data: Path, tmp_path: Path) -> None:
    shutil.copytree(bad_data, tmp_path / "data")
    for path in (tmp_path / "data" / "val" / "class2").iterdir():
        path.write_bytes(b"")
    settings = config(tmp_path / "data", batch_size=2, epochs=2)
    with pytest.raises(UlsamError, match="more than 3 images cannot be read"):
        train(settings, tmp_path / "run")
    state = read_checkpoint(tmp_path / "run")
    assert state is not None
    assert (state["position"]["epoch"], state["position"]["batch"]) == (0, 23)
    summary = resume(tmp_path / "run", {"max_unreadable": 1.0})
    train(dataclasses.replace(settings, max_unreadable=1.0), tmp_path / "unbroken")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "unbroken"))
    assert summary["scores"] == json.loads((tmp_path / "unbroken" / "summary.json").read_text())["scores"]


def test_the_folder_of_a_new_run(data: Path, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UlsamError, match=r"trained is not an empty folder: resume it with `ulsam.resume`, name one"):
        train(config(data), trained)
    with pytest.raises(UlsamError, match=r"data\d* is not an empty folder: name one"):
        train(config(data), data)
    (tmp_path / "file").touch()
    with pytest.raises(UlsamError, match=r"file is not an empty folder: name one"):
        train(config(data), tmp_path / "file")
    with pytest.raises(UlsamError, match=r"cannot make the folder .*file/run: Not a directory"):
        train(config(data), tmp_path / "file" / "run")
    (tmp_path / "empty").mkdir()
    train(config(data), tmp_path / "empty")
    assert sorted(os.listdir(tmp_path / "empty")) == FILES


def test_settings_survive_yaml(data: Path, tmp_path: Path) -> None:
    full = config(data, edits=["insert blocks.2"], mean=[0, 0.5, 1], model_args={"a": [1, {"b": None}]}, lr="1e-4")
    (tmp_path / "run.yaml").write_text(full.to_yaml())
    assert TrainConfig.from_mapping(yaml.safe_load(full.to_yaml())) == full
    assert dataclasses.asdict(full)["lr"] == 1e-4
