#!/usr/bin/env bash
# Everything that needs a GPU, in at most 9 minutes on one of NVIDIA's: whether the kernels are right, their bandwidth,
# models, training steps, and training from scratch. It needs torch 2.11 or newer with CUDA, timm, and no network.
#
#     benchmarks/gpu.sh [IMAGES]      # results/gpu.json
#
# IMAGES has train/ and test/ of class folders; without it nothing is trained from scratch. PYTHON and TIMM_TRAIN, the
# path of timm's train.py, may be set; with the second its throughput is measured too.
set -eu
cd "$(dirname "$0")/.."
export PYTHONPATH=src:tests${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-python3}" benchmarks/gpu.py --minutes 8.5 ${TIMM_TRAIN:+--timm-train "$TIMM_TRAIN"} "$@"
