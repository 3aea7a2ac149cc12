"""Fit thin blocks to the blocks that they replaced, one by one and without labels, before the net is trained."""

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from ulsam.errors import UlsamError
from ulsam.evaluate import NotFinite, eval_mode
from ulsam.models import lacks_weights
from ulsam.surgery import changes, remove
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
    layers before it put out, towards what the net without edits has there. Nothing is random: the same net and pictures
    give the same weights.

    Args:
        model: an edited net whose blocks were trained before they were replaced; is changed in place.
        batches: pictures [B, C, H, W] as the net takes them, on its device; labels are not needed. A dozen batches of
            32 do. The maps of all of them at one layer are in memory together.
        steps: of training for each layer, with a batch each.

    Returns:
        One entry a layer; none for layers that were fitted or trained before, or whose blocks have no weights: those
        that `ulsam.models.load_weights` did not find in its file, because they were replaced there already.

    Raises:
        UlsamError: no pictures, a batch that is one pixel at some layer, or a net that puts out NaN or infinity.

    >>> import ulsam
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1))
    >>> net = ulsam.replace(net, "1", layer="thin", width=8, input_size=(3, 9, 9))
    >>> [found.name for found in fit(net, [torch.randn(32, 3, 9, 9)], steps=20)]
    ['1']
    >>> net[1].is_new
    False
    """
    batches = _checked(batches)
    places = new_layers(model)
    if not places:
        return []
    with eval_mode(model):
        names = _called(model, places, batches[0])
        wanted = _passing(_whole(model), names, batches)
        found = []
        for name in names:
            given = [x for x, _ in _passing(model, [name], batches)[name]]
            explained = _regress(places[name], name, given, [y for _, y in wanted.pop(name)], steps)
            found.append(Fitted(name, _thin_of(places[name]).width, explained))
    return found


@torch.no_grad()
def fit_apart(
    net: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Tensor], *, steps: int = STEPS
) -> None:
    """Fit layers that are to replace blocks of ``net``, each as if it were the only one; ``net`` stays as it is.

    Args:
        net: whose blocks are trained, in eval mode.
        layers: by the name of the block that each is to replace, in eval mode and on the device of ``net``; those
            without a new :class:`ulsam.ThinBlock` are left out.
        batches, steps: as for :func:`fit`, and so are the errors.
    """
    batches = _checked(batches)
    for name, layer in layers.items():
        if _has_new(layer):
            given, wanted = zip(*_passing(net, [name], batches)[name], strict=True)
            _regress(layer, name, given, wanted, steps)


def _checked(batches: Sequence[Tensor]) -> list[Tensor]:
    if isinstance(batches, Tensor):
        raise UlsamError("batches is a list of pictures [B, C, H, W] each, not one tensor")
    batches = list(batches)
    if not batches:
        raise UlsamError("no pictures to fit the layers on")
    return batches


def _regress(layer: nn.Module, name: str, given: Sequence[Tensor], wanted: Sequence[Tensor], steps: int) -> float:
    """Train ``layer`` to make ``wanted`` of ``given``, batches [B, C, H, W]; the share of the difference it gives."""
    pairs = list(zip(given, wanted, strict=True))
    values = sum(x.numel() for x in given)
    added = float(sum((y - x).square().sum() for x, y in pairs)) / values
    if not math.isfinite(added):
        raise NotFinite(f"the net puts out NaN or infinity at {name}: its weights are broken, or not for such pictures")
    if not added:
        return 1.0
    if any(x[:, 0].numel() == 1 for x in given):
        raise UlsamError(f"{name} cannot be fitted on a batch of one picture whose map is one pixel there: give larger")
    optimizer = torch.optim.Adam(layer.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    layer.train()
    with torch.enable_grad():
        for step in trange(steps, desc=f"fit {name}", unit="step", disable=None, leave=False):
            x, y = pairs[step % len(pairs)]
            loss = F.mse_loss(layer(x), y) / added
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    optimizer.zero_grad()
    layer.eval()
    left = float(sum((y - layer(x)).square().sum() for x, y in pairs)) / values
    return 1 - left / added


def new_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layer at each place where one with a thin block replaced a block that has weights, and is still as made."""
    _, aside = changes(model)
    places = {name: model.get_submodule(name) for name, old in aside.items() if not lacks_weights(old)}
    return {name: place for name, place in places.items() if _has_new(place)}


def _has_new(layer: nn.Module) -> bool:
    return any(isinstance(module, ThinBlock) and module.is_new for module in layer.modules())


def _thin_of(layer: nn.Module) -> ThinBlock:
    return next(module for module in layer.modules() if isinstance(module, ThinBlock))


def _whole(model: nn.Module) -> nn.Module:
    """A copy of the net before its edits, in eval mode; edits whose block has no weights stay."""
    whole = remove(copy.deepcopy(model)).eval()
    for name, old in changes(model)[1].items():
        if lacks_weights(old):
            whole.set_submodule(name, copy.deepcopy(model.get_submodule(name)))
    return whole


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


def _passing(net: nn.Module, names: Sequence[str], batches: Sequence[Tensor]) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """What goes into each of these modules and what it puts out, for each batch; copies: later layers may change it."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    handles = [
        net.get_submodule(name).register_forward_hook(
            lambda _, args, output, name=name: seen[name].append((args[0].clone(), output.clone()))
        )
        for name in names
    ]
    try:
        for batch in batches:
            net(batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen
