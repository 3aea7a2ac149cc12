"""The benchmark of shipped models: what it makes of times and answers, and the table of it."""

import json
from types import ModuleType

import numpy as np
import pytest

from scripts import load_benchmark


@pytest.fixture(scope="module")
def deployed() -> ModuleType:
    return load_benchmark("deployed")


def answers(right: list[int], size: int) -> dict[str, object]:
    outcomes = {"images": len(right), "right": np.packbits(right).tobytes().hex(), "names": "digest"}
    scores = {"top1": float(np.mean(right)), "images": len(right)}
    return {"split": None, "scores": scores, "outcomes": outcomes, "bytes": size}


def test_int8_is_paired_with_its_own_model_and_shown_in_the_table(deployed, tmp_path):
    right = [1] * 80 + [0] * 20
    worse = [1] * 78 + [0] * 22
    one = {"pytorch": answers(right, 0), "float32": answers(right, 4_000_000), "int8": answers(worse, 1_000_000)}
    other = {"pytorch": answers(right, 0), "float32": answers(worse, 4_000_000), "int8": answers(worse, 1_000_000)}
    arm = deployed.summary({0: one, 1: other})
    assert arm["float32"]["minus_pytorch"]["mean"] == pytest.approx(-0.01)
    assert arm["int8"]["minus_float32"]["of_seeds"] == pytest.approx((-0.02, 0.0))
    assert (arm["int8"]["seeds"], arm["int8"]["top1"], arm["int8"]["bytes"]) == ([0, 1], [0.78, 0.78], 1_000_000)

    tables = load_benchmark("tables_deploy")
    assert "Not measured yet: `python benchmarks/deployed.py runs/x x`" in tables.deployed_table(tmp_path, "x")
    models = {"base": {"float32": {"seconds": 0.004, "ratio": 1.0}, "int8": {"seconds": 0.002}, "times_faster": 2.0}}
    result = {
        "arms": {"base": arm},
        "times": [{"batch": 1, "threads": 2, "models": models}],
        "machine": {"processor": "A processor"},
        "versions": {"onnxruntime": "1.0"},
    }
    (tmp_path / "deployed_x.json").write_text(json.dumps(result))
    *_, whole, small = tables.deployed_table(tmp_path, "x").splitlines()
    assert whole == "| base | 4.00 MB | 79.00 ± 1.41 (2) |  | 4.0 ms, x 1.00 |"
    assert small.startswith("| base, int8 | 1.00 MB (25%) | 78.00 ± 0.00 (2) | -1.00 [")
    assert small.endswith("] | 2.0 ms, 2.00 x faster |")


def test_ways_to_int8_stand_against_float32_in_the_table(tmp_path):
    def way(top1: float, mean: float, size: int, seconds: float, ratio: float, interval: list[float] | None):
        minus = {"mean": mean, "low": mean - 0.005, "high": mean + 0.005}
        times = {"seconds": seconds, "ratio": ratio, "ratio_interval": interval}
        return {"top1": top1, "minus_float32": minus, "bytes": size, **times}

    ways = {
        "float32, ONNX Runtime": way(0.9, 0.0, 8_000_000, 0.004, 1.0, None),
        "ulsam, ONNX Runtime": way(0.898, -0.002, 2_000_000, 0.002, 0.5, [0.45, 0.55]),
    }
    result = {
        "models": {"a_model": {"images": 100, "ways": ways}},
        "machine": {"processor": "A processor"},
        "versions": {"nncf": "3", "openvino": "2", "onnxruntime": "1"},
    }
    (tmp_path / "quantized.json").write_text(json.dumps(result))
    heading, *_, whole, small = load_benchmark("tables_deploy").quantized_table(tmp_path).splitlines()
    assert heading.startswith("A processor, NNCF 3, OpenVINO 2, ONNX Runtime 1,")
    assert whole == "| a_model, 100 images | float32, ONNX Runtime | 8.00 MB | 90.00 |  | 4.0 ms, x 1.00 |"
    assert small == (
        "|  | ulsam, ONNX Runtime | 2.00 MB | 89.80 | -0.20 [-0.70, +0.30] | 2.0 ms, x 0.50 [0.45, 0.55] |"
    )
