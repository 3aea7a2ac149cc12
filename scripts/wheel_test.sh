#!/usr/bin/env bash
# Build the wheel, install it where the source tree is out of reach, and try it.
#
# Usage: scripts/wheel_test.sh [--reuse-deps]
#
#   (default)       a clean virtual environment: every dependency is installed at its version in constraints.txt
#                   (minutes, and several GB of disk while it runs)
#   --reuse-deps    the wheel is installed alone, and the dependencies are those of $PYTHON's own environment, which a
#                   .pth file in the new one points at (seconds)
#
# PYTHON=path names the interpreter to build with; the default is .venv/bin/python where `make` has made it, or python3.
set -euo pipefail

reuse=no
case "${1:-}" in
    "") ;;
    --reuse-deps) reuse=yes ;;
    *) sed -n 's/^# \{0,1\}//; 2,12p' "$0"; exit 2 ;;
esac

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
python=$(command -v "$python" || command -v python3)
[[ $python = /* ]] || python=$PWD/$python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH

say() { printf '== %s\n' "$*"; }

say "build"
mkdir "$work/source" "$work/elsewhere"
cp -R "$root"/{pyproject.toml,LICENSE,src} "$work/source"   # a copy: no stale build folder, none left behind
[[ ! -e $root/README.md ]] || cp "$root/README.md" "$work/source"
rm -rf "$work"/source/src/*.egg-info
"$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$work/dist" "$work/source"
wheel=$(echo "$work"/dist/ulsam-*.whl)
names=$("$python" -m zipfile --list "$wheel")
for wanted in ulsam/py.typed ulsam/trained/mobilenetv2_100.grocery81_slim75.{safetensors,md} licenses/LICENSE entry_points.txt; do
    grep -q "$wanted" <<<"$names" || { echo "the wheel lacks $wanted" >&2; exit 1; }
done

say "install (reuse dependencies: $reuse)"
"$python" -m venv "$work/venv"
bin=$work/venv/bin
if [[ $reuse = yes ]]; then
    "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
        >"$("$bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/reused.pth"
    "$bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$wheel"
else
    "$bin/python" -m pip install --quiet --disable-pip-version-check -c "$root/constraints.txt" "$wheel"
    "$bin/python" -m pip check
fi
cd "$work/elsewhere"

say "a light import"
"$bin/python" - "$work/venv" <<'PY'
import sys

import ulsam

assert ulsam.__file__.startswith(sys.argv[1]), f"imported from {ulsam.__file__}"
heavy = {"torch", "torchvision", "timm", "matplotlib", "onnx", "numpy", "PIL"} & set(sys.modules)
assert not heavy, f"`import ulsam` also imported {sorted(heavy)}"
PY

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

say "a run from pictures to a model file"
"$bin/python" - <<'PY'
from pathlib import Path

from PIL import Image

for name, colour in {"red": (200, 0, 0), "blue": (0, 0, 200)}.items():
    folder = Path("pictures", name)
    folder.mkdir(parents=True)
    for number in range(8):
        Image.new("RGB", (40, 40), tuple(min(255, value + number) for value in colour)).save(folder / f"{number}.jpg")
PY
"$bin/ulsam" train pictures --replace 14,17 --size 32 --epochs 1 --batch-size 4 --workers 0 --out run >/dev/null
info=$("$bin/ulsam" info run/model.safetensors)
grep -q "replace 14,17" <<<"$info"

say "passed: $(basename "$wheel")"
