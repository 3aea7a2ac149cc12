"""The layers that an edit can make: ULSAM, a narrow inverted residual, and other papers' attention from timm."""

from typing import Literal, get_args

import torch
from torch import nn

from ulsam.base.errors import UlsamError
from ulsam.layer.inverted_residual import DEFAULT_WIDTH, InvertedResidual
from ulsam.layer.ulsam import ULSAM, Form

Layer = Literal["ulsam", "inverted_residual", "se", "eca", "cbam", "coord"]


#: timm's layers by our names of them; `make_layer` has their papers.
TIMMS = {"se": "SEModule", "eca": "EcaModule", "cbam": "CbamModule", "coord": "CoordAttn"}


class Chain(nn.Sequential):
    """Attention, and the narrow inverted residual behind it; no `nn.Sequential`, which surgery sees as a wrapper."""


def make_layer(
    layer: Layer,
    channels: int,
    *,
    groups: int | None = None,
    form: Form | None = None,
    momentum: float | None = None,
    width: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """A new layer by name, [B, channels, H, W] -> the same shape.

    ``"inverted_residual"`` is :class:`ulsam.InvertedResidual`; with a ``width``, one follows any other layer. The
    layers of other papers are timm's, with timm's defaults:

    - ``"se"``: squeeze-and-excitation (`SEModule`, arXiv 1709.01507); two 1x1 convolutions with biases through
      channels / 16 channels, rounded to a multiple of 8.
    - ``"eca"``: efficient channel attention (`EcaModule`, arXiv 1910.03151); one convolution along the channels, of 3
      to 7 weights by their number.
    - ``"cbam"``: convolutional block attention (`CbamModule`, arXiv 1807.06521); channels / 16, then a 7x7 convolution
      with BatchNorm over position.
    - ``"coord"``: coordinate attention (`CoordAttn`, arXiv 2103.02907); channels / 24, rounded to a multiple of 8, with
      BatchNorm.

    Args:
        layer: which one.
        channels: C of the input; H and W are free.
        groups, form, momentum: of :class:`ulsam.ULSAM` alone; None takes its default.
        width: of a narrow inverted residual; by default 32 for ``"inverted_residual"``, and none behind the others.

    Raises:
        UlsamError: the name is unknown, ``groups``, ``form`` or ``momentum`` for a layer that has none, or values that
            :class:`ulsam.ULSAM` or :class:`ulsam.InvertedResidual` refuses.

    >>> {name: sum(p.numel() for p in make_layer(name, 160).parameters()) for name in get_args(Layer)}
    {'ulsam': 320, 'inverted_residual': 10976, 'se': 2728, 'eca': 5, 'cbam': 3300, 'coord': 3856}
    """
    if layer not in get_args(Layer):
        raise UlsamError(f"unknown layer {layer!r}; valid: {', '.join(get_args(Layer))}")
    options = {"groups": groups, "form": form, "momentum": momentum}
    given = {name: value for name, value in options.items() if value is not None}
    if width is not None and layer != "inverted_residual":
        attention = make_layer(layer, channels, **given, device=device, dtype=dtype)  # type: ignore[arg-type]
        return Chain(attention, InvertedResidual(channels, width, device=device, dtype=dtype))
    if layer == "ulsam":
        return ULSAM(channels, **given, device=device, dtype=dtype)  # type: ignore[arg-type]
    if given:
        raise UlsamError(f"{', '.join(given)}: for ULSAM alone, not for the layer {layer}")
    if layer == "inverted_residual":
        return InvertedResidual(channels, DEFAULT_WIDTH if width is None else width, device=device, dtype=dtype)
    from timm.layers import create_attn  # the layer ULSAM works without timm

    made: nn.Module = create_attn(layer, channels, device=device, dtype=dtype)
    return made
