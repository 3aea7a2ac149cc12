"""Train each new inverted residual, without labels, to do what the block did that it replaced."""

import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ulsam.base.errors import NotFinite, UlsamError, is_out_of_memory
from ulsam.base.eval_mode import eval_mode
from ulsam.base.logs import progress
from ulsam.layer.inverted_residual import InvertedResidual
from ulsam.surgery.edited import edited_blocks, put_back
from ulsam.surgery.kept_blocks import calls_of

STEPS, RATE = 500, 0.01  # of Adam; its rate falls to 0 as a cosine


@dataclasses.dataclass(frozen=True)
class ReconstructedLayer:
    """A reconstructed layer, and the share of what its block added to its input (sum of squares) that it gives."""

    name: str
    width: int
    explained: float


@torch.no_grad()
def reconstruct_layers(model: nn.Module, batches: Sequence[Tensor], *, steps: int = STEPS) -> list[ReconstructedLayer]:
    """Train each new :class:`ulsam.InvertedResidual` to output what the block that it replaced output.

    The layer, with the attention before it if there is any, is trained alone, with Adam on the mean square of the
    difference between the two outputs. Layers are reconstructed in the order in which the model calls them, each on
    what the layers before it output, towards what the model has there with all its blocks back; inserted layers stay.
    Nothing is random: the same model and images give the same weights. An error or Ctrl-C leaves a layer as it was.

    Args:
        model: an edited model whose blocks were trained before they were replaced; is changed in place.
        batches: images [B, C, H, W] as the model takes them, on its device; labels are not needed. A dozen batches of
            32 do. What goes into one layer and what its block output, of all of them, are in memory together.
        steps: of training for each layer, with a batch each.

    Returns:
        One entry a layer; none for layers that were reconstructed or trained before, or whose blocks have no weights,
        because they were not in the file that the model came from.

    Raises:
        UlsamError: no images, single ones whose map is one pixel at a layer, a model that outputs NaN or infinity, or
            a full memory.

    >>> import ulsam
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1))
    >>> model = ulsam.replace(model, "1", layer="inverted_residual", width=8, input_size=(3, 9, 9))
    >>> [found.name for found in reconstruct_layers(model, [torch.randn(32, 3, 9, 9)], steps=20)]
    ['1']
    >>> model[1].is_new
    False
    """
    batches = list_of_batches(batches)
    places = new_layers(model)
    if not places:
        return []
    with eval_mode(model), enough_memory():
        whole, found = put_back(copy.deepcopy(model)), []
        for name in [call.name for call in calls_of(model, batches[0]) if call.name in places]:
            found += reconstruct_layer(model, whole, name, batches, steps=steps)
    return found


def reconstruct_layer(
    model: nn.Module, original: nn.Module, name: str, batches: Sequence[Tensor], *, steps: int = STEPS
) -> list[ReconstructedLayer]:
    """Reconstruct the layer at one place, if it is new, as :func:`reconstruct_layers`; ``original`` has all blocks."""
    layer = model.get_submodule(name)
    if not _has_new(layer):
        return []
    given, wanted = passing(model, name, batches)[0], passing(original, name, batches)[1]
    return [ReconstructedLayer(name, _residual_of(layer).width, _regress(layer, name, given, wanted, steps))]


@torch.no_grad()
def reconstruct_each(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Tensor], *, steps: int = STEPS
) -> list[ReconstructedLayer]:
    """Fit layers that are to replace blocks of ``model``, each as if it were the only one; ``model`` stays as it is.

    Args:
        model: whose blocks are trained, in eval mode.
        layers: by the name of the block that each is to replace, in eval mode and on the device of ``model``; those
            without a new :class:`ulsam.InvertedResidual` are left out.
        batches, steps: as for :func:`reconstruct_layers`, and so are the result and the errors.
    """
    batches, found = list_of_batches(batches), []
    with enough_memory():
        for name, layer in layers.items():
            if _has_new(layer):
                explained = _regress(layer, name, *passing(model, name, batches), steps)
                found.append(ReconstructedLayer(name, _residual_of(layer).width, explained))
    return found


