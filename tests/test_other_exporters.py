"""Exporters that a user calls on an edited model by hand."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from tool_models import (
    EDITED,
    assert_same,
    images,
    inserted,
    randomised,
    released,
    replaced,
)
from ulsam.deploy.openvino_core import openvino_core
from ulsam.layer.ulsam import ULSAM

DYNAMIC = torch.export.Dim.DYNAMIC
#: For tools that take seconds a model: the one that holds both forms, behind a block and in a block's place.
EDITED_ONCE = pytest.mark.parametrize(
    "make", [pytest.param(inserted, marks=pytest.mark.slow), pytest.param(replaced, marks=pytest.mark.slow), released]
)


@pytest.fixture(autouse=True)
def _no_gradients_left() -> Iterator[None]:
    yield
    torch._dynamo.reset()


# exporters


def run_onnx(path: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@EDITED_ONCE
@pytest.mark.parametrize(
    "dynamo", [pytest.param(True, marks=pytest.mark.slow, id="dynamo"), pytest.param(False, id="torchscript")]
)
@pytest.mark.filterwarnings("ignore")
def test_ones_own_onnx_export(make: Callable[[], nn.Module], dynamo: bool, tmp_path: Path) -> None:
    model, path, x = randomised(make()), tmp_path / "model.onnx", images()
    free: dict[str, Any] = {"dynamic_axes": {"x": {0: "batch", 2: "height", 3: "width"}}, "input_names": ["x"]}
    if dynamo:
        free = {"dynamic_shapes": ({0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC},), "verbose": False}
    torch.onnx.export(model, (x,), path, dynamo=dynamo, **free)
    assert {opset.domain for opset in onnx.load(path).opset_import} <= {"", "ai.onnx"}
    assert_same(lambda x: run_onnx(path, x), model)
    other = images(3, 32, 64)
    with torch.no_grad():
        expected = model(other)
    torch.testing.assert_close(run_onnx(path, other), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("form", ["equations", "folded"])
def test_a_layer_in_ones_own_onnx_file_is_few_nodes_without_loops(form: str, tmp_path: Path) -> None:
    layer = ULSAM(32, 4, form=form).eval()  # type: ignore[arg-type]
    path, x = tmp_path / "layer.onnx", torch.randn(2, 32, 7, 6)
    torch.onnx.export(
        layer, (x,), path, dynamo=True, verbose=False, dynamic_shapes=({0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC},)
    )
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert len(kinds) <= (11 if form == "equations" else 13), kinds
    assert not set(kinds) & {"Loop", "Scan", "If", "Split", "Concat", "Shape", "Reshape"}


@EDITED
@pytest.mark.filterwarnings("ignore")
def test_torchscript_by_both_ways(make: Callable[[], nn.Module]) -> None:
    model = randomised(make())
    classes = [type(module) for module in model.modules()]
    for program in (
        torch.jit.script(model),
        torch.jit.trace(model, images()),
        torch.jit.freeze(torch.jit.script(model)),
    ):
        assert "ulsam::" not in str(program.inlined_graph)
        assert_same(program, model)
    assert [type(module) for module in model.modules()] == classes  # scripting leaves the model as it is


WITHOUT_ULSAM = """
import sys, torch
sys.modules["ulsam"] = None  # importing it fails
x = torch.load(sys.argv[2])
for path in sys.argv[3:]:
    if path.endswith(".pt2a"):
        program = torch._inductor.aoti_load_package(path)
    elif path.endswith(".pt2"):
        program = torch.export.load(path).module()
    else:
        program = torch.jit.load(path)
    with torch.no_grad():
        torch.save(program(x), path + ".out")
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_files_run_in_a_process_without_ulsam(tmp_path: Path) -> None:
    model, x = randomised(released()), images()
    torch.jit.script(model).save(tmp_path / "script.pt")
    torch.jit.trace(model, x).save(tmp_path / "trace.pt")
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "program.pt2")
    torch.save(x, tmp_path / "x")
    paths = [str(tmp_path / name) for name in ("script.pt", "trace.pt", "program.pt2")]
    environment = {**os.environ, "PYTHONPATH": ""}
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_ULSAM, "x", str(tmp_path / "x"), *paths],
        env=environment, check=True, timeout=300,
    )  # fmt: skip
    for path in paths:
        assert_same(lambda _, path=path: torch.load(path + ".out"), model)


@EDITED_ONCE
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_torch_export_takes_the_layer_apart(make: Callable[[], nn.Module], strict: bool) -> None:
    model, x = randomised(make()), images()
    program = torch.export.export(model, (x,), strict=strict, dynamic_shapes=({0: DYNAMIC},))
    assert "torch.ops.ulsam" not in program.graph_module.code
    assert_same(program.module(), model)
    assert_same(program.run_decompositions().module(), model)


@pytest.mark.slow
@EDITED_ONCE
def test_torch_export_of_a_model_in_training(make: Callable[[], nn.Module]) -> None:
    training = randomised(make()).train()
    exported = torch.export.export(copy.deepcopy(training), (images(4),)).module()
    torch.testing.assert_close(exported(images(4)), training(images(4)), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ahead_of_time_compilation(tmp_path: Path) -> None:
    model, x = randomised(released()), images()
    program = torch.export.export(model, (x,))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    with torch.no_grad():
        assert_same(torch._inductor.aoti_load_package(path), model, 1e-5)


@pytest.mark.slow
@EDITED_ONCE
@pytest.mark.filterwarnings("ignore")
def test_openvino_converts_the_model_itself(make: Callable[[], nn.Module]) -> None:
    openvino = pytest.importorskip("openvino")
    model = randomised(make())
    converted = openvino.convert_model(model, example_input=images())
    compiled = openvino_core().compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert_same(lambda x: torch.from_numpy(compiled(x.numpy())[0]), model, 1e-5)


@EDITED_ONCE
@pytest.mark.filterwarnings("ignore")
def test_executorch_takes_a_plain_export(make: Callable[[], nn.Module]) -> None:
    exir = pytest.importorskip("executorch.exir")
    runtime = pytest.importorskip("executorch.runtime")
    model, x = randomised(make()), images(1)
    program = torch.export.export(model, (x,)).run_decompositions()
    buffer = exir.to_edge_transform_and_lower(program).to_executorch().buffer
    method = runtime.Runtime.get().load_program(bytes(buffer)).load_method("forward")
    with torch.no_grad():
        torch.testing.assert_close(method.execute([x])[0], model(x), rtol=1e-3, atol=1e-3)


@EDITED_ONCE
@pytest.mark.filterwarnings("ignore")
def test_coremltools_takes_a_plain_export(make: Callable[[], nn.Module]) -> None:
    coremltools = pytest.importorskip("coremltools")
    program = torch.export.export(randomised(make()), (images(1),)).run_decompositions({})
    converted = coremltools.convert(program, convert_to="mlprogram", minimum_deployment_target=coremltools.target.iOS17)
    kinds = [op.op_type for op in next(iter(converted._mil_program.functions.values())).operations]
    assert kinds.count("max_pool") == 2 and "softmax" not in kinds and kinds.count("reduce_max") == 2
