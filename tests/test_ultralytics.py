"""Edited YOLO models through what Ultralytics does with a model: training, checkpoints, fusing, export."""

import os
import random
import subprocess
import sys
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import ulsam
from calibrating import calibrated
from ulsam.base.errors import UlsamError
from ulsam.surgery.edited import changes
from ulsam.ultralytics import trainer_for

os.environ.update(YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false", YOLO_VERBOSE="false")
SETTINGS_OF_ULTRALYTICS = tempfile.TemporaryDirectory(prefix="ulsam-yolo-")
os.environ.setdefault("YOLO_CONFIG_DIR", SETTINGS_OF_ULTRALYTICS.name)
ultralytics = pytest.importorskip("ultralytics")

TINY = """
nc: 2
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, C2f, [16, True]]
  - [-1, 1, Conv, [32, 3, 2]]
  - [-1, 2, C2f, [32, True]]
head:
  - [[2, 4], 1, Detect, [nc]]
"""
#: of boxes in pixels, after BatchNorm was folded
ROUNDING = {"rtol": 1e-3, "atol": 0.02}
TINY_EDITS = ["insert model.1 g=4", "replace model.4 g=8"]


def draw(root: Path, task: str) -> str:
    """A set of discs and squares for a task, as Ultralytics reads it; what its ``data`` has to be."""
    rng = random.Random(0)
    for number in range(12):
        split, kind = ("train", "val")[number % 3 == 0], number % 2
        image = Image.new("RGB", (64, 64), (rng.randrange(60),) * 3)
        x, y, side = rng.randrange(4, 30), rng.randrange(4, 30), 28
        pen = ImageDraw.Draw(image)
        shape = pen.rectangle if kind else pen.ellipse
        shape((x, y, x + side, y + side), fill=((40, 40, 220), (220, 40, 40))[kind])
        folder = root / split / ("disc", "square")[kind] if task == "classify" else root / "images" / split
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number}.png")
        if task != "classify":
            left, top, right, bottom = (value / 64 for value in (x, y, x + side, y + side))
            box = [(left + right) / 2, (top + bottom) / 2, side / 64, side / 64]
            corners = [left, top, right, top, right, bottom, left, bottom]
            labels = root / "labels" / split
            labels.mkdir(parents=True, exist_ok=True)
            points = [left, top, 2, right, bottom, 2]
            values = {"detect": box, "pose": box + points}.get(task, corners)
            (labels / f"{number}.txt").write_text(" ".join(map(str, [kind, *values])))
    if task == "classify":
        return str(root)
    content = {"path": str(root), "train": "images/train", "val": "images/val", "names": {0: "disc", 1: "square"}}
    content |= {"kpt_shape": [2, 3], "flip_idx": [1, 0]} if task == "pose" else {}
    (root / "data.yaml").write_text(yaml.safe_dump(content))
    return str(root / "data.yaml")


def settings(folder: Path, task: str = "detect") -> dict[str, Any]:
    data = draw(folder / "data", task)
    quiet = {"plots": False, "verbose": False, "amp": False, "workers": 0, "device": "cpu"}
    return quiet | {"data": data, "imgsz": 64, "batch": 4, "epochs": 1, "optimizer": "SGD", "project": str(folder)}


def fresh(name: str | Path) -> Any:
    yolo = ultralytics.YOLO(name)
    calibrated(yolo.model)
    return yolo


def tiny(folder: Path) -> Any:
    (folder / "tiny.yaml").write_text(TINY)
    return fresh(folder / "tiny.yaml")


def edited(folder: Path) -> Any:
    yolo = tiny(folder)
    ulsam.apply(yolo.model, TINY_EDITS)
    return yolo


def outputs(model: nn.Module, image: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = tree_leaves(model.eval()(image))[0]
    return found


def layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, ulsam.ULSAM)]


