"""What the compiled backends have in common: the order of the passes over x, and all that is done between them.

A backend is one function, `Run`, that makes passes over tensors of x's size. What is left, batch statistics and the
gradients of parameters, is done here on vectors of C or g values and on the logits; for the CPU, where one call of
PyTorch takes as long as a small map, in cpu_training.c.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ulsam.layer.ops.reference import dense

# what to do, as in cpu.h; LOGITS | MULTIPLY and MAPS_BACK | INPUT_BACK may be asked for at once
LOGITS, MULTIPLY, MAPS_BACK, INPUT_BACK, MOMENTS, ADD = 1, 2, 4, 8, 16, 32


class RunStages(Protocol):
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
    ) -> None: ...


def forward(
    run: RunStages,
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
    batch, _, height, width = x.shape
    y = torch.empty_like(x)
    logits = x.new_empty((batch, groups, height, width), dtype=torch.float32)
    scale, weight = vector(scale), vector(weight)
    if not norms:
        shift, bias = shift_of(shift, scale, relu), None if bias is None else vector(bias)
        run(LOGITS | MULTIPLY, x, groups, relu, y=y, l=logits, scale=scale, shift=shift, weight=weight, bias=bias)
        return y, logits, logits.new_empty(0)
    mean, variance = _moments(run, x, groups)
    gamma, beta, gamma2, beta2 = map(vector, norms)
    scale = _inverse(scale, variance, eps).mul_(scale).mul_(gamma)
    shift = torch.addcmul(beta, scale, mean, value=-1)
    bias = None if relu else (weight * shift).view(groups, -1).sum(1)  # the moments do show the shift
    run(LOGITS, x, groups, relu, l=logits, scale=scale, shift=shift, weight=weight, bias=bias)
    mean2, variance2 = _moments(run, logits, groups)
    normed = torch.batch_norm(logits, gamma2, beta2, mean2, variance2, False, 0.0, eps, False)
    run(MULTIPLY, x, groups, relu, y=y, l=normed)
    return y, logits, torch.cat([mean, variance, mean2, variance2])


def backward(
    run: RunStages,
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
    w, weight = vector(scale), vector(weight)
    if not norms:
        dbias, stages = logits.new_empty(batch, groups), MAPS_BACK | INPUT_BACK
        shift = shift_of(shift, w, relu)
        run(stages, x, groups, relu, dy=dy, dx=dx, l=logits, scale=w, shift=shift, weight=weight, q=q, r=r, dbias=dbias)
        q, r = q.sum(0), r.sum(0)
        dweight = w * q if shift is None else w * q + shift * r
        return dx, weight * q, weight * r, dweight, dbias.sum(0), []

    count = batch * height * width
    mean, variance, mean2, variance2 = moments.split([channels, channels, groups, groups])
    gamma, beta, gamma2, beta2 = map(vector, norms)
    # norm1(w * x) = scale * x + shift: scale = gamma * standard, standard = w * inverse, shift = beta - scale * mean
    inverse = _inverse(w, variance, eps)
    standard = w * inverse
    scale = gamma * standard
    shift = torch.addcmul(beta, scale, mean, value=-1)
    normed = torch.batch_norm(logits, gamma2, beta2, mean2, variance2, False, 0.0, eps, False)
    dl, dbias = torch.empty_like(logits), logits.new_empty(batch, groups)
    run(MAPS_BACK, x, groups, relu, dy=dy, l=normed, dl=dl, dbias=dbias)
    inverse2 = (variance2 + eps).rsqrt_()
    dl, dgamma2, dbeta2 = torch.ops.aten.native_batch_norm_backward.default(
        dl, logits, gamma2, None, None, mean2, inverse2, True, eps, [True, True, True]
    )
    run(INPUT_BACK, x, groups, relu, dy=dy, dx=dx, l=normed, dl=dl, scale=scale, shift=shift, weight=weight, q=q, r=r)
    q, r = q.sum(0), r.sum(0)
    dbeta = weight * r  # also the gradient of shift; that of scale, with shift's part in it:
    dscale = torch.addcmul(weight * q, mean, dbeta, value=-1)
    dgamma = dscale * standard
    # the gradients of mean and variance, as what they add to each x: q + r * x
    r_mean = (dgamma * scale).mul_(standard).mul_(-1 / count)
    q_mean = (scale * dbeta).mul_(-1 / count).addcmul_(r_mean, mean, value=-1)
    run(ADD, x, groups, relu, dx=dx, q=q_mean, r=r_mean)
    dw = (dscale * gamma).mul_(inverse**3).mul_(eps)
    none, none2 = torch.zeros_like(mean), torch.zeros_like(mean2)  # a bias before BatchNorm changes nothing
    dweight = torch.addcmul(scale * q, shift, r)
    return dx, dw, none, dweight, none2, [dgamma, dbeta, dgamma2, dbeta2]


def vector(values: Tensor) -> Tensor:
    if values.dtype is not torch.float32 or not values.is_contiguous():
        values = values.detach().float().contiguous()
    return values if values.ndim == 1 else values.view(-1)


def shift_of(shift: Tensor | None, scale: Tensor, relu: bool) -> Tensor | None:
    """The shift where there is one or the ReLU takes one."""
    if shift is None:
        return torch.zeros_like(scale) if relu else None
    return vector(shift)


def _moments(run: RunStages, x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, over the batch and the pixels."""
    batch, channels, height, width = x.shape
    means, squares = x.new_empty((2, batch, channels), dtype=torch.float32)
    run(MOMENTS, x, groups, False, q=means, r=squares)
    mean = means.mean(0)
    return mean, (means - mean).square_().add_(squares, alpha=1 / (height * width)).mean(0)


def _inverse(w: Tensor, variance: Tensor, eps: float) -> Tensor:
    """1 over the standard deviation of w * x, where x has this variance."""
    return w.square().mul_(variance).add_(eps).rsqrt_()
