"""What training, comparing and slimming return is what their types say, down to the last key."""

import json
import types
import typing
from pathlib import Path
from typing import Any

import pytest

import ulsam
from comparing import ARMS, run_here
from labelling import draw_attributes
from slimming_runs import SETTINGS, save_untrained
from tiny import draw_splits
from training_runs import config
from ulsam.study.slim import slim
from ulsam.training.train import train
from ulsam.training.train_summary import CostEntry


def differences(value: Any, kind: Any, at: str = "result") -> list[str]:
    """Where a value is not of a type: a TypedDict, or what is made of JSON's types."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return []
    if typing.is_typeddict(kind):
        hints, keys = typing.get_type_hints(kind), set(value)
        found = [f"{at} lacks {key}" for key in sorted(kind.__required_keys__ - keys)]
        found += [f"{at} has {key} too" for key in sorted(keys - hints.keys())]
        return found + [
            line for key in keys & hints.keys() for line in differences(value[key], hints[key], f"{at}.{key}")
        ]
    if origin in (typing.Union, types.UnionType):
        tried = [differences(value, one, at) for one in inner if (one is types.NoneType) == (value is None)]
        return min(tried, key=len, default=[f"{at} is {value!r}, not {kind}"])
    if origin is list and type(value) is list:
        return [line for number, one in enumerate(value) for line in differences(one, inner[0], f"{at}[{number}]")]
    if origin is dict and type(value) is dict:
        return [line for key in value for line in differences(value[key], inner[1], f"{at}.{key}")]
    fits = value in inner if origin is typing.Literal else type(value) in ((int, float) if kind is float else (kind,))
    return [] if fits else [f"{at} is {value!r}, not {kind}"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_splits(tmp_path_factory.mktemp("data"), train=12, val=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("model") / "model.safetensors")


def test_a_difference_is_found() -> None:
    cost = {"params": 1, "macs": 2.5, "input_size": [3, "4"], "rule": "so", "flops": 4}
    assert sorted(differences(cost, CostEntry)) == [
        "result has flops too",
        "result lacks activations",
        "result.input_size[1] is '4', not <class 'int'>",
        "result.macs is 2.5, not <class 'int'>",
    ]


@pytest.mark.parametrize("several", [False, True])
def test_training(several: bool, data: Path, tmp_path: Path) -> None:
    images = draw_attributes(tmp_path / "labels", train=16, val=8) if several else data
    kept = {} if several else {"keep": "best", "class_weights": "balanced"}
    summary = train(config(images, **kept), tmp_path / "run")
    assert differences(summary, ulsam.TrainSummary) == []


@pytest.mark.slow
def test_comparing(data: Path, tmp_path: Path) -> None:
    result, _ = run_here(tmp_path / "out", data, [*ARMS, "bad: lr=1e30"], seeds=2, settings={"clip_grad": 1e30})
    assert [len(arm["failed"]) for arm in result["arms"]] == [0, 0, 2]
    assert differences(result, ulsam.CompareResult) == []
    tried, _ = run_here(tmp_path / "tried", data, ARMS, rates=(0.01, 0.1), seeds=1)
    assert differences(tried, ulsam.CompareResult) == []


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["macs", pytest.param("latency", marks=pytest.mark.slow)])
def test_slimming(budget: str, model: Path, data: Path, tmp_path: Path) -> None:
    share: dict[str, Any] = {budget: 0.97}
    settings = {**SETTINGS, "reconstruct_images": 8}
    if budget == "latency":  # removed blocks save time on any machine, though not each in so short a measurement
        share = {"latency": 0.999} | {"layer": {"layer": "none"}, "latency_seconds": 0.0}
    result = slim(model, data, tmp_path / "out", at="13,14,16,17", **share, settings=settings)
    assert ("timed" in result) == (budget == "latency") and "reconstructed" in result and "result" in result
    assert differences(result, ulsam.SlimResult) == []
    summary = json.loads((tmp_path / "out" / "run" / "summary.json").read_text())
    assert summary["teacher"] and differences(summary, ulsam.TrainSummary) == []
