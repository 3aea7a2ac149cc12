"""What the compiled backends have in common: the order of the passes over x, and all that is done between them.

A backend is one function, `Run`, that makes passes over tensors of x's size. What is left, batch statistics and the
gradients of parameters, is done here on vectors of C or g values and on the logits.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ulsam.ops.reference import dense

# what to do, as in cpu.h; LOGITS | MULTIPLY and MAPS_BACK | INPUT_BACK may be asked for at once
LOGITS, MULTIPLY, MAPS_BACK, INPUT_BACK, MOMENTS, ADD = 1, 2, 4, 8, 16, 32


class Run(Protocol):
    """Passes over x [B, C, H, W], contiguous or channels_last, as are y, dy and dx, all of x's dtype; the rest float32.

    - LOGITS: l = the sums over each group's channels of weight * relu?(maxpool3x3(scale * x) + shift), plus bias;
      without relu the shift is left out, which the maps do not show.
    - MULTIPLY: y = x + x * softmax(relu?(l)).
    - MAPS_BACK: dl, the gradient of l, from dy; dbias, the sums of dl over the pixels.
    - INPUT_BACK: dx; and with D, dl sent back through the ReLU and the maximum, q = sum D * x and r = sum D over the
      pixels.
    - MOMENTS: q, the means over the pixels, and r, the sums of squared distances from them.
    - ADD: dx += q + r * x, with q and r of the channels.

    l, dl: [B, groups, H, W]; scale, shift, weight: [C]; bias: [groups]; q, r: [B, C], for ADD [C]; dbias: [B, groups].
    dl may be missing where both stages of the gradient are asked for.
    """

    def __call__(
        self,
        asked: int,
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
    ) -> None: ...


def forward(
    run: Run,
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    norms: Sequence[Tensor],
    groups: int,
    relu: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y like x, the logits [B, groups, H, W] (of batch statistics: before the second BatchNorm), and the moments."""
    x = dense(x)
    batch, channels, height, width = x.shape
    y = torch.empty_like(x)
    logits = x.new_empty((batch, groups, height, width), dtype=torch.float32)
    scale, weight = _vector(scale), _vector(weight)
    if not norms:
        shift, bias = _shift(shift, scale, relu), None if bias is None else _vector(bias)
        run(LOGITS | MULTIPLY, x, groups, relu, y=y, l=logits, scale=scale, shift=shift, weight=weight, bias=bias)
        return y, logits, logits.new_empty(0)
    means, squares = logits.new_empty(2, batch, channels)
    run(MOMENTS, x, groups, relu, q=means, r=squares)
    mean = means.mean(0)
    variance = (squares / (height * width) + (means - mean).square()).mean(0)
    scale, shift = _folded(scale, norms[0], norms[1], mean, variance, eps)
    bias = None if relu else (weight * shift).view(groups, -1).sum(1)  # the moments do show the shift
    run(LOGITS, x, groups, relu, l=logits, scale=scale, shift=shift, weight=weight, bias=bias)
    variance2, mean2 = torch.var_mean(logits, (0, 2, 3), correction=0)
    run(MULTIPLY, x, groups, relu, y=y, l=_normed(logits, norms[2], norms[3], mean2, variance2, eps))
    return y, logits, torch.cat([mean, variance, mean2, variance2])


def backward(
    run: Run,
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    norms: Sequence[Tensor],
    logits: Tensor,
    moments: Tensor,
    relu: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """The gradients of x, scale, shift, weight, bias and norms, all but the first in float32.

    From q and r of INPUT_BACK, summed over the batch, the gradients of a channel's scale, shift and weight are
    weight * q, weight * r and scale * q + shift * r.
    """
    x = dense(x)
    dy = dy.contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last)
    batch, channels, height, width = x.shape
    groups = logits.shape[1]
    dx = torch.empty_like(x)
    q, r = logits.new_empty(2, batch, channels)
    w, weight = _vector(scale), _vector(weight)
    if not norms:
        dbias, stages = logits.new_empty(batch, groups), MAPS_BACK | INPUT_BACK
        shift = _shift(shift, w, relu)
        run(stages, x, groups, relu, dy=dy, dx=dx, l=logits, scale=w, shift=shift, weight=weight, q=q, r=r, dbias=dbias)
        q, r = q.sum(0), r.sum(0)
        dweight = w * q if shift is None else w * q + shift * r
        return dx, weight * q, weight * r, dweight, dbias.sum(0), []

    mean, variance, mean2, variance2 = moments.split([channels, channels, groups, groups])
    scale, shift = _folded(w, norms[0], norms[1], mean, variance, eps)
    normed = _normed(logits, norms[2], norms[3], mean2, variance2, eps)
    dl = torch.empty_like(logits)
    run(MAPS_BACK, x, groups, relu, dy=dy, l=normed, dl=dl)
    inverse2 = (variance2 + eps).rsqrt()
    standard = (logits - _maps(mean2)) * _maps(inverse2)
    dbeta2, dgamma2 = dl.sum((0, 2, 3)), (dl * standard).sum((0, 2, 3))
    count = batch * height * width
    dl -= _maps(dbeta2 / count) + standard * _maps(dgamma2 / count)
    dl *= _maps(_vector(norms[2]) * inverse2)
    del standard
    run(INPUT_BACK, x, groups, relu, dy=dy, dx=dx, l=normed, dl=dl, scale=scale, shift=shift, weight=weight, q=q, r=r)
    q, r = q.sum(0), r.sum(0)
    # through scale = gamma * w * inverse and shift = beta - scale * mean, with inverse = (w^2 * variance + eps)^(-1/2)
    gamma, inverse = _vector(norms[0]), (w.square() * variance + eps).rsqrt()
    dshift = weight * r
    dscale = weight * q - mean * dshift
    dmean = -scale * dshift
    dvariance = -0.5 * dscale * gamma * (w * inverse) ** 3
    spread = 2 * dvariance / count
    run(ADD, x, groups, relu, dx=dx, q=dmean / count - spread * mean, r=spread)
    dw = dscale * gamma * inverse**3 * eps
    none, none2 = torch.zeros_like(mean), torch.zeros_like(mean2)  # a bias before BatchNorm changes nothing
    return dx, dw, none, scale * q + shift * r, none2, [dscale * w * inverse, dshift, dgamma2, dbeta2]


def _vector(values: Tensor) -> Tensor:
    return values.detach().float().contiguous()


def _shift(shift: Tensor | None, scale: Tensor, relu: bool) -> Tensor | None:
    """The shift where there is one or the ReLU takes one."""
    if shift is None:
        return torch.zeros_like(scale) if relu else None
    return _vector(shift)


def _maps(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


def _folded(
    w: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Scale and shift that are BatchNorm of ``w * x``, where x has this mean and variance."""
    scale = _vector(gamma) * w * (w.square() * variance + eps).rsqrt()
    return scale, _vector(beta) - scale * mean


def _normed(logits: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
    scale = _vector(gamma) * (variance + eps).rsqrt()
    return logits * _maps(scale) + _maps(_vector(beta) - scale * mean)
