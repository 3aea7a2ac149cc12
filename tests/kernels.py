"""Fails unless the C kernels are there and run on PyTorch's threads: for machines on which both are expected."""

from ulsam.layer.ops import cpu

if cpu.LIBRARY is None:
    raise SystemExit(f"there are no C kernels: {cpu.WHY_NONE}")
if not cpu.THREADED:
    raise SystemExit(f"the C kernels run on one thread: none of {', '.join(cpu.OPENMP)} is in what PyTorch has loaded")
