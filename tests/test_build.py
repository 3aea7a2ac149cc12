"""setup.py: what is installed where the kernels cannot be compiled, and that any compiler's are right."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="there is no setuptools")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """What a build needs of the project."""
    to = tmp_path / "source"
    kernels = ROOT / "src/ulsam/layer/ops"
    for path in (
        ROOT / "setup.py",
        ROOT / "pyproject.toml",
        ROOT / "LICENSE",
        ROOT / "README.md",
        *kernels.glob("*.[ch]"),
    ):
        copy = to / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    for path in (to / "src/ulsam/__init__.py", to / "src/ulsam/layer/ops/__init__.py"):
        path.write_text('__version__ = "1.0"\n')
    return to


def build(source: Path, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {
        name: value for name, value in os.environ.items() if name not in ("CC", "CFLAGS", "LDFLAGS", "ULSAM_KERNELS")
    }
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *command.split()],
        cwd=source, env={**kept, **environment}, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"PATH": "/nowhere"}, "no C compiler was found: install gcc or clang, or set CC"),
        ({"CC": "/nowhere/cc -m64"}, "/nowhere/cc cannot be started: No such file or directory"),
        (
            {"CC": f"{sys.executable} -c 'raise SystemExit(\"error: no omp.h\")'"},
            f"{sys.executable} failed: error: no omp.h",
        ),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="names compilers of other systems")
def test_without_a_compiler_the_wheel_is_of_no_platform_and_keeps_the_reason(
    environment: dict[str, str], reason: str, source: Path
) -> None:
    done = build(source, "bdist_wheel", **environment)
    assert done.returncode == 0, done.stderr
    (wheel,) = (source / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as files:
        assert files.read("ulsam/layer/ops/kernels.txt").decode() == reason + "\n"

    required = build(source, "bdist_wheel", ULSAM_KERNELS="required", **environment)
    assert required.returncode != 0
    assert f"the C kernels are required, but {reason}" in required.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="names compilers of other systems")
def test_each_compiler_is_tried_and_an_older_library_is_not_kept(source: Path, tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()

    def put(name: str, *lines: str) -> None:
        (programs / name).write_text("\n".join((f"#!{sys.executable}", "import pathlib, sys", *lines)))
        (programs / name).chmod(0o755)

    put("cc", "sys.exit('error: no headers')")
    put("clang", "pathlib.Path(sys.argv[-1]).write_text('by clang')")
    library, note = (source / "src/ulsam/layer/ops" / name for name in ("kernels.so", "kernels.txt"))
    assert build(source, "build_ext --inplace", PATH=str(programs)).returncode == 0
    assert library.read_text() == "by clang" and not note.exists()

    put("clang", "sys.exit('error: no linker')")
    assert build(source, "build_ext --inplace", PATH=str(programs)).returncode == 0
    assert note.read_text() == "cc failed: error: no headers; clang failed: error: no linker\n"
    assert not library.exists()


def test_an_unknown_choice_of_the_kernels_is_refused(source: Path) -> None:
    done = build(source, "bdist_wheel", ULSAM_KERNELS="none")
    assert done.returncode != 0
    assert "ULSAM_KERNELS=none: there is no such choice; valid: required, or nothing" in done.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_installs_again_once_there_is_a_compiler(source: Path, tmp_path: Path) -> None:
    for name in ("Makefile", "constraints.txt"):
        shutil.copy(ROOT / name, source)
    (source / ".venv").mkdir()
    (source / ".venv/.installed").touch()
    library = source / "src/ulsam/layer/ops/kernels.so"
    make, shell = str(shutil.which("make")), str(shutil.which("sh"))

    def is_due(path: str) -> bool:
        words = [make, f"SHELL={shell}", "--question", ".venv/.installed"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "CC"))}
        done = subprocess.run(words, cwd=source, env={**environment, "PATH": path}, capture_output=True, text=True)
        assert done.returncode in (0, 1), done.stderr
        return done.returncode == 1

    (tmp_path / "gcc").touch(mode=0o755)
    assert not is_due("/nowhere")  # no kernels, no compiler
    assert is_due(str(tmp_path))
    library.touch()
    assert not is_due(str(tmp_path))


CHECK = """
import contextlib, sys, torch
from ulsam.layer.ops import subspace_attention
from ulsam.layer.ops import cpu
assert cpu.__file__.startswith(sys.argv[1])
assert cpu.LIBRARY is not None, cpu.WHY_NONE
isas = contextlib.ExitStack()
for isa in range(1, cpu.LIBRARY.ulsam_isa() + 1):
    isas.enter_context(cpu.instruction_set(isa))
    for layout in (torch.contiguous_format, torch.channels_last):
        for norms in (False, True):
            found = []
            for backend in ("cpu", "reference"):
                torch.manual_seed(1)
                x = torch.randn(3, 20, 9, 7).contiguous(memory_format=layout).requires_grad_()
                scale, weight, shift = (torch.rand(20).requires_grad_() for _ in range(3))
                given = [torch.rand(n).requires_grad_() for n in (20, 20, 5, 5)] if norms else []
                options = {"norms": given, "relu": True} if norms else {"shift": shift, "relu": True}
                y, _ = subspace_attention(x, scale, weight, 5, backend=backend, **options)
                y.square().sum().backward()
                found.append([y, x.grad, weight.grad, *(value.grad for value in given)])
            for value, exact in zip(*found):
                torch.testing.assert_close(value, exact, rtol=1e-4, atol=1e-4)
    print(cpu.ISA_NAMES[isa])
"""


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_each_compilers_kernels_equal_the_reference_in_a_wheel_for_every_python(
    compiler: str, source: Path, tmp_path: Path
) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler}")
    done = build(source, "bdist_wheel", CC=compiler, CFLAGS="-Wall -Wextra -Werror", ULSAM_KERNELS="required")
    assert done.returncode == 0, done.stderr
    (wheel,) = (source / "dist").glob("*.whl")
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("any.whl")
    with zipfile.ZipFile(wheel) as files:
        files.extract("ulsam/layer/ops/kernels.so", tmp_path)
    others = shutil.ignore_patterns("kernels.*", "__pycache__", "weights")
    shutil.copytree(ROOT / "src" / "ulsam", tmp_path / "ulsam", ignore=others, dirs_exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    words = [sys.executable, "-c", CHECK, str(tmp_path)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "base"
