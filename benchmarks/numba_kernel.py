"""The same forward pass, channels_last, in C and in numba: time, first call, size. numba is installed for this alone.

pip install numba && python benchmarks/numba_kernel.py
"""

import json
import platform
from pathlib import Path

import numba
import numpy as np
import torch
from turns import medians, seconds_of

from ulsam.layer.ops import subspace_attention


@numba.njit(fastmath={"contract", "reassoc", "arcp"}, nogil=True, boundscheck=False)
def forward(x: np.ndarray, scale: np.ndarray, weight: np.ndarray, groups: int, y: np.ndarray) -> None:
    """x, y [B, H, W, C]; one thread, as the C kernel is run here."""
    batch, height, width, channels = x.shape
    size = channels // groups
    rows = np.empty((height + 2, width, channels), np.float32)
    rows[0], rows[height + 1] = -np.inf, -np.inf
    maps = np.empty((height, width, groups), np.float32)
    for b in range(batch):
        for i in range(height):
            for j in range(width):
                left, right = max(j - 1, 0), min(j + 1, width - 1)
                for c in range(channels):
                    h = max(scale[c] * x[b, i, left, c], scale[c] * x[b, i, j, c])
                    rows[i + 1, j, c] = max(h, scale[c] * x[b, i, right, c])
        for i in range(height):
            for j in range(width):
                for n in range(groups):
                    total = np.float32(0)
                    for c in range(n * size, (n + 1) * size):
                        total += weight[c] * max(max(rows[i, j, c], rows[i + 1, j, c]), rows[i + 2, j, c])
                    maps[i, j, n] = total
        for n in range(groups):
            top = maps[:, :, n].max()
            maps[:, :, n] = np.exp(maps[:, :, n] - top)
            maps[:, :, n] /= maps[:, :, n].sum()
        for i in range(height):
            for j in range(width):
                for n in range(groups):
                    factor = 1 + maps[i, j, n]
                    for c in range(n * size, (n + 1) * size):
                        y[b, i, j, c] = factor * x[b, i, j, c]


def main() -> None:
    torch.set_num_threads(1)
    cases = []
    first_call = 0.0
    for channels, size in [(96, 14), (320, 7), (512, 14), (1024, 7)]:
        for groups in (4, 16):
            x = torch.randn(8, channels, size, size).contiguous(memory_format=torch.channels_last)
            scale, weight = torch.randn(channels), torch.randn(channels) / channels**0.5
            y = torch.empty_like(x)
            arrays = [
                x.permute(0, 2, 3, 1).numpy(),
                scale.numpy(),
                weight.numpy(),
                groups,
                y.permute(0, 2, 3, 1).numpy(),
            ]
            taken = seconds_of(lambda arrays=arrays: forward(*arrays))
            first_call = first_call or taken
            expected = subspace_attention(x, scale, weight, groups)[0]
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)

            def ours(
                x: torch.Tensor = x, scale: torch.Tensor = scale, weight: torch.Tensor = weight, groups: int = groups
            ) -> None:
                subspace_attention(x, scale, weight, groups)

            def with_numba(arrays: list = arrays) -> None:
                forward(*arrays)

            found = medians({"c": ours, "numba": with_numba}, 1.0)
            cases.append(
                {"shape": list(x.shape), "groups": groups, **found, "numba_over_c": found["numba"] / found["c"]}
            )
            print(f"{channels} x {size}, g={groups}: numba / C {found['numba'] / found['c']:.1f}")
    result = {
        "what": "seconds a call, one thread, 8 images, float32, channels_last",
        "command": "python benchmarks/numba_kernel.py",
        "first_numba_call_seconds": first_call,
        "versions": {"numba": numba.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "cases": cases,
    }
    print(f"numba's first call took {first_call:.1f} s")
    Path("results/numba.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
