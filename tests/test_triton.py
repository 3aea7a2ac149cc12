"""The GPU backend where there is no GPU: its kernels in Triton's interpreter, and compiled for one.

This file is also the script of the interpreted cases: TRITON_INTERPRET=1 holds for a whole process.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import ulsam.layer.ops
from operator_cases import FORMS, OPERATOR, UNUSUAL, Case, check, laid_out
from ulsam.layer.ops import subspace_attention, which_backend

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

LAYOUTS = ("contiguous", "channels_last")
CHECKS: dict[str, Callable[[], None]] = {}


def add(shape: tuple[int, ...], groups: int, form: str, kind: str, layout: str, dtype: torch.dtype) -> None:
    def run() -> None:
        case = Case(shape, groups, form, kind, layout, dtype, 0)
        check(case.run("triton"), case.run("reference", torch.float64), case, dtype)

    CHECKS[f"{form}, {kind}, {'x'.join(map(str, shape))}, g = {groups}, {layout}, {dtype}"] = run


SHAPES: list[tuple[tuple[int, ...], int, str, str, torch.dtype]] = [
    ((2, 6, 3, 4), 2, form, ("normal", "relu", "quantized")[n % 3], torch.float32)
    for n, form in enumerate(FORMS + UNUSUAL)
]
SHAPES += [
    ((1, 4, 5, 3), 2, "equations", "equal", torch.float32),
    ((1, 4, 5, 3), 2, "folded", "quantized", torch.float32),
    ((1, 10, 3, 4), 2, "folded", "relu", torch.float16),
    ((2, 5, 3, 3), 1, "batch statistics", "normal", torch.float16),
    ((2, 5, 3, 3), 1, "batch statistics", "normal", torch.bfloat16),
    ((1, 10, 3, 4), 2, "folded", "relu", torch.bfloat16),
    ((1, 130, 2, 9), 1, "folded", "normal", torch.float32),  # more channels than in a tile
    ((2, 130, 2, 3), 2, "batch statistics", "normal", torch.float32),
    ((1, 2, 19, 28), 1, "folded", "relu", torch.float32),  # more pixels than in a tile
    ((1, 64, 4, 9), 1, "batch statistics", "relu", torch.float32),
    ((2, 3, 1, 1), 3, "equations", "normal", torch.float32),
    ((1, 4, 1, 8), 2, "folded", "normal", torch.float32),
    ((1, 4, 6, 1), 2, "folded", "normal", torch.float32),
]
for *about, dtype in SHAPES:
    for layout in LAYOUTS:
        add(*about, layout, dtype)
for layout in ("slice", "transposed", "expanded"):
    add((2, 4, 2, 3), 2, "folded", "normal", layout, torch.float32)


def named(function: Callable[..., None], *arguments: Any) -> None:
    CHECKS[f"{function.__name__}: {arguments}"] = lambda: function(*arguments)


def ties_go_to_the_first_in_row_major_order(layout: str) -> None:
    x = laid_out(torch.ones(1, 4, 3, 3), layout).requires_grad_()
    dy = torch.zeros(1, 4, 3, 3)
    dy[..., 2, 2] = 1.0
    y, _ = subspace_attention(x, torch.ones(4), torch.ones(4), 1, backend="triton")
    y.backward(dy)
    found, x.grad = x.grad, None
    y, _ = subspace_attention(x, torch.ones(4), torch.ones(4), 1, backend="reference")
    y.backward(dy)
    torch.testing.assert_close(found, x.grad)


def a_nan_spreads_as_in_pytorch(layout: str, where: tuple[int, ...]) -> None:
    case = Case((2, 6, 4, 3), 3, "folded", "normal", layout, torch.float32, 0)
    case.x[where] = float("nan")
    found, exact = case.run("triton"), case.run("reference")
    assert exact["y"].isnan().sum() == 2 * 12  # its group, in its image
    for name in ("y", "dx", "dbias"):
        assert torch.equal(found[name].isnan(), exact[name].isnan()), name
    assert found["dscale"][where[1]].isnan()


def a_nan_among_the_parameters_spreads_too(broken: str) -> None:
    case = Case((1, 6, 2, 3), 3, "folded", "normal", "contiguous", torch.float32, 0)
    getattr(case, broken)[1] = float("nan")
    assert torch.equal(case.run("triton")["y"].isnan(), case.run("reference")["y"].isnan())


def training_keeps_the_input_and_tiny_maps(form: str) -> None:
    case = Case((1, 64, 3, 4), 2, form, "relu", "channels_last", torch.float32, 0)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        case.run("triton")
    logits, vectors = 4 * 2 * 12, 4 * (9 * 64 + 8 * 2)
    assert sum(kept.values()) <= case.x.nbytes + logits + vectors


def opcheck() -> None:
    x, scale, shift = torch.randn(1, 4, 2, 2, requires_grad=True), torch.ones(4), torch.ones(4)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(OPERATOR, (x, scale, shift, scale, None, [], 2, True, 1e-5, "triton"), test_utils=tests)


def the_interpreter_is_chosen_where_it_is_asked_for() -> None:
    x = torch.ones(1, 4, 2, 2)
    assert which_backend(x)[0] != "triton"
    assert which_backend(x, "triton") == ("triton", "asked for")
    reason = "the triton backend takes float32, float16 and bfloat16, not float64"
    assert which_backend(x.double(), "triton") == ("reference", reason)


for layout in LAYOUTS:
    named(ties_go_to_the_first_in_row_major_order, layout)
    named(a_nan_spreads_as_in_pytorch, layout, (1, 3, 2, 2))
for broken in ("scale", "shift", "weight", "bias"):
    named(a_nan_among_the_parameters_spreads_too, broken)
for form in ("folded", "batch statistics"):
    named(training_keeps_the_input_and_tiny_maps, form)
named(opcheck)
named(the_interpreter_is_chosen_where_it_is_asked_for)


def run_checks() -> dict[str, str]:
    """What went wrong in each check, or nothing."""
    found = {}
    for name, run in CHECKS.items():
        try:
            run()
            found[name] = ""
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def script(*, interpret: bool, argument: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": str(int(interpret))}
    done = subprocess.run(
        [sys.executable, __file__, argument], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@functools.cache
def interpreted() -> Any:
    return json.loads(script(interpret=True, argument="interpreted"))


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_interpreted(name: str) -> None:
    assert not interpreted()[name]


def compile_kernels(capability: int) -> dict[str, int]:
    """How often each kernel is compiled in calls of the backend."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_for
    from triton.runtime.jit import JITFunction

    from ulsam.layer.ops import triton_kernels  # noqa: F401  # as for a GPU: before TRITON_INTERPRET is set

    types = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
    compiled: dict[str, int] = {}

    class Launcher:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def launch(self, *tensors: Tensor | None, num_warps: int, enable_fp_fusion: bool, **constants: Any) -> None:
            given = dict(zip(self.kernel.arg_names, tensors, strict=False)) | constants
            pointers = {name: types[value.dtype] for name, value in given.items() if isinstance(value, Tensor)}
            signature = {name: pointers.get(name, "constexpr") for name in self.kernel.arg_names}
            source = ASTSource(self.kernel, signature, {k: v for k, v in given.items() if k not in pointers})
            options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}
            assert compile_for(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"]
            compiled[self.kernel.__name__] = compiled.get(self.kernel.__name__, 0) + 1

    os.environ["TRITON_INTERPRET"] = "1"  # tensors of the CPU will do: nothing runs
    JITFunction.__getitem__ = lambda kernel, grid: Launcher(kernel).launch  # type: ignore[method-assign]
    for dtype, layout, form, shape in (
        (torch.float32, "contiguous", "folded", (1, 12, 7, 7)),
        (torch.bfloat16, "channels_last", "batch statistics", (1, 128, 14, 14)),
        (torch.float16, "channels_last", "equations", (1, 20, 5, 3)),
    ):
        Case(shape, 2, form, "normal", layout, dtype, 0).run("triton")
    return compiled


@pytest.mark.slow
def test_compiles_for_a_gpu() -> None:
    """Not that it is right there: what the interpreter lets pass and the compiler does not."""
    compiled = json.loads(script(interpret=False, argument="compiled"))
    assert compiled == {"_forward": 4, "_backward": 4, "_moments": 2, "_add": 1}


# the choice


@pytest.fixture
def on_a_gpu() -> Tensor:
    with FakeTensorMode():
        return torch.empty(1, 8, 4, 4, device="cuda")


def test_a_gpu_has_it(on_a_gpu: Tensor) -> None:
    assert which_backend(on_a_gpu) == ("triton", "the fastest on this device")
    assert which_backend(on_a_gpu.half(), "triton") == ("triton", "asked for")
    assert which_backend(on_a_gpu, "reference") == ("reference", "asked for")
    assert which_backend(on_a_gpu, "cpu") == ("reference", "the cpu backend does not run on cuda")
    reason = "the triton backend takes float32, float16 and bfloat16, not float64"
    assert which_backend(on_a_gpu.double()) == ("reference", reason)


def test_a_cpu_has_not() -> None:
    expected = ("reference", "the triton backend does not run on cpu")
    assert which_backend(torch.ones(1, 8, 4, 4), "triton") == expected


def test_without_triton_the_reference_does_it(on_a_gpu: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "ulsam.layer.ops.triton_kernels", raising=False)
    monkeypatch.delattr(ulsam.layer.ops, "triton_kernels", raising=False)
    chosen, why = which_backend(on_a_gpu)
    assert chosen == "reference"
    assert why.startswith("triton cannot be imported: ")


@pytest.mark.slow
def test_triton_is_not_imported_before_it_is_needed() -> None:
    code = """
import sys, torch
from ulsam.layer.ops import subspace_attention, which_backend
x = torch.ones(1, 4, 2, 2)
subspace_attention(x, torch.ones(4), torch.ones(4), 2)
which_backend(x, "triton")
assert "triton" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "TRITON_INTERPRET": "0"})


if __name__ == "__main__":
    if sys.argv[1] == "interpreted":
        print(json.dumps(run_checks()))
    else:
        with tempfile.TemporaryDirectory() as cache:
            os.environ["TRITON_CACHE_DIR"] = str(Path(cache))
            print(json.dumps(compile_kernels(90)))
