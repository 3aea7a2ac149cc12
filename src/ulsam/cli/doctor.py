"""`ulsam doctor`: which backend computes the attention layers here, and why."""

import argparse
import platform
from importlib.metadata import version

import torch

from ulsam import __version__
from ulsam.base.extras import installed
from ulsam.base.text_table import text_table
from ulsam.layer.ops import cpu, which_backend


def configure(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(args: argparse.Namespace) -> None:
    """Print the versions, the processors, and the backend for each device and dtype."""
    print(f"ulsam {__version__}, Python {platform.python_version()}, torch {torch.__version__}, timm {version('timm')}")
    if cpu.LIBRARY is None:
        print(f"cpu     no C kernels: {cpu.WHY_NONE}")
    else:
        used, best = cpu.ISA_NAMES[cpu.chosen_isa() or cpu.LIBRARY.ulsam_isa()], cpu.ISA_NAMES[cpu.LIBRARY.ulsam_isa()]
        names = used if used == best else f"{used}, which ULSAM_ISA asks for: the processor has {best}"
        print(f"cpu     {torch.get_num_threads()} threads, C kernels for {names} ({cpu.LIBRARY._name})")
        if not cpu.THREADED:
            print("cpu     the kernels run on one thread: PyTorch has loaded no OpenMP library that they know")
    if installed("simplejpeg"):
        print(f"jpeg    simplejpeg {version('simplejpeg')}")
    else:
        print("jpeg    Pillow; simplejpeg reads the same values faster: pip install 'ulsam[train]'")
    drawn = f"matplotlib {version('matplotlib')}" if installed("matplotlib") else "none: pip install 'ulsam[plots]'"
    print(f"plots   {drawn}")
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        print(f"cuda    {torch.cuda.get_device_name()}")
    else:
        print("cuda    none")
    cells = [["device", "dtype", "backend", "why"]]
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            chosen, why = which_backend(torch.empty(1, 8, 7, 7, device=device, dtype=dtype))
            cells.append([device, str(dtype).removeprefix("torch."), chosen, why])
    print("\n".join(text_table(cells, right=())))