def check_life(yolo: Any, edits: list[str], options: dict[str, Any]) -> None:
    """Train, reload, fuse, export, train again: the layers are there, and outputs agree."""
    onnxruntime = pytest.importorskip("onnxruntime")
    folder, image = Path(options["project"]), torch.rand(1, 3, 64, 64)
    expected = layers(yolo.model)
    yolo.train(trainer=trainer_for(yolo), name="first", **options)
    best = folder / "first" / "weights" / "best.pt"

    reloaded = ultralytics.YOLO(best)
    assert ulsam.edits_of(reloaded.model) == ulsam.edits_of(yolo.model) == edits
    assert layers(reloaded.model) == expected
    one = outputs(reloaded.model, image)
    torch.testing.assert_close(outputs(yolo.model, image), one)
    for part in changes(reloaded.model)[0]:
        assert reloaded.model.state_dict()[part].abs().sum() > 0

    fused = deepcopy(reloaded.model).fuse(verbose=False)
    assert fused.is_fused() and layers(fused) == expected
    torch.testing.assert_close(outputs(fused, image), one, **ROUNDING)
    ulsam_weights = [module.depthwise.weight for module in fused.modules() if isinstance(module, ulsam.ULSAM)]
    for weight in ulsam_weights:
        weight.data.mul_(-40)
    assert not torch.allclose(outputs(fused, image), one, **ROUNDING)  # the layers do run when fused

    onnx = ultralytics.YOLO(best).export(format="onnx", imgsz=64, simplify=False, device="cpu")
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: image.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), one, **ROUNDING)

    reloaded.train(trainer=trainer_for(reloaded), name="second", **options)
    again = ultralytics.YOLO(folder / "second" / "weights" / "best.pt")
    assert ulsam.edits_of(again.model) == edits and layers(again.model) == expected


@pytest.mark.slow
def test_a_trained_edit_lives(tmp_path: Path) -> None:
    check_life(edited(tmp_path), TINY_EDITS, settings(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("yolov5n.yaml", "detect"),
        ("yolov8n.yaml", "detect"),
        ("yolo11n.yaml", "detect"),
        ("yolo26n.yaml", "detect"),
        ("yolo11n-seg.yaml", "segment"),
        ("yolo11n-cls.yaml", "classify"),
        ("yolo11n-pose.yaml", "pose"),
        ("yolo11n-obb.yaml", "obb"),
    ],
)
def test_a_trained_edit_lives_in_released_models(name: str, task: str, tmp_path: Path) -> None:
    yolo = fresh(name)
    blocks = [place.name for place in ulsam.candidates(yolo.model) if place.name.startswith("model.6")]
    edits = ["insert model.4 g=4", f"replace {blocks[0]} g=4"]
    check_life(ulsam.apply(yolo.model, edits) and yolo, edits, settings(tmp_path, task))


@pytest.mark.parametrize(
    "name",
    [
        *(
            pytest.param(f"{name}.yaml", marks=pytest.mark.slow)
            for name in ("yolov5n", "yolov8n", "yolo26n", "yolo11n")
        ),
        "yolo11n-seg.yaml",
    ],
)
def test_replaced_blocks_keep_what_the_model_reads(name: str) -> None:
    model = fresh(name).model
    state, image = deepcopy(model.state_dict()), torch.rand(1, 3, 64, 64)
    before = outputs(model, image)
    places = [place.name for place in ulsam.candidates(model)]
    top = next((place for place in places if place.count(".") == 1), "model.9")
    old = model.get_submodule(top)
    ulsam.replace(model, top) if top in places else ulsam.insert(model, top)
    new = model.get_submodule(top)
    assert [getattr(new, key) for key in ("f", "i", "type", "np")] == [old.f, old.i, old.type, old.np]
    assert not torch.equal(outputs(model, image), before)
    ulsam.undo(model)
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)
    torch.testing.assert_close(outputs(model, image), before, rtol=0, atol=0)


def test_training_starts_with_the_weights_of_the_model(tmp_path: Path) -> None:
    yolo = edited(tmp_path)
    yolo.model.model[4].depthwise.weight.data.fill_(7.0)
    aside = deepcopy(changes(yolo.model)[1]["model.4"].state_dict())
    yolo.train(trainer=trainer_for(yolo), name="run", lr0=1e-9, warmup_epochs=0, **settings(tmp_path))
    assert (yolo.model.model[4].depthwise.weight - 7).abs().max() < 0.1
    restored = ulsam.undo(yolo.model).model[4].state_dict()  # what the edit put aside came through the checkpoint
    torch.testing.assert_close(dict(restored), dict(aside), rtol=0, atol=0)


