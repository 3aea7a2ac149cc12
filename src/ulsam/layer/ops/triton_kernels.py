"""The GPU backend, in Triton. It has only run in Triton's interpreter so far (TRITON_INTERPRET=1), not on a GPU.

A program does all stages of one group of one image, which need nothing of any other group: what the next stage reads
again should still be in the cache, no sum needs an atomic, and results are the same from run to run. Neighboring
programs have neighboring groups, which in channels_last share cache lines. All arithmetic is in float32.

To shift values between lanes is dear in Triton. So where neighbors matter, a tile is one row of the map by some
channels: its neighbors in the row are loaded again, from the L1 cache, and what is needed of the rows before stays in
registers. The 3x3 maximum is that of 3 rows' maxima of 3 pixels. Its gradient goes to the first maximum in row-major
order: to the first row that holds it, and there, by one gather each way, to the first pixel. One NaN makes the softmax
of its whole map NaN.

Passes over tensors of x's size, in the cache or not: forward two reads and a write (batch statistics: three reads and
a write), backward four reads and a write (batch statistics: six reads and two writes).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ulsam.layer.ops import stages

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _at(pixel, channel, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, LAST: tl.constexpr):
    """Where these pixels [P] of these channels [N] are in an image, [P, N]."""
    if LAST:
        return pixel[:, None] * C + channel[None, :]
    else:
        return pixel[:, None] + channel[None, :] * (H * W)


@triton.jit
def _max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _inside(i, j, H: tl.constexpr, W: tl.constexpr):
    """Which of row i's pixels j are in the map."""
    pixel = i * W + j
    return (j >= 0) & (j < W) & (pixel >= 0) & (pixel < H * W)


@triton.jit
def _scaled(x, scale, i, j, channel, known, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, LAST: tl.constexpr):
    """scale * x of row i's pixels j, [columns, channels]; -inf outside the map."""
    inside = _inside(i, j, H, W)[:, None]
    value = tl.load(x + _at(i * W + j, channel, C, H, W, LAST), mask=inside & known[None, :], other=0.0)
    return tl.where(inside, value.to(tl.float32) * scale[None, :], float("-inf"))


@triton.jit
def _row_maxima(x, scale, i, j, channel, known, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, LAST: tl.constexpr):
    """The maxima of the 3 pixels around those of row i."""
    left = _scaled(x, scale, i, j - 1, channel, known, C, H, W, LAST)
    middle = _scaled(x, scale, i, j, channel, known, C, H, W, LAST)
    return _max(_max(left, middle), _scaled(x, scale, i, j + 1, channel, known, C, H, W, LAST))


@triton.jit
def _activated(logits, pixel, PIXELS: tl.constexpr, RELU: tl.constexpr):
    """The logits of these pixels, after the ReLU; -inf outside the map."""
    value = tl.load(logits + pixel, mask=pixel < PIXELS, other=float("-inf"))
    if RELU:
        value = tl.where(pixel < PIXELS, _max(value, 0.0), value)
    return value


@triton.jit
def _softmax(logits, PIXELS: tl.constexpr, RELU: tl.constexpr, P: tl.constexpr):
    """The map's maximum, and the inverse of its sum of exponentials."""
    top = float("-inf")
    total = 0.0
    for start in range(0, PIXELS, P):
        value = _activated(logits, start + tl.arange(0, P), PIXELS, RELU)
        before = top
        top = tl.maximum(before, tl.max(value, 0))
        total = total * tl.exp(before - top) + tl.sum(tl.exp(value - top), 0)
    return top, 1.0 / total


