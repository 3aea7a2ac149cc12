"""What this machine can do for a training run."""

import ctypes
import dataclasses
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ulsam.base.distributed import World, start
from ulsam.base.errors import UlsamError
from ulsam.base.threads import cpu_threads
from ulsam.training import parts
from ulsam.training.config import TrainConfig


def adapt_to_device(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The settings, if this machine can keep to them, with the number of threads decided: it touches the last bits.

    Raises:
        UlsamError: fp16 on a device without it, or compilation without what it needs.
    """
    if config.amp == "fp16" and device.type != "cuda":
        raise UlsamError(f"`amp=fp16` needs a CUDA GPU; on {device.type} use bf16 or none")
    if config.compile == "inductor" and (lack := why_not_compiled()):
        raise UlsamError(f"`compile=inductor`: {lack}; install it, or use `compile=none`")
    # all cores: reading an image takes a small part of what a step with it takes, so readers need no core of their own
    return dataclasses.replace(config, threads=config.threads or torch.get_num_threads())


@contextmanager
def session(config: TrainConfig) -> Iterator[tuple[TrainConfig, World]]:
    """Within it the settings as this machine keeps to them, and the processes.

    PyTorch's number of threads is that of the settings; it and all random generators are afterwards as before.
    """
    with start(config.device) as world:
        config = adapt_to_device(config, world.device)
        with cpu_threads(config.threads), parts.same_generators(world.device):
            yield config, world


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, for good: training on a CPU is up to half as fast again.

    There is no way back, so only programs whose process is all theirs call it: the commands that train do.

    A training step takes and frees the same large tensors again and again. By default glibc hands each of them back to
    the kernel, which then gives out empty pages anew. Peak memory stays about the same.

    Returns:
        Whether it could be done: the C library is glibc.

    Source: mallopt(3), M_MMAP_MAX and M_TRIM_THRESHOLD.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # Windows, macOS, musl
        return False
    trim_threshold, mmap_max = -1, -4
    return bool(mallopt(trim_threshold, -1) and mallopt(mmap_max, 0))  # never trim; no tensor is a mapping of its own


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16, rather than imitating it.

    On a CPU oneDNN computes, so its limit ``ONEDNN_MAX_CPU_ISA`` counts.

    >>> has_bf16(torch.device("meta"))
    False
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    in_hardware = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return in_hardware and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def why_not_compiled() -> str | None:
    """What torch.compile lacks here; None if nothing."""
    compiler = os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))
    if not shutil.which(compiler):
        return f"there is no C++ compiler {compiler!r} (CXX names another)"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return None if os.path.exists(header) else f"there is no {header}, which python3-dev or the like brings"
