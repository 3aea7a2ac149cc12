"""What a figure was taken with: the command, the versions and the machine."""

import os
import platform
import shlex
import sys
from pathlib import Path

import torch

from ulsam import __version__


def versions() -> dict[str, str]:
    """The versions and the machine that a figure was taken with."""
    return {"ulsam": __version__, **environment(), "machine": platform.machine(), "system": platform.system()}


def environment() -> dict[str, str]:
    """What bit-for-bit repeatability depends on."""
    import timm
    import torchvision

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # TorchVersion is a class, which a safe checkpoint may not hold
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "threads": str(torch.get_num_threads()),
        "processes": os.environ.get("WORLD_SIZE", "1"),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def processor() -> str:
    """The processor's name, as far as the system states it.

    >>> bool(processor())
    True
    """
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def command_line() -> str:
    """The command that is running, as it would be typed."""
    name = Path(sys.argv[0]).name
    return shlex.join(["ulsam" if name in ("ulsam", "__main__.py") else name, *sys.argv[1:]])