@triton.jit
def _forward(
    x, y, logits, scale, shift, weight, bias,
    G: tl.constexpr, SIZE: tl.constexpr, H: tl.constexpr, W: tl.constexpr, LAST: tl.constexpr, RELU: tl.constexpr,
    LOGITS: tl.constexpr, MULTIPLY: tl.constexpr,
    COLUMNS: tl.constexpr, ROW_CHANNELS: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = G * SIZE
    PIXELS: tl.constexpr = H * W
    group = tl.program_id(0) % G
    image = (tl.program_id(0) // G).to(tl.int64) * (C * PIXELS)
    x += image
    logits += tl.program_id(0).to(tl.int64) * PIXELS
    first = group * SIZE

    if LOGITS:
        j = tl.arange(0, COLUMNS)
        outside = tl.full((COLUMNS, ROW_CHANNELS), float("-inf"), tl.float32)
        for start in range(0, SIZE, ROW_CHANNELS):
            k = start + tl.arange(0, ROW_CHANNELS)
            known = k < SIZE
            channel = first + k
            factor = tl.load(scale + channel, mask=known, other=0.0)
            part = tl.load(weight + channel, mask=known, other=0.0)
            added = tl.load(shift + channel, mask=known, other=0.0) if RELU else part
            above = outside
            here = outside
            for row in range(-1, H):
                below = _row_maxima(x, factor, row + 1, j, channel, known, C, H, W, LAST)
                h = _max(_max(above, here), below)
                if RELU:
                    h = _max(h + added[None, :], 0.0)
                total = tl.sum(h * part[None, :], 1)
                inside = _inside(row, j, H, W)
                to = logits + row * W + j
                if bias is not None and start == 0:
                    total += tl.load(bias + group)
                if SIZE > ROW_CHANNELS:
                    if start > 0:
                        total += tl.load(to, mask=inside, other=0.0)
                    tl.debug_barrier()  # several threads may have loaded what one of them will overwrite
                tl.store(to, total, mask=inside)
                above = here
                here = below
            tl.debug_barrier()

    if MULTIPLY:
        y += image
        top, share = _softmax(logits, PIXELS, RELU, P)
        for at in range(0, PIXELS, P):
            pixel = at + tl.arange(0, P)
            factor = 1.0 + tl.exp(_activated(logits, pixel, PIXELS, RELU) - top) * share
            for start in range(0, SIZE, N):
                k = start + tl.arange(0, N)
                inside = (pixel < PIXELS)[:, None] & (k < SIZE)[None, :]
                to = _at(pixel, first + k, C, H, W, LAST)
                value = tl.load(x + to, mask=inside, other=0.0).to(tl.float32)
                tl.store(y + to, value * factor[:, None], mask=inside)


@triton.jit
def _maps_back(
    x, dy, logits, dl, dbias, first, top, share,
    C: tl.constexpr, SIZE: tl.constexpr, H: tl.constexpr, W: tl.constexpr, LAST: tl.constexpr, RELU: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Through the product, the softmax and the ReLU; all pointers are those of this group or image."""
    PIXELS: tl.constexpr = H * W
    mean = 0.0
    for at in range(0, PIXELS, P):
        pixel = at + tl.arange(0, P)
        products = tl.zeros((P, N), tl.float32)
        for start in range(0, SIZE, N):
            k = start + tl.arange(0, N)
            inside = (pixel < PIXELS)[:, None] & (k < SIZE)[None, :]
            to = _at(pixel, first + k, C, H, W, LAST)
            value = tl.load(x + to, mask=inside, other=0.0).to(tl.float32)
            products += value * tl.load(dy + to, mask=inside, other=0.0).to(tl.float32)
        da = tl.sum(products, 1)
        tl.store(dl + pixel, da, mask=pixel < PIXELS)
        mean += tl.sum(tl.exp(_activated(logits, pixel, PIXELS, RELU) - top) * share * da, 0)
    tl.debug_barrier()
    total = 0.0
    for at in range(0, PIXELS, P):
        pixel = at + tl.arange(0, P)
        value = _activated(logits, pixel, PIXELS, RELU)
        da = tl.load(dl + pixel, mask=pixel < PIXELS, other=0.0)
        tl.debug_barrier()  # several threads may have loaded what one of them will overwrite
        d = tl.exp(value - top) * share * (da - mean)
        if RELU:
            d = tl.where(value <= 0, 0.0, d)
        tl.store(dl + pixel, d, mask=pixel < PIXELS)
        total += tl.sum(tl.where(pixel < PIXELS, d, 0.0), 0)
    if dbias is not None:
        tl.store(dbias, total)


@triton.jit
def _input_back(
    x, dy, dx, logits, dl, scale, shift, weight, q, r, first, top, share,
    C: tl.constexpr, SIZE: tl.constexpr, H: tl.constexpr, W: tl.constexpr, LAST: tl.constexpr, RELU: tl.constexpr,
    COLUMNS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Through the maximum, and the product's other side; all pointers are those of this group or image."""
    j = tl.arange(0, COLUMNS)
    nothing = tl.zeros((COLUMNS, N), tl.float32)
    # at the ends of a row these wrap to a pixel that sends nothing this way
    at_left = tl.broadcast_to(((j + COLUMNS - 1) % COLUMNS)[:, None], (COLUMNS, N))
    at_right = tl.broadcast_to(((j + 1) % COLUMNS)[:, None], (COLUMNS, N))
    for start in range(0, SIZE, N):
        k = start + tl.arange(0, N)
        known = k < SIZE
        channel = first + k
        factor = tl.load(scale + channel, mask=known, other=0.0)
        slope = factor * tl.load(weight + channel, mask=known, other=0.0)
        added = tl.load(shift + channel, mask=known, other=0.0) if RELU else slope
        products = nothing
        total = nothing
        above = nothing + float("-inf")
        here = _row_maxima(x, factor, 0, j, channel, known, C, H, W, LAST)
        to_above = nothing
        to_here = nothing
        for row in range(0, H + 1):
            below = _row_maxima(x, factor, row + 1, j, channel, known, C, H, W, LAST)
            m = _max(_max(above, here), below)
            d = tl.load(dl + row * W + j, mask=_inside(row, j, H, W), other=0.0)[:, None] + nothing
            if RELU:
                d = tl.where(m + added[None, :] <= 0, 0.0, d)
            total += d
            to_above += tl.where(above == m, d, 0.0)
            d = tl.where(above == m, 0.0, d)
            to_here += tl.where(here == m, d, 0.0)
            to_below = tl.where(here == m, 0.0, d)

            # the row above has all that is sent to it
            i = row - 1
            within = _inside(i, j, H, W)
            inside = within[:, None] & known[None, :]
            to = _at(i * W + j, channel, C, H, W, LAST)
            value = tl.load(x + to, mask=inside, other=0.0).to(tl.float32)
            left = _scaled(x, factor, i, j - 1, channel, known, C, H, W, LAST) == above
            middle = value * factor[None, :] == above
            rest = tl.where(left, 0.0, to_above)
            sent = tl.gather(tl.where(left, to_above, 0.0), at_right, 0)
            sent += tl.gather(tl.where(middle, 0.0, rest), at_left, 0)
            sent += tl.where(middle, rest, 0.0)
            products += tl.where(inside, sent * value, 0.0)
            a = tl.exp(_activated(logits, tl.where(within, i * W + j, H * W), H * W, RELU) - top) * share
            direct = tl.load(dy + to, mask=inside, other=0.0).to(tl.float32) * (1.0 + a)[:, None]
            tl.store(dx + to, direct + slope[None, :] * sent, mask=inside)

            above = here
            here = below
            to_above = to_here
            to_here = to_below
        tl.store(q + channel, tl.sum(products, 0), mask=known)
        tl.store(r + channel, tl.sum(total, 0), mask=known)


@triton.jit
def _backward(
    x, dy, dx, logits, dl, scale, shift, weight, q, r, dbias,
    G: tl.constexpr, SIZE: tl.constexpr, H: tl.constexpr, W: tl.constexpr, LAST: tl.constexpr, RELU: tl.constexpr,
    MAPS: tl.constexpr, INPUT: tl.constexpr,
    COLUMNS: tl.constexpr, ROW_CHANNELS: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = G * SIZE
    PIXELS: tl.constexpr = H * W
    program = tl.program_id(0).to(tl.int64)
    first = (program % G).to(tl.int32) * SIZE
    b = program // G
    x += b * (C * PIXELS)
    dy += b * (C * PIXELS)
    logits += program * PIXELS
    dl += program * PIXELS
    top, share = _softmax(logits, PIXELS, RELU, P)
    if MAPS:
        if dbias is not None:
            dbias += program
        _maps_back(x, dy, logits, dl, dbias, first, top, share, C, SIZE, H, W, LAST, RELU, P, N)
        tl.debug_barrier()
    if INPUT:
        _input_back(
            x, dy, dx + b * (C * PIXELS), logits, dl, scale, shift, weight, q + b * C, r + b * C, first, top, share,
            C, SIZE, H, W, LAST, RELU, COLUMNS, ROW_CHANNELS,
        )  # fmt: skip


@triton.jit
def _moments(
    x, q, r,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, LAST: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    PIXELS: tl.constexpr = H * W
    b = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * N + tl.arange(0, N)
    x += b * (C * PIXELS)
    sums = tl.zeros((P, N), tl.float32)
    for at in range(0, PIXELS, P):
        pixel = at + tl.arange(0, P)
        inside = (pixel < PIXELS)[:, None] & (channel < C)[None, :]
        sums += tl.load(x + _at(pixel, channel, C, H, W, LAST), mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(sums, 0) / PIXELS
    squares = tl.zeros((P, N), tl.float32)
    for at in range(0, PIXELS, P):
        pixel = at + tl.arange(0, P)
        inside = (pixel < PIXELS)[:, None] & (channel < C)[None, :]
        value = tl.load(x + _at(pixel, channel, C, H, W, LAST), mask=inside, other=0.0).to(tl.float32)
        distance = tl.where(inside, value - mean[None, :], 0.0)
        squares += distance * distance
    tl.store(q + b * C + channel, mean, mask=channel < C)
    tl.store(r + b * C + channel, tl.sum(squares, 0), mask=channel < C)


@triton.jit
def _add(
    x, dx, q, r,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, LAST: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    PIXELS: tl.constexpr = H * W
    channel = tl.program_id(1) * N + tl.arange(0, N)
    constant = tl.load(q + channel, mask=channel < C, other=0.0)[None, :]
    slope = tl.load(r + channel, mask=channel < C, other=0.0)[None, :]
    image = tl.program_id(0).to(tl.int64) * (C * PIXELS)
    for at in range(0, PIXELS, P):
        pixel = at + tl.arange(0, P)
        inside = (pixel < PIXELS)[:, None] & (channel < C)[None, :]
        to = image + _at(pixel, channel, C, H, W, LAST)
        value = tl.load(x + to, mask=inside, other=0.0).to(tl.float32)
        before = tl.load(dx + to, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + to, before + constant + slope * value, mask=inside)


def _tile(fast: int, slow: int, most: int) -> tuple[int, int]:
    """Powers of 2 that cover both sizes, as far as ``most`` values do, the first side before the other."""
    side = min(triton.next_power_of_2(fast), most)
    return side, min(triton.next_power_of_2(slow), most // side)


def _run(
    stage_bits: int,
    x: Tensor,
    groups: int,
    relu: bool,
    *,
    dy: Tensor | None = None,
    y: Tensor | None = None,
    dx: Tensor | None = None,
    l: Tensor | None = None,  # noqa: E741
    dl: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    q: Tensor | None = None,
    r: Tensor | None = None,
    dbias: Tensor | None = None,
) -> None:
    """As :class:`ulsam.layer.ops.stages.RunStages` says."""
    batch, channels, height, width = x.shape
    size, pixels, last = channels // groups, height * width, not x.is_contiguous()
    back = stage_bits & (stages.MAPS_BACK | stages.INPUT_BACK)
    # of tiles of a row, several of which are kept, 4 values a thread (forward: up to 8); of others, 16
    columns = triton.next_power_of_2(width)
    row_channels = min(triton.next_power_of_2(size), max(1, (512 if back else 1024) // columns))
    alone = stage_bits & (stages.MOMENTS | stages.ADD)
    warps = 4 if alone else max(1, min(4, columns * row_channels // 128))
    many = min(channels, 128) if alone else size
    n, p = _tile(many, pixels, 512 * warps) if last else _tile(pixels, many, 512 * warps)[::-1]
    shape = {"H": height, "W": width, "LAST": last, "P": p, "N": n, "num_warps": warps, "enable_fp_fusion": True}
    unit: dict[str, Any] = {**shape, "G": groups, "SIZE": size, "RELU": relu}
    unit |= {"COLUMNS": columns, "ROW_CHANNELS": row_channels}
    per_unit, per_image = (batch * groups,), (batch, triton.cdiv(channels, n))
    with torch.cuda.device_of(x):
        if stage_bits & (stages.LOGITS | stages.MULTIPLY):
            todo = {"LOGITS": bool(stage_bits & stages.LOGITS), "MULTIPLY": bool(stage_bits & stages.MULTIPLY)}
            _forward[per_unit](x, y, l, scale, shift, weight, bias, **unit, **todo)
        if back:
            todo = {"MAPS": bool(stage_bits & stages.MAPS_BACK), "INPUT": bool(stage_bits & stages.INPUT_BACK)}
            if dl is None:
                dl = x.new_empty((batch, groups, height, width), dtype=torch.float32)
            _backward[per_unit](x, dy, dx, l, dl, scale, shift, weight, q, r, dbias, **unit, **todo)
        if stage_bits & stages.MOMENTS:
            _moments[per_image](x, q, r, C=channels, **shape)
        if stage_bits & stages.ADD:
            _add[per_image](x, dx, q, r, C=channels, **shape)


forward = functools.partial(stages.forward, _run)
backward = functools.partial(stages.backward, _run)
