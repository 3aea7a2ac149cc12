"""The attention layers that an edit can make: ULSAM, and timm's layers of other papers to compare it with."""

from typing import Literal, get_args

import torch
from torch import nn

from ulsam.errors import UlsamError
from ulsam.module import ULSAM, Form

Layer = Literal["ulsam", "se", "eca", "cbam", "coord"]


def make_layer(
    layer: Layer,
    channels: int,
    *,
    groups: int | None = None,
    form: Form | None = None,
    momentum: float | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """A new attention layer by name, [B, channels, H, W] -> the same shape.

    The layers of other papers are timm's, with timm's defaults:

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

    Raises:
        UlsamError: the name is unknown, ``groups``, ``form`` or ``momentum`` for a layer that has none, or values that
            :class:`ulsam.ULSAM` refuses.

    >>> {name: sum(p.numel() for p in make_layer(name, 160).parameters()) for name in get_args(Layer)}
    {'ulsam': 320, 'se': 2728, 'eca': 5, 'cbam': 3300, 'coord': 3856}
    """
    if layer not in get_args(Layer):
        raise UlsamError(f"unknown layer {layer!r}; valid: {', '.join(get_args(Layer))}")
    options = {"groups": groups, "form": form, "momentum": momentum}
    given = {name: value for name, value in options.items() if value is not None}
    if layer == "ulsam":
        return ULSAM(channels, **given, device=device, dtype=dtype)  # type: ignore[arg-type]
    if given:
        raise UlsamError(f"{', '.join(given)}: for ULSAM alone; the layer {layer} is made with timm's defaults")
    from timm.layers import create_attn  # the layer ULSAM works without timm

    made: nn.Module = create_attn(layer, channels, device=device, dtype=dtype)
    return made
