"""Fit thin blocks to the blocks that they replaced, one by one and without labels, before the net is trained."""

import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from ulsam.edits import edited_blocks, put_back
from ulsam.errors import UlsamError, is_out_of_memory
from ulsam.evaluate import NotFinite, eval_mode
from ulsam.thin import ThinBlock

STEPS, RATE = 500, 0.01  # of Adam; its rate falls to 0 as a cosine


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A layer that was fitted, and the share of what its block added to its input (sum of squares) that it gives."""

    name: str
    width: int
    explained: float


@torch.no_grad()
def fit(model: nn.Module, batches: Sequence[Tensor], *, steps: int = STEPS) -> list[Fitted]:
    """Train each new :class:`ulsam.ThinBlock` to put out what the block that it replaced put out.

    The layer, with the attention before it if there is any, is trained alone, with Adam on the mean square of the
    difference between the two outputs. Layers are fitted in the order in which the net calls them, each on what the
    layers before it put out, towards what the net has there with all its blocks back; inserted layers stay. Nothing
    is random: the same net and pictures give the same weights. An error or Ctrl-C leaves a layer as it was.

    Args:
        model: an edited net whose blocks were trained before they were replaced; is changed in place.
        batches: pictures [B, C, H, W] as the net takes them, on its device; labels are not needed. A dozen batches of
            32 do. What goes into one layer and what its block put out, of all of them, are in memory together.
        steps: of training for each layer, with a batch each.

    Returns:
        One entry a layer; none for layers that were fitted or trained before, or whose blocks have no weights, because
        they were not in the file that the net came from.

    Raises:
        UlsamError: no pictures, single ones whose map is one pixel at a layer, a net that puts out NaN or infinity, or
            a full memory.

    >>> import ulsam
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1))
    >>> net = ulsam.replace(net, "1", layer="thin", width=8, input_size=(3, 9, 9))
    >>> [found.name for found in fit(net, [torch.randn(32, 3, 9, 9)], steps=20)]
    ['1']
    >>> net[1].is_new
    False
    """
    batches = list_of_batches(batches)
    places = new_layers(model)
    if not places:
        return []
    with eval_mode(model), enough_memory():
        whole, found = put_back(copy.deepcopy(model)), []
        for name in _called(model, places, batches[0]):
            found += fit_new(model, whole, name, batches, steps=steps)
    return found


def fit_new(
    model: nn.Module, whole: nn.Module, name: str, batches: Sequence[Tensor], *, steps: int = STEPS
) -> list[Fitted]:
    """Fit the layer at one place as :func:`fit` does, if it holds a new thin block; ``whole`` has all blocks back."""
    layer = model.get_submodule(name)
    if not _has_new(layer):
        return []
    given, wanted = passing(model, name, batches)[0], passing(whole, name, batches)[1]
    return [Fitted(name, _thin_of(layer).width, _regress(layer, name, given, wanted, steps))]


@torch.no_grad()
def fit_apart(
    net: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Tensor], *, steps: int = STEPS
) -> list[Fitted]:
    """Fit layers that are to replace blocks of ``net``, each as if it were the only one; ``net`` stays as it is.

    Args:
        net: whose blocks are trained, in eval mode.
        layers: by the name of the block that each is to replace, in eval mode and on the device of ``net``; those
            without a new :class:`ulsam.ThinBlock` are left out.
        batches, steps: as for :func:`fit`, and so are the result and the errors.
    """
    batches, found = list_of_batches(batches), []
    with enough_memory():
        for name, layer in layers.items():
            if _has_new(layer):
                explained = _regress(layer, name, *passing(net, name, batches), steps)
                found.append(Fitted(name, _thin_of(layer).width, explained))
    return found


@contextmanager
def enough_memory() -> Iterator[None]:
    """Within it a full memory is an error that the user can fix."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UlsamError("the memory is full: fit on fewer pictures (--fit-pictures)") from error


def list_of_batches(batches: Sequence[Tensor]) -> list[Tensor]:
    """The batches as a list; raises where there are none."""
    if isinstance(batches, Tensor):
        raise UlsamError("batches is a list of pictures [B, C, H, W] each, not one tensor")
    batches = list(batches)
    if not batches:
        raise UlsamError("no pictures to fit the layers on")
    return batches


def _regress(layer: nn.Module, name: str, given: Sequence[Tensor], wanted: Sequence[Tensor], steps: int) -> float:
    """Train ``layer`` to make ``wanted`` of ``given``, batches [B, C, H, W]; the share of the difference it gives.

    It changes at the end alone: a copy is trained, in float32, whatever the layer's dtype and whether it is frozen.
    """
    pairs = [(x.float(), y.float()) for x, y in zip(given, wanted, strict=True)]
    values = sum(x.numel() for x, _ in pairs)
    added = float(sum((y - x).square().sum() for x, y in pairs)) / values
    if not math.isfinite(added):
        raise NotFinite(f"the net puts out NaN or infinity at {name}: its weights are broken, or not for such pictures")
    if not added:
        return 1.0
    spread = [pair for pair in pairs if pair[0][:, 0].numel() > 1]  # BatchNorm takes no single value
    if not spread:
        raise UlsamError(f"{name} cannot be fitted on one picture at a time, whose map is one pixel there: give more")
    copied = copy.deepcopy(layer).float().train().requires_grad_(True)
    optimizer = torch.optim.Adam(copied.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for step in trange(steps, desc=f"fit {name}", unit="step", disable=None, leave=False):
            x, y = spread[step % len(spread)]
            loss = F.mse_loss(copied(x), y) / added
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    copied.eval()
    left = float(sum((y - copied(x)).square().sum() for x, y in pairs)) / values
    if not math.isfinite(left):
        raise NotFinite(f"fitting the layer at {name} diverged: give other pictures")
    layer.load_state_dict(copied.state_dict())
    return 1 - left / added


def new_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layer at each place where one with a thin block replaced a block that has weights, and is still as made."""
    places = {name: model.get_submodule(name) for name in edited_blocks(model)}
    return {name: place for name, place in places.items() if _has_new(place)}


def _has_new(layer: nn.Module) -> bool:
    return any(isinstance(module, ThinBlock) and module.is_new for module in layer.modules())


def _thin_of(layer: nn.Module) -> ThinBlock:
    return next(module for module in layer.modules() if isinstance(module, ThinBlock))


def _called(model: nn.Module, places: Mapping[str, nn.Module], batch: Tensor) -> list[str]:
    """The places in the order of their calls."""
    order: list[str] = []
    handles = [
        layer.register_forward_pre_hook(lambda *_, name=name: order.append(name)) for name, layer in places.items()
    ]
    try:
        model(batch[:1])
    finally:
        for handle in handles:
            handle.remove()
    return order


def passing(net: nn.Module, name: str, batches: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """What goes into the module of this name and what it puts out, for each batch.

    Both are copies, as later layers may change them in place. What comes behind the module is not computed.
    """
    given, wanted = [], []

    def look(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        given.append(args[0].clone())
        wanted.append(output.clone())
        raise _Seen

    handle = net.get_submodule(name).register_forward_hook(look)
    try:
        for batch in batches:
            with suppress(_Seen):
                net(batch)
    finally:
        handle.remove()
    return given, wanted


class _Seen(Exception):
    """Ends a pass through a net whose rest is of no use."""
