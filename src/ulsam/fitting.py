"""Fit low-rank layers to the blocks that they replaced, in closed form and without labels."""

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ulsam.errors import UlsamError
from ulsam.evaluate import eval_mode
from ulsam.mixing import LowRank
from ulsam.surgery import changes, remove

RIDGE = 1e-3  # of the mean variance of the channels, added to each: directions without spread stay out


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A layer that was fitted, and the share of what its block added to its input (sum of squares) that it gives."""

    name: str
    rank: int
    explained: float


@torch.no_grad()
def fit(model: nn.Module, batches: Sequence[Tensor]) -> list[Fitted]:
    """Give each new :class:`ulsam.LowRank` layer the weights that come nearest to the block which it replaced.

    A block adds something to its input. The layer gets the linear map of its rank that predicts this with the least
    mean square over all positions of the pictures: reduced-rank regression (Izenman 1975). Layers are fitted in the
    order in which the net calls them, each on what the layers before it put out, towards what the net without edits
    has there.

    Args:
        model: an edited net whose blocks were trained before they were replaced; is changed in place.
        batches: pictures [B, C, H, W] as the net takes them, on its device; labels are not needed. A few hundred do.

    Returns:
        One entry a layer; none for layers whose weights are no longer those of a new one.

    Raises:
        UlsamError: no pictures.

    >>> import ulsam
    >>> block = nn.Conv2d(8, 8, 1)
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), block)
    >>> net = ulsam.replace(net, "1", layer="lowrank", rank=8, input_size=(3, 9, 9))
    >>> pictures = torch.randn(64, 3, 9, 9)
    >>> before = block(net[0](pictures))
    >>> [found.name for found in fit(net, [pictures])]
    ['1']
    >>> bool((net(pictures) - before).abs().max() < 0.02)
    True
    """
    if not batches:
        raise UlsamError("no pictures to fit the layers on")
    places = new_layers(model)
    if not places:
        return []
    whole = remove(copy.deepcopy(model)).eval()
    found = []
    with eval_mode(model):
        for name in _called(model, places, batches[0]):
            layer, sums = places[name], _Sums(places[name].channels)
            with _passing(layer) as ours, _passing(whole.get_submodule(name)) as theirs:
                for batch in batches:
                    model(batch)
                    whole(batch)
                    sums.add(ours.pop()[0], theirs.pop()[1])
            found.append(Fitted(name, layer.rank, sums.solve(layer)))
    return found


@torch.no_grad()
def fit_apart(net: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Tensor]) -> None:
    """Fit layers that are to replace blocks of ``net``, each as if it were the only one; ``net`` stays as it is.

    Args:
        net: whose blocks are trained, in eval mode.
        layers: by the name of the block that each is to replace; those without a :class:`ulsam.LowRank` are left out,
            and what others have before it, attention, counts.
        batches: as for :func:`fit`.
    """
    found = {name: low for name, layer in layers.items() for low in layer.modules() if isinstance(low, LowRank)}
    if not found:
        return
    sums = {name: _Sums(layer.channels) for name, layer in found.items()}

    def look(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str) -> None:
        with _passing(found[name]) as ours:
            layers[name](args[0])
        sums[name].add(ours.pop()[0], output)

    handles = [net.get_submodule(name).register_forward_hook(partial(look, name=name)) for name in found]
    try:
        for batch in batches:
            net(batch)
    finally:
        for handle in handles:
            handle.remove()
    for name, layer in found.items():
        sums[name].solve(layer)


class _Sums:
    """Sums over positions of what a layer gets and of what its block adds to that."""

    def __init__(self, channels: int) -> None:
        self.count, self.added_squares = 0, 0.0
        self.x = torch.zeros(channels, dtype=torch.float64)
        self.r = torch.zeros(channels, dtype=torch.float64)
        self.xx = torch.zeros(channels, channels, dtype=torch.float64)
        self.xr = torch.zeros(channels, channels, dtype=torch.float64)

    def add(self, given: Tensor, wanted: Tensor) -> None:
        """Both [B, C, H, W]."""
        x = given.movedim(1, -1).flatten(0, -2).double().cpu()
        r = wanted.movedim(1, -1).flatten(0, -2).double().cpu() - x
        self.count += len(x)
        self.added_squares += float(r.square().sum())
        self.x += x.sum(0)
        self.r += r.sum(0)
        self.xx += x.T @ x
        self.xr += x.T @ r

    def solve(self, layer: LowRank) -> float:
        """Set the weights of ``layer``; the share of the squares that it explains."""
        mean_x, mean_r = self.x / self.count, self.r / self.count
        cov = self.xx / self.count - mean_x.outer(mean_x)
        cross = self.xr / self.count - mean_x.outer(mean_r)
        ridge = RIDGE * cov.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        slopes = torch.linalg.solve(cov + ridge * torch.eye(len(cov), dtype=cov.dtype), cross)  # r is about x @ slopes
        _, directions = torch.linalg.eigh(slopes.T @ cov @ slopes)  # of the predictions' covariance, ascending
        up = directions[:, -layer.rank :]
        down = (slopes @ up).T
        weight = up @ down
        bias = mean_r - weight @ mean_x
        explained = (2 * (cross * weight.T).sum() - (weight @ cov * weight).sum() + mean_r.square().sum()) * self.count
        scale = down.norm(dim=1).clamp(min=1e-12).sqrt()  # both factors of equal size: they are trained at one rate
        layer.down.weight.copy_((down / scale[:, None])[:, :, None, None])
        layer.up.weight.copy_((up * scale)[:, :, None, None])
        layer.up.bias.copy_(bias)  # type: ignore[union-attr]
        return float(explained) / self.added_squares if self.added_squares else 1.0


def new_layers(model: nn.Module) -> dict[str, LowRank]:
    """The low-rank layer at each place where one replaced a block and has neither been fitted nor trained."""
    found = {}
    for name in changes(model)[1]:
        for module in model.get_submodule(name).modules():
            if isinstance(module, LowRank) and not module.up.weight.any():
                found[name] = module
    return found


def _called(model: nn.Module, places: dict[str, LowRank], batch: Tensor) -> list[str]:
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


@contextmanager
def _passing(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Within it the inputs and outputs of the module's calls are collected."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = module.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    try:
        yield seen
    finally:
        handle.remove()