@pytest.mark.slow
def test_new_weights_hold_none_of_a_replaced_block(tmp_path: Path) -> None:
    yolo = edited(tmp_path)
    yolo.train(trainer=trainer_for(yolo), name="run", pretrained=False, **settings(tmp_path))
    assert ulsam.edits_of(yolo.model) == TINY_EDITS
    with pytest.raises(UlsamError, match=r"model\.4 cannot return"):
        ulsam.undo(yolo.model)


@pytest.mark.slow
def test_weights_of_an_unedited_file(tmp_path: Path) -> None:
    plain, yolo = tiny(tmp_path), edited(tmp_path)
    plain.load(plain.model).save(tmp_path / "plain.pt")
    file = str(tmp_path / "plain.pt")
    yolo.train(trainer=trainer_for(yolo), name="run", pretrained=file, lr0=1e-9, warmup_epochs=0, **settings(tmp_path))
    stem = plain.model.model[0].conv.weight
    torch.testing.assert_close(yolo.model.model[0].conv.weight, stem, rtol=1e-3, atol=1e-3)
    ulsam.undo(yolo.model)
    torch.testing.assert_close(yolo.model.model[4].cv1.conv.weight, plain.model.model[4].cv1.conv.weight.half().float())


@pytest.mark.slow
def test_an_interrupted_run_resumes_with_its_edits(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(trainer: Any) -> None:
        raise Stop

    yolo = edited(tmp_path)
    yolo.add_callback("on_model_save", stop)
    options = settings(tmp_path) | {"epochs": 2}
    with pytest.raises(Stop):
        yolo.train(trainer=trainer_for(yolo), name="run", **options)
    last = ultralytics.YOLO(tmp_path / "run" / "weights" / "last.pt")
    last.train(trainer=trainer_for(last), resume=True)
    assert last.trainer.epoch == 1
    assert ulsam.edits_of(last.model) == TINY_EDITS


def test_a_model_edited_since_is_refused(tmp_path: Path) -> None:
    yolo = edited(tmp_path)
    trainer = trainer_for(yolo)
    ulsam.insert(yolo.model, "model.0")
    with pytest.raises(UlsamError, match=r"insert model\.0 g=4.*call trainer_for again"):
        yolo.train(trainer=trainer, **settings(tmp_path))


def test_training_on_from_a_file_without_the_trainer_is_refused(tmp_path: Path) -> None:
    """Ultralytics' own trainer builds the model anew; the weights of the layers would be left out without a word."""
    edited(tmp_path).save(tmp_path / "edited.pt")
    yolo = ultralytics.YOLO(tmp_path / "edited.pt")
    with pytest.raises(UlsamError, match=r"lacks the edits: yolo\.train\(trainer=ulsam\.ultralytics\.trainer_for"):
        yolo.train(**settings(tmp_path))
    again = ultralytics.YOLO(tmp_path / "edited.pt")
    assert ulsam.edits_of(again.model) == TINY_EDITS
    assert type(ulsam.undo(again.model).yaml) is dict


def test_a_model_without_an_edit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UlsamError, match=r"yolo\.model holds no edit"):
        trainer_for(tiny(tmp_path))


@pytest.mark.slow
def test_the_trainer_reaches_the_processes_of_several_gpus(tmp_path: Path) -> None:
    """Ultralytics hands the class to them by cloudpickle."""
    cloudpickle = pytest.importorskip("ray.cloudpickle")
    (tmp_path / "trainer").write_bytes(cloudpickle.dumps(trainer_for(edited(tmp_path))))
    program = (
        "import pickle, sys, pathlib\n"
        "trainer = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())(overrides=eval(sys.argv[2]))\n"
        "import ulsam; print(ulsam.edits_of(trainer.get_model(cfg=sys.argv[3], weights=None, verbose=False)))"
    )
    model = str(tmp_path / "tiny.yaml")
    arguments = [str(tmp_path / "trainer"), repr(settings(tmp_path) | {"model": model}), model]
    run = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == str(TINY_EDITS)
