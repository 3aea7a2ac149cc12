"""Weights are found in the checkpoints that other programs write; what cannot be used is named."""

import argparse
import collections
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ulsam.base.errors import UlsamError
from ulsam.model.build import load_weights, read_weights

TINY_MODEL = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
STATE = TINY_MODEL.state_dict()
OTHER = {name: value + 1 for name, value in STATE.items()}


def under(prefix: str, state: dict[str, Tensor] = STATE) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def optimizer() -> dict[str, Any]:
    made = torch.optim.Adam(TINY_MODEL.parameters())
    TINY_MODEL(torch.ones(2, 3, 2, 2)).sum().backward()
    made.step()
    return made.state_dict()


FACTS = {"epoch": 3, "best": np.float64(0.75), "seen": np.int64(9), "ok": np.bool_(True), "lr": 0.1, "name": "net"}
CHECKPOINTS = {
    "plain": STATE,
    "ordered": collections.OrderedDict(STATE),
    "beside a NumPy scalar": {**STATE, "best": np.float32(0.5), "epoch": 3, "note": "x"},
    "beside NumPy scalars": {"model": STATE, **FACTS},
    "settings": {"model": STATE, "args": argparse.Namespace(lr=0.1, out=Path("x"))},
    "Lightning": {
        "state_dict": {**under("model."), "criterion.weight": torch.ones(3)},
        "pytorch-lightning_version": "2.5",
        "hyper_parameters": {"lr": 0.1},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.ones(())}},
        "loops": {"fit_loop": {"state_dict": {}}},
        "optimizer_states": [optimizer()],
    },
    "compiled, parallel": {"model_state_dict": under("module._orig_mod."), "optimizer_state_dict": optimizer()},
    "an unknown name": {"student": STATE, "optimizer": optimizer(), "lr_schedule": {"last": torch.ones(1)}},
    "deep": {"state": {"inner": {"network": under("net.")}}},
    "thop": {
        **STATE,
        **{f"{name}total_{what}": torch.zeros(1) for name in ("", "0.", "1.") for what in ("ops", "params")},
    },
    **{name: {name: STATE, **FACTS} for name in ("model_state_dict", "model_state", "net", "weights", "state_dict")},
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_checkpoint_gives_its_model(case: str, tmp_path: Path) -> None:
    torch.save(CHECKPOINTS[case], tmp_path / "x.pt")
    found = read_weights(tmp_path / "x.pt")
    assert list(found) == list(STATE)
    assert load_weights(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), found) == []


@pytest.mark.parametrize("module", [b"pathlib", b"pathlib._local"])
@pytest.mark.parametrize("name", [b"PosixPath", b"WindowsPath", b"PurePosixPath", b"PureWindowsPath"])
def test_paths_in_a_checkpoint_are_read_whichever_python_and_system_wrote_them(
    module: bytes, name: bytes, tmp_path: Path
) -> None:
    torch.save({"model": STATE, "out": PurePosixPath("x")}, tmp_path / "here.pt")
    written = f"c{PurePosixPath.__module__}\nPurePosixPath\n".encode()
    with zipfile.ZipFile(tmp_path / "here.pt") as here, zipfile.ZipFile(tmp_path / "x.pt", "w") as there:
        contents = {entry: here.read(entry) for entry in here.namelist()}
        assert sum(written in content for content in contents.values()) == 1
        for entry, content in contents.items():
            there.writestr(entry, content.replace(written, b"c" + module + b"\n" + name + b"\n"))
    assert list(read_weights(tmp_path / "x.pt")) == list(STATE)


@pytest.mark.parametrize("name", ["state_dict_ema", "model_ema", "ema"])
def test_averaged_weights_are_preferred_and_said(name: str, tmp_path: Path, logged: Callable[[], str]) -> None:
    torch.save({"state_dict": STATE, name: under("module.", OTHER)}, tmp_path / "x.pt")
    found = read_weights(tmp_path / "x.pt")
    assert all(torch.equal(found[key], OTHER[key]) for key in STATE)
    assert logged() == f"note    {tmp_path / 'x.pt'}: takes the averaged weights, {name}\n"


def test_an_averaged_model_is_one(tmp_path: Path, logged: Callable[[], str]) -> None:
    torch.save(AveragedModel(TINY_MODEL).state_dict(), tmp_path / "x.pt")
    assert list(read_weights(tmp_path / "x.pt")) == list(STATE)
    assert "takes the averaged weights, n_averaged" in logged()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"student": STATE, "teacher": OTHER}, "holds several state dicts, 'student', 'teacher': save the one of"),
        ({"epoch": 3, "optimizer": optimizer()}, "is no state dict: it holds 'epoch', 'optimizer'; save the model's"),
        ({}, "is no state dict: it holds nothing"),
        (
            TINY_MODEL,
            "it needs the code of torch.nn.modules.batchnorm.BatchNorm2d, torch.nn.modules.container.Sequential",
        ),
        ([STATE], "is no state dict, but a list"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_cannot_be_used_is_named(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UlsamError) as caught:
        read_weights(tmp_path / "x.pt")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_objects_in_the_guise_of_a_scalar_run_nothing(tmp_path: Path) -> None:
    class Odd:
        def __reduce__(self) -> Any:
            return np.float64(0).__reduce__()[0], (np.dtype("O"), (tmp_path / "made").mkdir)

    torch.save({"model": STATE, "x": Odd()}, tmp_path / "x.pt")
    with pytest.raises(UlsamError):
        read_weights(tmp_path / "x.pt")
    assert not (tmp_path / "made").exists()


def test_counters_of_an_average_are_no_weights(tmp_path: Path) -> None:
    weights, averaged = {"a.weight": torch.ones(2)}, {"a.weight": torch.zeros(2)}
    for number, (ema, expected) in enumerate(
        [({"decay": torch.tensor(0.9), "n": 3}, weights), ({"model": averaged, "decay": 0.9}, averaged)]
    ):
        torch.save({"model": weights, "ema": ema}, tmp_path / f"{number}.pt")
        found = read_weights(tmp_path / f"{number}.pt")
        assert found.keys() == expected.keys() and torch.equal(found["a.weight"], expected["a.weight"])


def test_another_models_weights_do_not_stand_in(tmp_path: Path) -> None:
    mixed = {"a.weight": torch.ones(2), "extra": {"b": [1]}}
    torch.save({"model": mixed, "teacher": {"a.weight": torch.zeros(2)}}, tmp_path / "two.pt")
    with pytest.raises(UlsamError, match="'model' holds no state dict alone; save the model's state_dict"):
        read_weights(tmp_path / "two.pt")
