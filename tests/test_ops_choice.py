"""The choice of the backend and of the instruction set."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.fx
from torch import Tensor

from operator_cases import ISAS, compiled
from ulsam.base.errors import UlsamError
from ulsam.cli import main
from ulsam.layer.ops import cpu, subspace_attention, which_backend


@pytest.fixture(params=ISAS, ids=lambda isa: cpu.ISA_NAMES[isa])
def isa(request: pytest.FixtureRequest) -> Iterator[int]:
    with cpu.instruction_set(request.param):
        yield int(request.param)


def test_a_library_that_cannot_be_loaded_is_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "kernels.so"
    assert cpu.load(path)[1].startswith(f"ulsam was installed without them: there is no file {path}; ")
    path.with_name("kernels.txt").write_text("no C compiler was found: install gcc or clang, or set CC\n")
    assert cpu.load(path)[1] == (
        "ulsam was installed without them: no C compiler was found: install gcc or clang, or set CC; "
        "pip install with --force-reinstall --no-deps --no-cache-dir then compiles them"
    )
    path.write_bytes(b"no library")
    library, reason = cpu.load(path)
    assert library is None
    assert reason.startswith(f"{path} cannot be loaded: ")


# the choice


@pytest.fixture
def plain() -> Iterator[Tensor]:
    yield torch.randn(1, 8, 4, 4)


@pytest.mark.parametrize(
    ("dtype", "wanted", "expected"),
    [
        (torch.float64, None, ("reference", "the cpu backend takes float32 and bfloat16, not float64")),
        (torch.float16, "cpu", ("reference", "the cpu backend takes float32 and bfloat16, not float16")),
        (torch.float32, "reference", ("reference", "asked for")),
    ],
)
def test_which_backend(dtype: torch.dtype, wanted: Any, expected: tuple[str, str], plain: Tensor) -> None:
    assert which_backend(plain.to(dtype), wanted) == expected


def test_other_devices_have_the_reference() -> None:
    assert which_backend(torch.ones(1, device="meta"))[0] == "reference"
    assert subspace_attention(torch.ones(1, 4, 2, 2, device="meta"), *[torch.ones(4, device="meta")] * 2, 2)[0].is_meta


def test_an_unknown_backend_is_named(plain: Tensor) -> None:
    with pytest.raises(UlsamError, match="there is no backend 'cuda'; valid: reference, cpu"):
        subspace_attention(plain, torch.ones(8), torch.ones(8), 2, backend="cuda")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["reference", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cpu", "", "opencl"))]
)
def test_the_environment_forces_a_backend(name: str) -> None:
    code = "import torch; from ulsam.layer.ops import which_backend; print(which_backend(torch.ones(1, 8, 4, 4))[0])"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "ULSAM_BACKEND": name}, capture_output=True, text=True
    )
    if name == "opencl":
        assert "UlsamError: ULSAM_BACKEND=opencl: there is no such backend; valid: reference, cpu" in done.stderr
    else:
        assert done.stdout.strip() == ("reference" if cpu.LIBRARY is None else name or "cpu")


WITHOUT = """
import sys, warnings, torch
from ulsam.layer.ops import cpu, operator, reference, subspace_attention, which_backend
from ulsam.layer.ulsam import ULSAM

x, layer = torch.randn(1, 8, 4, 4), ULSAM(8, 2).requires_grad_(False)
reason = "the C kernels are not there: " + cpu.WHY_NONE
assert which_backend(x) == ("reference", reason) and "there is no file" in reason, which_backend(x)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    subspace_attention(x, torch.ones(8), torch.ones(8), 2, backend="reference")
    subspace_attention(x.double(), torch.ones(8), torch.ones(8), 2)
    torch.export.export(layer, (x,), strict=True)
    assert not said, said
    if "compiled" in sys.argv:
        layer = torch.compile(layer, fullgraph=True, backend="eager")
    for _ in range(2):
        layer(x)  # this line
message = "ULSAM runs in plain PyTorch, several times slower than its C kernels: " + cpu.WHY_NONE
assert [str(warning.message) for warning in said] == [message], said
with open(__file__, encoding="utf-8") as script:
    assert "this line" in script.readlines()[said[0].lineno - 1] and said[0].filename == __file__, said
given = (x, torch.ones(8), None, torch.ones(8), None, [], 2, False, 0.0)
found = torch.ops.ulsam.subspace_attention.default(*given, "")[0]
torch.testing.assert_close(found, reference.subspace_attention(*given)[0])
"""


@pytest.fixture(scope="module")
def without_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as it is where nothing could be compiled, and what is tried there."""
    folder, package = tmp_path_factory.mktemp("without"), Path(cpu.__file__).parents[2]
    shutil.copytree(package, folder / "ulsam", ignore=shutil.ignore_patterns("kernels.*", "__pyc*", "weights"))
    (folder / "tried.py").write_text(WITHOUT)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("how", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def test_without_kernels_the_reference_does_it_and_one_warning_says_so(how: str, without_kernels: Path) -> None:
    done = run_in(without_kernels, str(without_kernels / "tried.py"), how)
    assert done.returncode == 0, done.stderr


def run_in(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Python with the package in this folder."""
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": ""}
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)


def with_isa(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ULSAM_ISA": name}
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "name", [pytest.param(cpu.ISA_NAMES[isa], marks=[pytest.mark.slow] * (isa != ISAS[0])) for isa in ISAS]
)
def test_the_environment_chooses_the_instruction_set(name: str) -> None:
    done = with_isa(name, "-c", "from ulsam.layer.ops import cpu; print(cpu.ISA_NAMES[cpu.chosen_isa()])")
    assert done.stdout == f"{name}\n", done.stderr


BEYOND = [name for name in cpu.ISA_NAMES[ISAS[-1] + 1 :] if cpu.LIBRARY]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SSE9", *(pytest.param(name, marks=pytest.mark.slow) for name in BEYOND)])
def test_an_instruction_set_that_is_not_there_is_refused(name: str) -> None:
    """The second kind runs where the processor lacks one."""
    done = with_isa(name, "-m", "ulsam", "doctor")
    known, here = cpu.ISA_NAMES[1:], [cpu.ISA_NAMES[isa] for isa in ISAS]
    why = f"this processor has none; valid: {', '.join(here)}"
    if name not in known:
        why = f"there is no such instruction set; valid: {', '.join(known)}"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"ulsam: error: ULSAM_ISA={name}: {why}\n")


def backend_in_float32(report: str) -> str:
    rows = [line.split() for line in report.splitlines() if line.startswith("cpu ")]
    return next(row[2] for row in rows if row[1] == "float32")


@compiled
def test_doctor_says_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    report = capsys.readouterr().out
    assert backend_in_float32(report) == "cpu"
    assert "no C kernels" not in report
    assert f"torch {torch.__version__}" in report


@pytest.mark.slow
def test_doctor_says_why_there_are_no_kernels(without_kernels: Path) -> None:
    report = run_in(without_kernels, "-m", "ulsam", "doctor").stdout
    assert backend_in_float32(report) == "reference"
    why = run_in(without_kernels, "-c", "from ulsam.layer.ops import cpu; print(cpu.WHY_NONE)").stdout
    assert why.startswith(f"ulsam was installed without them: there is no file {without_kernels}")
    assert f"\ncpu     no C kernels: {why}" in report  # to the end of the line
