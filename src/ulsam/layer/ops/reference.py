"""What subspace attention is, in plain PyTorch: the definition that every backend is tested against."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_maps(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    norms: Sequence[Tensor],
    groups: int,
    relu: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The maps of :func:`ulsam.layer.ops.subspace_attention`, [B, groups, H, W] in float32 or float64, and the moments.

    >>> maps, _ = attention_maps(torch.ones(2, 8, 3, 3), torch.ones(8), None, torch.ones(8), None, [], 4, False, 1e-5)
    >>> maps.shape, maps.sum((2, 3)).allclose(torch.ones(2, 4))
    (torch.Size([2, 4, 3, 3]), True)
    """
    exact = accumulation(x.dtype)
    h = x.to(exact)
    moments = _moments(h) if norms else torch.empty(0, dtype=exact, device=x.device)
    h = h * _channels(scale, exact)
    if shift is not None:
        h = h + _channels(shift, exact)
    if norms:
        h = F.batch_norm(h, None, None, norms[0].to(exact), norms[1].to(exact), training=True, eps=eps)
    if relu:
        h = F.relu(h)
    if h.numel():  # PyTorch pools no empty map
        h = F.max_pool2d(h, 3, stride=1, padding=1)
    h = h * _channels(weight, exact)
    logits = h.unflatten(1, (groups, -1)).sum(2)
    if norms:
        moments = torch.cat([moments, _moments(logits)])
    if bias is not None:
        logits = logits + _channels(bias, exact)
    if norms:
        logits = F.batch_norm(logits, None, None, norms[2].to(exact), norms[3].to(exact), training=True, eps=eps)
    if relu:
        logits = F.relu(logits)
    return logits.flatten(2).softmax(-1).view_as(logits), moments


def softmax_over_maps(logits: Tensor) -> Tensor:
    """Softmax over H*W of [B, groups, H, W], without a reshape, which would depend on the size; logsumexp loses digits.

    >>> softmax_over_maps(torch.zeros(1, 1, 2, 2)).flatten()
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    shares = (logits - logits.amax([2, 3], keepdim=True)).exp()
    return shares / shares.sum([2, 3], keepdim=True)


def subspace_attention(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    norms: Sequence[Tensor],
    groups: int,
    relu: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """x [B, C, H, W] plus x times its subspaces' maps, and moments; arguments as in :func:`attention_maps`.

    >>> x = torch.ones(1, 8, 1, 1)  # a map of one pixel is 1
    >>> subspace_attention(x, torch.ones(8), None, torch.ones(8), None, [], 4, False, 1e-5)[0].eq(2).all()
    tensor(True)
    """
    maps, moments = attention_maps(x, scale, shift, weight, bias, norms, groups, relu, eps)
    subspaces = x.unflatten(1, (groups, -1))
    return torch.addcmul(subspaces, subspaces, maps.to(x.dtype).unsqueeze(2)).flatten(1, 2), moments


def forward(
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
    """As :func:`ulsam.layer.ops.stages.forward`, for what no other backend takes; the logits stay 0."""
    y, moments = subspace_attention(x, scale, shift, weight, bias, norms, groups, relu, eps)
    logits = x.new_zeros((x.shape[0], groups, *x.shape[2:]), dtype=moments.dtype)
    return torch.empty_like(dense(x)).copy_(y), logits, moments


def backward(
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
    """As :func:`ulsam.layer.ops.stages.backward`, by PyTorch's own gradient of the definition."""
    groups = logits.shape[1]
    shift = logits.new_zeros(x.shape[1]) if shift is None else shift
    bias = logits.new_zeros(groups) if bias is None else bias

    def y(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, *norms: Tensor) -> Tensor:
        return subspace_attention(x, scale, shift, weight, bias, norms, groups, relu, eps)[0]

    pull = torch.func.vjp(y, x, scale, shift, weight, bias, *norms)[1]
    dx, *vectors = pull(dy)
    dscale, dshift, dweight, dbias, *dnorms = [vector.to(logits.dtype) for vector in vectors]
    return torch.empty_like(dense(x)).copy_(dx), dscale, dshift, dweight, dbias, dnorms


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """The dtype of maps, statistics and the gradients of vectors: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dense(x: Tensor) -> Tensor:
    """``x`` itself where it is contiguous or channels_last, else a contiguous copy."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def _channels(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype).view(1, -1, 1, 1)


def _moments(h: Tensor) -> Tensor:
    """[mean of each channel, biased variance of each channel], as BatchNorm's running statistics need them."""
    variance, mean = torch.var_mean(h.detach(), (0, 2, 3), correction=0)
    return torch.cat([mean, variance])
