"""Models side by side in real processes: what is measured, in which order, and what is refused or kept."""

import csv
import io
import json
import logging
import os
import random
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from PIL import Image
from torch import nn

from tiny import TINY_MODEL
from ulsam.base.errors import UlsamError
from ulsam.base.logs import LOGGER
from ulsam.base.timing import WARM_UP, figures, in_turn
from ulsam.cli import main
from ulsam.deploy.bench import MAX_TURNS, bench, start
from ulsam.deploy.bench_models import open_bench_model
from ulsam.deploy.bench_report import COLUMNS, BenchRow, csv_text, text
from ulsam.deploy.bench_worker import Case, opened
from ulsam.deploy.export import engine_of
from ulsam.model.build import build, load, make_spec, save
from ulsam.model.spec import Edit
from ulsam.surgery.cost import cost

TIMM = "infer_img_size,infer_batch_size,infer_samples_per_sec,infer_step_time,infer_gmacs,infer_macts,param_count"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """model.safetensors and model.onnx: one with decided answers; other.onnx: another classifier."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    spec = make_spec(TINY_MODEL, ("a", "b", "c"), [Edit("insert", "blocks.1.0", 4)], size=32)
    model, _ = build(spec)
    nn.init.normal_(model.get_submodule("classifier").weight)
    save(model, spec, root / "model.safetensors")
    content = engine_of(model, spec).files[".onnx"]
    (root / "model.onnx").write_bytes(content)
    graph = onnx.load_from_string(content)
    name = next(node.input[1] for node in graph.graph.node if node.op_type == "Gemm")
    weight = next(tensor for tensor in graph.graph.initializer if tensor.name == name)
    weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), name))
    onnx.save(graph, root / "other.onnx")
    return root


def children() -> set[int]:
    """The processes that this one has started and that are alive or not waited for."""
    return {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


# figures


def test_figures_are_those_of_numpy():
    random_ = np.random.default_rng(0)
    first = random_.lognormal(-5, 0.4, 101)
    times = 1.3 * first * random_.lognormal(0, 0.02, 101)
    found = figures(list(times), list(first))
    assert found["seconds"] == np.median(times)
    assert found["seconds_p95"] == np.percentile(times, 95)
    assert found["ratio"] == np.median(times) / np.median(first)
    assert found["turns"] == 101
    low, high = found["ratio_interval"]
    assert low < found["ratio"] < high
    # what slows both in a turn is taken together: an interval that let turns of the two models mix is far wider
    shuffled = figures(list(times), list(random_.permutation(first)))["ratio_interval"]
    assert high - low < 0.5 * (shuffled[1] - shuffled[0])


def test_an_interval_holds_what_is_true_as_often_as_it_says():
    random_ = np.random.default_rng(1)
    inside = 0
    for _ in range(100):
        machine = random_.lognormal(0, 0.3, 40)
        times, first = (machine * scale * random_.lognormal(0, 0.05, 40) for scale in (0.9, 1.0))
        low, high = figures(list(times), list(first))["ratio_interval"]
        inside += low <= 0.9 <= high
    assert 88 <= inside <= 100


def test_no_interval_without_something_to_take_it_over():
    times = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert figures(times, [2.0] * 5)["ratio_interval"] is None  # five turns
    assert figures(times * 2, None)["ratio"] is None
    itself = figures(same := times * 2, same)
    assert (itself["ratio"], itself["ratio_interval"]) == (1.0, None)


def test_csv_has_timms_columns_and_units():
    found = cost(nn.Conv2d(3, 8, 3, bias=False), (3, 10, 12))
    common = {"backend": "eager", "batch": 4, "threads": 2, "image_size": 12, "peak_memory": 5_000_000, "turns": 7}
    times = {"seconds": 0.002, "seconds_p95": 0.003, "ratio": 0.5, "ratio_interval": (0.25, 0.75)}
    rows = [
        BenchRow(model="a", model_size=864, cost=found, **common, **times),
        BenchRow(model="b", model_size=1, cost=None, **common, **{**times, "ratio": None, "ratio_interval": None}),
    ]
    written = csv_text(rows)
    assert written.splitlines()[0].startswith(f"model,{TIMM},")
    one, two = csv.DictReader(io.StringIO(written))
    assert tuple(one) == COLUMNS
    assert one == {
        "model": "a",
        "infer_img_size": "12",
        "infer_batch_size": "4",
        "infer_samples_per_sec": "2000",
        "infer_step_time": "2",
        "infer_gmacs": "1.728e-05",
        "infer_macts": "0.00064",
        "param_count": "0.000216",
        "backend": "eager",
        "threads": "2",
        "infer_step_time_p95": "3",
        "infer_step_time_ratio": "0.5",
        "infer_step_time_ratio_low": "0.25",
        "infer_step_time_ratio_high": "0.75",
        "peak_memory_mb": "5",
        "model_size_mb": "0.000864",
        "turns": "7",
    }
    empty = {name for name, value in two.items() if not value}
    assert empty == {name for name in COLUMNS if "ratio" in name or name in TIMM.split(",")[4:]}
    assert "0.500 [0.250, 0.750]" in text(rows)


# order


def test_turns_are_whole_and_shuffled():
    order: list[str] = []

    def measure(name: str) -> float:
        order.append(name)
        return random.random()

    turns = in_turn({name: lambda name=name: measure(name) for name in "abcd"}, seconds=0, max_turns=100)
    first = next(turns)
    assert order[: 4 * WARM_UP] == [name for name in "abcd" for _ in range(WARM_UP)]
    assert len(order) == 4 * WARM_UP + 4 and set(first) == set("abcd")  # no turn is begun before it is asked for
    assert len(list(turns)) == 14
    timed = [tuple(order[place : place + 4]) for place in range(4 * WARM_UP, len(order), 4)]
    assert all(sorted(turn) == list("abcd") for turn in timed)
    assert len(set(timed)) > 5


# real processes


@pytest.mark.slow
def test_base_and_edited_model_in_two_backends(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    before = children()
    words = ["model.safetensors", "other.onnx", "--batch", "2", "--seconds", "0", "--out", str(tmp_path / "out")]
    assert main(["bench", *words]) == 0
    assert children() == before
    out = capsys.readouterr().out
    assert "note    other.onnx is an ONNX file: left out of eager\n" in out
    rows = list(csv.DictReader((tmp_path / "out" / "bench.csv").open()))
    assert [(row["model"], row["backend"]) for row in rows] == [
        ("model.safetensors", "eager"),
        ("model.safetensors", "onnxruntime"),
        ("other.onnx", "onnxruntime"),
    ]
    model, spec = load("model.safetensors")
    counted = cost(model, spec.input_size)
    for row in rows:
        assert (row["infer_img_size"], row["infer_batch_size"], row["threads"], row["turns"]) == ("32", "2", "1", "15")
        assert float(row["infer_gmacs"]) == pytest.approx(counted.macs / 1e9, rel=1e-5)
        assert float(row["param_count"]) == pytest.approx(counted.params / 1e6, rel=1e-5)
        speed = 2 / float(row["infer_step_time"]) * 1e3
        assert float(row["infer_samples_per_sec"]) == pytest.approx(speed, rel=1e-4)
        assert float(row["infer_step_time"]) <= float(row["infer_step_time_p95"])
    eager, exported, other = rows
    assert [row["infer_step_time_ratio"] for row in (eager, exported)] == ["1", "1"]
    medians = [float(row["infer_step_time"]) for row in (other, exported)]
    assert float(other["infer_step_time_ratio"]) == pytest.approx(medians[0] / medians[1], rel=1e-4)
    # nothing of PyTorch is in the other process
    assert float(exported["peak_memory_mb"]) < 0.5 * float(eager["peak_memory_mb"])
    assert float(other["model_size_mb"]) == pytest.approx(Path("other.onnx").stat().st_size / 1e6, rel=1e-5)
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [row["seconds"] for row in found["rows"]] == pytest.approx(
        [1e-3 * float(row["infer_step_time"]) for row in rows], rel=1e-5
    )
    assert {"onnxruntime", "torch", "processor"} <= set(found["where"])
    with Image.open(tmp_path / "out" / "bench.png") as image:
        assert image.format == "PNG"

    assert main(["bench", *words]) == 2
    assert "holds a benchmark already" in capsys.readouterr().err


@pytest.mark.slow
def test_a_file_for_any_size_is_measured_at_the_one_asked_for(folder, tmp_path):
    model, spec = load(folder / "model.safetensors")
    (tmp_path / "open.onnx").write_bytes(engine_of(model, spec, dynamic_size=True).files[".onnx"])
    opened = open_bench_model(str(tmp_path / "open.onnx"), ["onnxruntime"], tmp_path, 48)
    assert opened.images(2).shape == (2, 48, 48, 3)
    assert opened.cost == cost(model, (3, 48, 48))
    with start(opened, "onnxruntime", batch=2, threads=1) as process:
        assert process.time() > 0


@pytest.mark.slow
def test_other_answers_are_refused_before_timing(folder, tmp_path):
    model = open_bench_model(str(folder / "model.onnx"), ["onnxruntime"], tmp_path)
    model.files["onnxruntime"] = str(folder / "other.onnx")
    before = children()
    with pytest.raises(
        UlsamError, match=r"model.onnx by onnxruntime gives other answers than the model.*3 generated images"
    ):
        start(model, "onnxruntime", batch=3, threads=1)
    assert children() == before


def test_what_was_measured_is_kept_on_ctrl_c(folder, tmp_path, logged, request):
    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("time"):  # then only Ctrl-C ends it
                threading.Timer(1.0, os.kill, [os.getpid(), signal.SIGINT]).start()

    before = children()
    out = tmp_path / "out"
    LOGGER.addHandler(listener := Listener())
    request.addfinalizer(lambda: LOGGER.removeHandler(listener))
    with pytest.raises(KeyboardInterrupt, match=r"what was measured is in .*out"):
        bench([str(folder / "model.onnx")], out, backends=["onnxruntime"], batches=[64, 1], seconds=600)
    assert children() == before
    (row,) = csv.DictReader((out / "bench.csv").open())
    assert (row["infer_batch_size"], 0 < int(row["turns"]) < MAX_TURNS) == ("64", True)
    assert [line for line in logged().splitlines() if line.startswith("start")] == ["start   batch 64, threads 1"]


def test_a_process_that_dies_is_reported(folder, tmp_path):
    model = open_bench_model(str(folder / "model.onnx"), ["onnxruntime"], tmp_path)
    with start(model, "onnxruntime", batch=1, threads=1) as process:
        assert process.time() > 0
        os.kill(process._process.pid, signal.SIGKILL)
        with pytest.raises(UlsamError, match=r"model.onnx by onnxruntime: its process ended, killed by signal 9"):
            process.time()


@pytest.mark.slow
def test_openvino_gives_the_models_answers(folder, tmp_path):
    pytest.importorskip("openvino")
    small = nn.Sequential(nn.Conv2d(3, 3, 5, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    normalized = engine_of(small, load(folder / "model.safetensors")[1], preprocessing=False)
    (tmp_path / "normalized.onnx").write_bytes(normalized.files[".onnx"])
    for path in (folder / "model.onnx", tmp_path / "normalized.onnx"):
        model = open_bench_model(str(path), ["openvino"], tmp_path)
        images = model.images(2)
        np.save(tmp_path / "images.npy", images)
        run, size = opened(Case("openvino", model.files["openvino"], str(tmp_path / "images.npy"), "", 1, True))
        np.testing.assert_allclose(run(), model.logits(images), atol=1e-4)
        assert size == path.stat().st_size


@pytest.mark.slow  # compiles
def test_compiled_and_not_folded_models_leave_no_process(folder, tmp_path):
    before = children()
    rows = bench(
        [str(folder / "model.safetensors"), TINY_MODEL],
        tmp_path / "out",
        backends=["compile", "eager"],
        batches=[1],
        seconds=0,
        size=32,
        fold=False,
    )
    assert [(row.model, row.backend) for row in rows[2:]] == [(TINY_MODEL, "compile"), (TINY_MODEL, "eager")]
    assert children() == before


# mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{folder}/model.onnx --backends tensorrt", "unknown backend 'tensorrt'; valid: eager, compile, onnxruntime, "),
        ("{folder}/model.onnx --backends openvino", "--backends openvino needs openvino, which is not installed: "),
        ("{folder}/model.onnx --backends onnxruntime --batch 0", "--batch must be 1 or more, not 0"),
        ("{folder}/model.onnx --threads 1,-2", "--threads must be 1 or more, not -2"),
        ("{folder}/model.onnx --seconds nan", "--seconds must be 0 or more, not nan"),
        ("{folder}/model.onnx {folder}/model.onnx", "model given twice: "),
        ("{folder}/model.onnx --backends eager", "nothing to run: eager of PyTorch run no ONNX files"),
        ("{folder}/model.onnx --no-fold --backends onnxruntime", "--no-fold is for eager and compile: "),
        ("{folder}/model.onnx --size 64", "--size 64: {folder}/model.onnx was exported for images of 32x32"),
        ("{folder}/none.safetensors", "no model file {folder}/none.safetensors"),
        ("{folder}/none.onnx", "no exported model {folder}/none.onnx"),
        ("mobilenetv9", "timm has no model 'mobilenetv9'"),
        ("{folder}/model.onnx --out {folder}/model.onnx", "cannot make the folder {folder}/model.onnx: File exists"),
    ],
)
def test_mistakes_are_one_line(folder, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "openvino", None)  # as where it is not installed
    assert main(["bench", *words.format(folder=folder).split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"ulsam: error: {message.format(folder=folder)}") and error.count("\n") == 1
    assert "openvino" not in words or "pip install 'ulsam[openvino]'" in error
    assert not any(path.is_dir() and any(path.iterdir()) for path in tmp_path.glob("runs/*"))


def test_the_folder_of_a_run_is_its_model(folder, tmp_path):
    (tmp_path / "of folder").mkdir()
    found = open_bench_model(str(folder), ["eager"], tmp_path / "of folder")
    model, _ = load(folder / "model.safetensors")
    x = torch.rand(2, 3, 32, 32)
    copied, _ = load(found.files["eager"])
    assert torch.equal(copied(x), model(x))
