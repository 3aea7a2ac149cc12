"""`ulsam doctor`: which backend computes the attention layers here, and why."""

import argparse
import platform
from importlib.metadata import version

from ulsam import __version__
from ulsam.base.extras import installed
from ulsam.base.text_table import text_table
from ulsam.cli.common import print_json

EXAMPLE = "ulsam doctor"


def configure(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(args: argparse.Namespace) -> None:
    """Print the versions, the processors, and the backend for each device and dtype."""
    import torch

    from ulsam.layer.ops import cpu, which_backend

    isa = cpu.chosen_isa()  # refuses a ULSAM_ISA that cannot be
    chosen = [
        (device, str(dtype).removeprefix("torch."), *which_backend(torch.empty(1, 8, 7, 7, device=device, dtype=dtype)))
        for device in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    ]
    machine = {
        "ulsam": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": version("timm"),
        "kernels": None if cpu.LIBRARY is None else cpu.LIBRARY._name,
        "threads": torch.get_num_threads(),
        "simplejpeg": version("simplejpeg") if installed("simplejpeg") else None,
        "matplotlib": version("matplotlib") if installed("matplotlib") else None,
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    if args.json:
        backends = [dict(zip(("device", "dtype", "backend", "why"), one, strict=True)) for one in chosen]
        print_json({**machine, "backends": backends})
        return
    print(f"ulsam {__version__}, Python {machine['python']}, torch {machine['torch']}, timm {machine['timm']}")
    if cpu.LIBRARY is None:
        print(f"cpu     no C kernels: {cpu.WHY_NONE}")
    else:
        used, best = cpu.ISA_NAMES[isa or cpu.LIBRARY.ulsam_isa()], cpu.ISA_NAMES[cpu.LIBRARY.ulsam_isa()]
        names = used if used == best else f"{used}, which ULSAM_ISA asks for: the processor has {best}"
        print(f"cpu     {machine['threads']} threads, C kernels for {names} ({machine['kernels']})")
        if not cpu.THREADED:
            print("cpu     the kernels run on one thread: PyTorch has loaded no OpenMP library that they know")
    if machine["simplejpeg"]:
        print(f"jpeg    simplejpeg {machine['simplejpeg']}")
    else:
        print("jpeg    Pillow; simplejpeg reads the same values faster: pip install 'ulsam[train]'")
    drawn = f"matplotlib {machine['matplotlib']}" if machine["matplotlib"] else "none: pip install 'ulsam[plots]'"
    print(f"plots   {drawn}\ncuda    {machine['cuda'] or 'none'}")
    print("\n".join(text_table([("device", "dtype", "backend", "why"), *chosen], right=())))
