#!/usr/bin/env bash
# Run the tests of the kernels as a 64-bit ARM processor would: built by a cross compiler, under QEMU's user emulation.
#
# Usage: scripts/arm_test.sh FOLDER [PYTEST ARGUMENTS]
#
# FOLDER is made, or used again: Debian's Python 3.11 for ARM and PyTorch (1 GB). It needs root for debootstrap, and on
# Debian: apt-get install debootstrap gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static. About half an hour.
# PyTorch 2.10 is the last one whose wheel for ARM comes without CUDA.
set -euo pipefail

[[ $# -ge 1 && $1 != -* ]] || { sed -n 's/^# \{0,1\}//; 2,8p' "$0"; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
work=$(cd "$1" && pwd)
shift
python=${PYTHON:-$root/.venv/bin/python}

if [[ ! -e $work/system/.unpacked ]]; then
    debootstrap --foreign --arch=arm64 --variant=minbase --include=python3,libexpat1,libffi8,libssl3 bookworm "$work/system"
    for package in "$work"/system/var/cache/apt/archives/*.deb; do dpkg -x "$package" "$work/system"; done
    touch "$work/system/.unpacked"
fi
if [[ ! -e $work/packages/.installed ]]; then
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$work/packages" \
        --python-version 3.11 --only-binary :all: --platform manylinux_2_28_aarch64 --platform manylinux2014_aarch64 \
        torch==2.10.0 torchvision==0.25.0 timm numpy pillow safetensors pyyaml huggingface_hub tqdm filelock \
        typing_extensions sympy mpmath networkx jinja2 MarkupSafe fsspec packaging \
        psutil pytest pluggy iniconfig pygments hypothesis sortedcontainers attrs
    touch "$work/packages/.installed"
fi

rm -rf "$work/ulsam"
mkdir "$work/ulsam"
cp -R "$root"/{setup.py,pyproject.toml,LICENSE,README.md,src,tests} "$work/ulsam"
cd "$work/ulsam"
rm -f src/ulsam/layer/ops/kernels.*
CC=aarch64-linux-gnu-gcc ULSAM_KERNELS=required "$python" setup.py -q build_ext --build-lib src
file=$(od -An -t x1 -j 18 -N 2 src/ulsam/layer/ops/kernels.so)
[[ $file = " b7 00" ]] || { echo "kernels.so is not for ARM" >&2; exit 1; }

# Tests that start other processes are left out: the emulator is not passed on to them. So is torch.compile.
qemu-aarch64-static -L "$work/system" -E PYTHONPATH=src:"$work/packages" -E PYTHONDONTWRITEBYTECODE=1 \
    "$work/system/usr/bin/python3.11" -m pytest -q -p no:cacheprovider -o addopts= tests/test_ops*.py \
    -k "not compile and not ddp and not environment and not forked and not threads_of and not several and not frees \
        and not without_kernels and not no_kernels and not instruction_set" "$@"