@contextmanager
def enough_memory() -> Iterator[None]:
    """Within it a full memory is an error that the user can fix."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UlsamError("the memory is full: reconstruct on fewer images (`reconstruct_images`)") from error


def list_of_batches(batches: Sequence[Tensor]) -> list[Tensor]:
    """The batches as a list; raises where there are none, or one is no batch of images alone."""
    if isinstance(batches, Tensor):
        raise UlsamError("batches is a list of images [B, C, H, W] each, not one tensor")
    batches = list(batches)
    for batch in batches:
        if not isinstance(batch, Tensor):
            raise UlsamError(
                f"batches is a list of images [B, C, H, W] each, a tensor, not of {type(batch).__name__}: of a "
                "DataLoader of images and labels, [images for images, _ in loader]"
            )
        if not batch.is_floating_point() or not len(batch):
            raise UlsamError(
                f"a batch is {str(batch.dtype).removeprefix('torch.')} {list(batch.shape)}: give one image or more, as "
                "floating-point numbers that the model takes"
            )
    if not batches:
        raise UlsamError("no images to reconstruct the layers on")
    return batches


def _regress(layer: nn.Module, name: str, given: Sequence[Tensor], wanted: Sequence[Tensor], steps: int) -> float:
    """Train ``layer`` to make ``wanted`` of ``given``, batches [B, C, H, W]; the share of the difference it gives.

    It changes at the end alone: a copy is trained, in float32, whatever the layer's dtype and whether it is frozen.
    """
    pairs = [(x.float(), y.float()) for x, y in zip(given, wanted, strict=True)]
    values = sum(x.numel() for x, _ in pairs)
    added = float(sum((y - x).square().sum() for x, y in pairs)) / values
    if not math.isfinite(added):
        raise NotFinite(f"the model outputs NaN or infinity at {name}: its weights are broken, or not for such images")
    if not added:
        return 1.0
    spread = [pair for pair in pairs if pair[0][:, 0].numel() > 1]  # BatchNorm takes no single value
    if not spread:
        raise UlsamError(
            f"{name} cannot be reconstructed on one image at a time, whose map is one pixel there: give more"
        )
    copied = copy.deepcopy(layer).float().train().requires_grad_(True)
    optimizer = torch.optim.Adam(copied.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for step in progress(range(steps), desc=f"reconstruct {name}", unit="step"):
            x, y = spread[step % len(spread)]
            loss = F.mse_loss(copied(x), y) / added
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    copied.eval()
    left = float(sum((y - copied(x)).square().sum() for x, y in pairs)) / values
    if not math.isfinite(left):
        raise NotFinite(f"reconstructing the layer at {name} diverged: give other images")
    layer.load_state_dict(copied.state_dict())
    return 1 - left / added


def new_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with a narrow inverted residual, still as made, that replaced a block which has weights; by place."""
    places = {name: model.get_submodule(name) for name in edited_blocks(model)}
    return {name: place for name, place in places.items() if _has_new(place)}


def _has_new(layer: nn.Module) -> bool:
    return any(isinstance(module, InvertedResidual) and module.is_new for module in layer.modules())


def _residual_of(layer: nn.Module) -> InvertedResidual:
    return next(module for module in layer.modules() if isinstance(module, InvertedResidual))


def passing(model: nn.Module, name: str, batches: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """What goes into the module of this name and what it outputs, for each batch.

    Both are copies, as the module and later ones may change them in place. What comes behind it is not computed.
    """
    given, wanted = [], []

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        given.append(args[0].clone())

    def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        wanted.append(output.clone())
        raise _StopForward

    module = model.get_submodule(name)
    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        for batch in batches:
            with suppress(_StopForward):
                model(batch.clone())
    finally:
        for handle in handles:
            handle.remove()
    return given, wanted


class _StopForward(Exception):
    """Ends a pass through a model whose rest is of no use."""
