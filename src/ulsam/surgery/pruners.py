"""Structured pruning of models with ULSAM layers by Torch-Pruning, which cannot see the subspaces by itself."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ulsam.base.errors import UlsamError
from ulsam.layer.ulsam import ULSAM
from ulsam.surgery.edited import is_followed
from ulsam.surgery.layer_host import host_class


def customized_pruners(model: nn.Module) -> dict[type[nn.Module], Any]:
    """What Torch-Pruning's pruners take as ``customized_pruners``: it prunes every subspace by as many channels.

    Build the pruner after the edits. The number of subspaces stays; with ``round_to``, channels stay a multiple of it.

    Args:
        model: with ULSAM layers, put in by edits or held by the model's own code.

    Raises:
        ImportError: `torch_pruning` is not installed (``pip install 'ulsam[peers]'``).
        UlsamError: a layer was inserted behind a bare convolution or BatchNorm; in pruning, where the channels to prune
            are not as many in every subspace.

    >>> import torch_pruning as tp
    >>> from ulsam import replace
    >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 4, 1))
    >>> model, images = replace(model, "1", groups=4, input_size=(3, 16, 16)), torch.randn(1, 3, 16, 16)
    >>> found = customized_pruners(model)
    >>> options = {"importance": tp.importance.MagnitudeImportance(), "ignored_layers": [model[2]]}
    >>> pruner = tp.pruner.BasePruner(model, images, **options, pruning_ratio=0.5, customized_pruners=found)
    >>> pruner.step()
    >>> model[1].channels, model[1].groups, model(images).shape
    (8, 4, torch.Size([1, 4, 14, 14]))
    """
    from torch_pruning.pruner.function import BasePruningFunc

    for name, module in model.named_modules():
        if is_followed(module) and isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            raise UlsamError(
                f"Torch-Pruning would not see the layer inserted behind {name}, a {host_class(module).__name__}: "
                "insert it behind the block around that"
            )

    class ULSAMPruner(BasePruningFunc):  # type: ignore[misc]
        TARGET_MODULES = ULSAM

        def prune_out_channels(self, layer: ULSAM, idxs: Sequence[int]) -> ULSAM:
            kept = [channel for channel in range(layer.channels) if channel not in set(idxs)]
            keep_channels(layer, kept)
            return layer

        prune_in_channels = prune_out_channels

        def get_out_channels(self, layer: ULSAM) -> int:
            return layer.channels

        get_in_channels = get_out_channels

        def get_out_channel_groups(self, layer: ULSAM) -> int:
            return layer.groups

        get_in_channel_groups = get_out_channel_groups

    return {type(layer): ULSAMPruner() for layer in model.modules() if isinstance(layer, ULSAM)}


@torch.no_grad()
def keep_channels(layer: ULSAM, kept: Sequence[int]) -> None:
    """Leave only some channels of a layer, in place; its subspaces stay, each with as many channels.

    Raises:
        UlsamError: the channels are not as many in every subspace, or none.

    >>> layer = ULSAM(8, groups=2)
    >>> keep_channels(layer, [0, 1, 6, 7])
    >>> layer(torch.ones(1, 4, 3, 3)).shape
    torch.Size([1, 4, 3, 3])
    """
    size = layer.channels // layer.groups
    counts = [sum(channel // size == group for channel in kept) for group in range(layer.groups)]
    if len(set(counts)) > 1 or not counts[0]:
        raise UlsamError(f"every subspace must keep as many channels, 1 or more, not {counts}: prune them alike")
    index = torch.tensor(sorted(kept), device=layer.depthwise.weight.device)
    depthwise, pointwise = layer.depthwise, layer.pointwise
    by_channel: list[nn.Module] = [depthwise]
    if layer.form == "released":
        by_channel.append(layer.depthwise_norm)
        layer.depthwise_norm.num_features = len(kept)
    for part in by_channel:
        for name, value in [*part.named_parameters(), *part.named_buffers()]:
            if value.ndim:
                setattr(part, name, _like(value, value[index]))
    weight = pointwise.weight.reshape(-1)[index].view(layer.groups, counts[0], 1, 1)
    pointwise.weight = nn.Parameter(weight, pointwise.weight.requires_grad)
    layer.channels = depthwise.in_channels = depthwise.out_channels = depthwise.groups = len(kept)
    pointwise.in_channels = len(kept)


def _like(value: Tensor, new: Tensor) -> Tensor:
    return nn.Parameter(new, value.requires_grad) if isinstance(value, nn.Parameter) else new
