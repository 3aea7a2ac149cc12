"""The layers that an edit can make: ULSAM, a thin block, and timm's attention of other papers to compare with."""

from typing import Literal, get_args

import torch
from torch import nn

from ulsam.errors import UlsamError
from ulsam.module import ULSAM, Form
from ulsam.thin import DEFAULT_WIDTH, ThinBlock

Layer = Literal["ulsam", "thin", "se", "eca", "cbam", "coord"]


#: timm's layers by our names of them; `make_layer` has their papers.
TIMMS = {"se": "SEModule", "eca": "EcaModule", "cbam": "CbamModule", "coord": "CoordAttn"}


class Chain(nn.Sequential):
    """An attention layer and the thin block behind it; not an `nn.Sequential`, which surgery takes for a wrapping."""


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

    ``"thin"`` is :class:`ulsam.ThinBlock`; with a ``width``, one follows any other layer. The layers of other papers
    are timm's, with timm's defaults:

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
        width: of a thin block; by default 32 for ``"thin"``, and none behind the others.

    Raises:
        UlsamError: the name is unknown, ``groups``, ``form`` or ``momentum`` for a layer that has none, or values that
            :class:`ulsam.ULSAM` or :class:`ulsam.ThinBlock` refuses.

    >>> {name: sum(p.numel() for p in make_layer(name, 160).parameters()) for name in get_args(Layer)}
    {'ulsam': 320, 'thin': 10976, 'se': 2728, 'eca': 5, 'cbam': 3300, 'coord': 3856}
    """
    if layer not in get_args(Layer):
        raise UlsamError(f"unknown layer {layer!r}; valid: {', '.join(get_args(Layer))}")
    options = {"groups": groups, "form": form, "momentum": momentum}
    given = {name: value for name, value in options.items() if value is not None}
    if width is not None and layer != "thin":
        attention = make_layer(layer, channels, **given, device=device, dtype=dtype)  # type: ignore[arg-type]
        return Chain(attention, ThinBlock(channels, width, device=device, dtype=dtype))
    if layer == "ulsam":
        return ULSAM(channels, **given, device=device, dtype=dtype)  # type: ignore[arg-type]
    if given:
        raise UlsamError(f"{', '.join(given)}: for ULSAM alone, not for the layer {layer}")
    if layer == "thin":
        return ThinBlock(channels, DEFAULT_WIDTH if width is None else width, device=device, dtype=dtype)
    from timm.layers import create_attn  # the layer ULSAM works without timm

    made: nn.Module = create_attn(layer, channels, device=device, dtype=dtype)
    return made
