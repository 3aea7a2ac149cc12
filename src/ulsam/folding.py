"""A net for inference: BatchNorm folded into the convolutions before it, in the layout that is fastest."""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ulsam.errors import UlsamError
from ulsam.module import ULSAM
from ulsam.trace import default_input_size


@torch.no_grad()
def fold(model: nn.Module, input_size: Sequence[int] | None = None, *, channels_last: bool = True) -> nn.Module:
    """A copy of ``model`` for inference, with the same outputs to 1e-4: fewer layers, no BatchNorm that can be folded.

    A BatchNorm2d (also timm's with an activation in it) whose input is the output of one convolution, and of nothing
    else, is folded into that convolution; released ULSAM layers are folded too. The result is in eval mode and cannot
    be trained well; ``model`` is left as it is.

    Args:
        model: any `nn.Module` on one picture [B, C, H, W], on any device.
        input_size: C, H, W of the pictures on which it is looked at; by default `ulsam.trace.default_input_size`.
        channels_last: the memory layout of the convolutions' weights; maps follow it.

    Raises:
        UlsamError: the folded net does not give the model's outputs, because its code uses what lies between a
            convolution and its BatchNorm.

    >>> import timm
    >>> net = timm.create_model("mobilenetv1_100").eval()
    >>> folded = fold(net, (3, 64, 64))
    >>> any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    False
    """
    size = tuple(input_size or default_input_size(model))
    like = next(model.parameters(), torch.empty(0))
    exact = torch.promote_types(like.dtype, torch.float32)
    folded = copy.deepcopy(model).eval().to(exact)
    x = torch.randn(2, *size, generator=torch.Generator().manual_seed(0)).to(like.device, exact)
    expected = folded(x)
    for conv, norm in _pairs(folded, x):
        _fold_pair(folded, conv, norm)
    for name, module in list(folded.named_modules()):
        if isinstance(module, ULSAM) and module.form == "released":
            folded.set_submodule(name, module.fold())
    if channels_last:
        folded = folded.to(memory_format=torch.channels_last)
    for before, after in zip(_tensors(expected), _tensors(folded(x)), strict=True):
        if not torch.allclose(before, after, rtol=1e-4, atol=1e-4 * float(before.abs().max())):
            raise UlsamError(
                f"folding changes what this {type(model).__name__} puts out: "
                "its code uses what lies between a convolution and its BatchNorm"
            )
    return folded.to(like.dtype)


def _pairs(model: nn.Module, x: Tensor) -> list[tuple[str, str]]:
    """(convolution, BatchNorm): the one's output is the other's input, both run once, and nothing hangs on them."""
    made: dict[tuple[int, int], str] = {}  # a convolution's output, by id and version (of changes in place)
    keep: list[Any] = []  # so that no id is given twice
    found: list[tuple[str, str]] = []
    calls: dict[str, int] = {}
    handles = []

    def after(name: str, module: nn.Module) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            keep.append((args, output))
            if isinstance(module, nn.Conv2d):
                made[id(output), output._version] = name
            elif args and (key := (id(args[0]), args[0]._version)) in made:
                found.append((made[key], name))

        return hook

    for name, module in model.named_modules():
        if _can_fold(module) and not _in_ulsam(model, name):
            handles.append(module.register_forward_hook(after(name, module)))
    model(x)
    for handle in handles:
        handle.remove()
    once = [pair for pair in found if calls[pair[0]] == calls[pair[1]] == 1]
    return [(conv, norm) for conv, norm in once if sum(conv == other for other, _ in once) == 1]


def _can_fold(module: nn.Module) -> bool:
    """A convolution, or a BatchNorm of running statistics, with no layer hung behind it."""
    if isinstance(module, nn.BatchNorm2d):
        return module.running_mean is not None and not module._forward_hooks
    return isinstance(module, nn.Conv2d) and not module._forward_hooks


def _in_ulsam(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), ULSAM)


def _fold_pair(model: nn.Module, conv_name: str, norm_name: str) -> None:
    conv, norm = cast(nn.Conv2d, model.get_submodule(conv_name)), cast(nn.BatchNorm2d, model.get_submodule(norm_name))
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, mean, variance, norm.eps, norm.weight, norm.bias
    )
    # of timm's BatchNormAct2d, under their names
    rest = OrderedDict((name, child) for name, child in norm.named_children() if name in ("drop", "act"))
    model.set_submodule(norm_name, nn.Sequential(rest) if rest else nn.Identity())


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if not isinstance(output, dict | list | tuple):
        return []
    values = output.values() if isinstance(output, dict) else output
    return [tensor for value in values for tensor in _tensors(value)]
