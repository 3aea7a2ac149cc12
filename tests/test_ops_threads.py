"""The kernels on several threads, in forked processes, and on PyTorch's OpenMP."""

import ctypes.util
import os
import subprocess
import sys
import threading

import psutil
import pytest
import torch
import torch.fx
from torch import Tensor

from operator_cases import FORMS, Case, compiled
from ulsam.layer.ulsam import ULSAM


def on_threads(case: Case) -> list[dict[str, Tensor]]:
    """The case's results on one thread, two and three."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(case.run("cpu"))
    finally:
        torch.set_num_threads(before)
    return results


@compiled
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [40, 96, 320])
def test_threads_may_share_an_image(channels: int, layout: str) -> None:
    found = on_threads(Case((1, channels, 28, 28), 8, "folded", "relu", layout, torch.float32, 0))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-4)


@compiled
@pytest.mark.parametrize("form", FORMS)
def test_threads_change_nothing_but_the_order_of_sums(form: str) -> None:
    results = on_threads(Case((1, 96, 14, 14), 4, form, "normal", "channels_last", torch.float32, 0))
    for found in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-4)


@compiled
def test_several_python_threads_at_once() -> None:
    cases = [Case((2, 8 * n, 9, 9), 4, "folded", "normal", "contiguous", torch.float32, n) for n in range(1, 9)]
    alone = [case.run("cpu") for case in cases]
    found: list[list[dict[str, Tensor]]] = [[] for _ in cases]

    def work(n: int) -> None:
        for _ in range(20):
            found[n].append(cases[n].run("cpu"))

    threads = [threading.Thread(target=work, args=[n]) for n in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n, expected in enumerate(alone):
        assert len(found[n]) == 20
        assert all(torch.equal(run[name], expected[name]) for run in found[n] for name in expected)


@compiled
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_works_where_its_parent_has_threads() -> None:
    code = """
import os, torch
from ulsam.layer.ops import subspace_attention
torch.set_num_threads(2)
x = torch.randn(4, 32, 14, 14)
y = subspace_attention(x, torch.ones(32), torch.ones(32), 4)[0]
child = os.fork()
if child == 0:
    same = torch.equal(subspace_attention(x, torch.ones(32), torch.ones(32), 4)[0], y)
    os._exit(0 if same else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env={**os.environ, "OMP_NUM_THREADS": "2"})


@compiled
def test_a_thread_that_ends_frees_its_memory() -> None:
    layer, x = ULSAM(64, 16).eval(), torch.randn(1, 64, 112, 112).contiguous(memory_format=torch.channels_last)

    def work() -> None:
        with torch.no_grad():
            layer(x)

    def megabytes() -> float:
        for _ in range(20):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        return float(psutil.Process().memory_info().rss / 2**20)

    first, second, third = (megabytes() for _ in range(3))
    assert min(second - first, third - second) < 20  # 4 MB a thread would make 80; the allocator may grow once


THREADS = """
import ctypes, os, struct, sys, torch
from ulsam.layer.ops import subspace_attention
from ulsam.layer.ops import cpu

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(1)
x = torch.randn(6, 32, 28, 28)
operands = torch.ones(32), torch.ones(32), 4
expected = subspace_attention(x, *operands, backend="reference")[0]
torch.set_num_threads(3)
found = []
for only in sys.argv[1:]:
    kept = dict(zip(cpu.OPENMP, cpu.openmp()))
    if only == "llvm":
        kept["GOMP_parallel"] = 0
    elif only == "none":
        kept = dict.fromkeys(kept, 0)
    cpu.LIBRARY.ulsam_use_openmp(struct.pack("6q", *kept.values()))
    before = threads()
    found.append(subspace_attention(x, *operands)[0])
    print(only, threads() - before)
before = threads()
torch.relu(torch.randn(3_000_000))  # on PyTorch's own threads
print("pytorch", threads() - before)
for y in found:
    torch.testing.assert_close(y, expected)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.parametrize(
    "preloaded", [None, *(pytest.param(name, marks=pytest.mark.slow) for name in ("omp", "iomp5"))]
)
@compiled
def test_the_kernels_use_the_threads_of_pytorchs_openmp(preloaded: str | None) -> None:
    environment = dict(os.environ, OMP_NUM_THREADS="3")
    kinds = ["none", "gnu"]
    if preloaded:  # its functions come before those of the library that PyTorch was built with
        library = ctypes.util.find_library(preloaded)
        if library is None:
            pytest.skip(f"there is no lib{preloaded}")
        environment["LD_PRELOAD"] = library
        kinds = ["none", "llvm", "gnu"]
    done = subprocess.run(
        [sys.executable, "-c", THREADS, *kinds], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    started = dict(line.split() for line in done.stdout.splitlines())
    assert started.pop("none") == "0"
    assert int(started.pop(kinds[1])) >= 2  # LLVM's starts one more, a monitor
    assert set(started.values()) == {"0"}  # the same threads are used again, by PyTorch too
