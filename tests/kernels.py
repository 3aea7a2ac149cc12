"""Fails unless the C kernels are there and run on PyTorch's threads: for machines on which both are expected."""

import sys

from ulsam.layer.ops import cpu


def fault() -> str:
    """What is missing; empty if nothing is."""
    if cpu.LIBRARY is None:
        return f"there are no C kernels: {cpu.WHY_NONE}"
    if not cpu.THREADED:
        return f"the C kernels run on one thread: none of {', '.join(cpu.OPENMP)} is in what PyTorch has loaded"
    return ""


if __name__ == "__main__":  # and not where pytest imports it to look for examples
    sys.exit(fault() or 0)
