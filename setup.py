"""Builds the C kernels, which ctypes loads: one library, and so one wheel, serves every Python of a platform.

``CC``, ``CFLAGS`` and ``LDFLAGS`` are used as ever; on macOS ``ARCHFLAGS`` too. Without ``CC`` each compiler that is
found is tried. Any gcc or clang will do; on Windows clang, since gcc misaligns wide vectors there. Without a compiler
ulsam installs all the same and computes in plain PyTorch; the reason is kept for `ulsam doctor`. With
``ULSAM_KERNELS=required``, as wheels for others are built, the build fails instead.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

WINDOWS = sys.platform == "win32"
OPS = "src/ulsam/layer/ops"
FLAGS = ["-std=gnu11", "-O3", "-shared", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]


class BuildKernels(build_ext):
    """Call the compiler directly: the library has nothing to do with Python's own flags and names."""

    def run(self) -> None:
        self.in_place = bool(self.inplace or self.editable_mode)  # setuptools copies what is built to the sources then
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + (".dll" if WINDOWS else ".so")

    def build_extension(self, ext: Extension) -> None:
        wanted = os.environ.get("ULSAM_KERNELS", "")
        if wanted not in ("", "required"):
            raise SystemExit(f"ULSAM_KERNELS={wanted}: there is no such choice; valid: required, or nothing")
        library = Path(self.get_ext_fullpath(ext.name))
        folder = Path(OPS) if self.in_place else library.parent
        note = folder / "kernels.txt"
        for old in (library, folder / library.name, note):  # of an earlier build
            old.unlink(missing_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        reason = compile_kernels(ext.sources, library)
        if reason and wanted:
            raise SystemExit(f"the C kernels are required, but {reason}")
        if reason:
            self.warn(f"no C kernels: {reason}")
            note.write_text(reason + "\n", encoding="utf-8")


class BuildWheel(bdist_wheel):
    """No Python's ABI is used."""

    def get_tag(self) -> tuple[str, str, str]:
        build = self.get_finalized_command("build_ext")
        built = all(Path(build.get_ext_fullpath(ext.name)).exists() for ext in self.distribution.ext_modules)
        return "py3", "none", super().get_tag()[2] if built else "any"


def compile_kernels(sources: list[str], library: Path) -> str:
    """Make the library with the first compiler that can, or say in one line why none could."""
    wanted = shlex.split(os.environ.get("CC", ""))
    names = ["clang"] if WINDOWS else ["cc", "gcc", "clang"]
    compilers = [wanted] if wanted else [[name] for name in names if shutil.which(name)]
    reasons = []
    for compiler in compilers:
        reason = compile_with(compiler, sources, library)
        if not reason:
            return ""
        reasons.append(reason)
    missing = f"no C compiler was found: install {'clang' if WINDOWS else 'gcc or clang'}, or set CC"
    return "; ".join(reasons) or missing


def compile_with(compiler: list[str], sources: list[str], library: Path) -> str:
    """Make the library with one compiler, or say in one line why it could not be made."""
    own = [flag for name in ("CFLAGS", "ARCHFLAGS", "LDFLAGS") for flag in shlex.split(os.environ.get(name, ""))]
    position = [] if WINDOWS else ["-fPIC"]
    command = [*compiler, *FLAGS, *position, *own, *sources, "-o", str(library)]
    print(shlex.join(command), flush=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{command[0]} cannot be started: {error.strerror}"
    print(done.stdout, done.stderr, sep="", file=sys.stderr, flush=True)
    if done.returncode == 0:
        return ""
    library.unlink(missing_ok=True)
    lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no message"]
    return f"{command[0]} failed: {lines[0].strip()}"


setup(
    ext_modules=[
        Extension(
            "ulsam.layer.ops.kernels",
            sources=[f"{OPS}/{name}.c" for name in ("cpu", "cpu_training", "cpu_base", "cpu_avx2", "cpu_avx512")],
            depends=[f"{OPS}/{name}.h" for name in ("cpu", "cpu_kernels", "cpu_lanes", "cpu_last", "cpu_planes")],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": BuildWheel},
)
