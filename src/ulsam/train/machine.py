"""What this machine can do for a training run."""

import dataclasses
import os
import shutil
import sys

import torch

from ulsam.errors import UlsamError
from ulsam.train.config import TrainConfig


def fitted(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The settings, if this machine can keep to them, with the number of threads decided: it touches the last bits.

    Raises:
        UlsamError: fp16 on a device without it, or compilation without a compiler.
    """
    if config.amp == "fp16" and device.type != "cuda":
        raise UlsamError(f"--amp fp16 needs a CUDA GPU; on {device.type} use bf16 or none")
    if config.compile == "inductor" and (lack := why_not_compiled()):
        raise UlsamError(f"--compile inductor: {lack}; install one, name it in CXX, or use --compile none")
    # all cores: reading a picture takes a small part of what a step with it takes, so readers need no core of their own
    return dataclasses.replace(config, threads=config.threads or torch.get_num_threads())


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16, rather than imitating it.

    >>> has_bf16(torch.device("meta"))
    False
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def why_not_compiled() -> str | None:
    """What torch.compile lacks here; None if nothing."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    return None if shutil.which(compiler) else f"there is no C++ compiler {compiler!r}"
