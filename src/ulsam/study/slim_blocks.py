"""The blocks of a model that can be replaced, what each of them saves, and the model with any set of them replaced."""

import copy
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ulsam.base.errors import UlsamError
from ulsam.study.slim_budget import edit_of
from ulsam.study.slim_result import BlockEntry
from ulsam.surgery.cost import cost
from ulsam.surgery.find import Candidate, candidates
from ulsam.surgery.places import At, layer_names, match
from ulsam.surgery.reconstruct_layers import ReconstructedLayer, reconstruct_each
from ulsam.surgery.trace import trace


@dataclass(frozen=True)
class Block:
    """A block that can be replaced; ``params`` and ``macs`` are what exactly this saves, those of the new layer off."""

    name: str
    number: int | None  # the paper's layer number, where the model has these
    type: str
    shape: tuple[int, int, int]  # C, H, W
    params: int
    macs: int

    @property
    def place(self) -> str:
        """What an edit calls it: its number, else its name."""
        return self.name if self.number is None else str(self.number)

    def entry(self) -> BlockEntry:
        """As JSON.

        >>> Block("blocks.5.2", 16, "InvertedResidual", (56, 2, 2), 9_000, 36_000).entry()["place"]
        '16'
        """
        return {
            "name": self.name,
            "number": self.number,
            "type": self.type,
            "shape": [*self.shape],
            "params": self.params,
            "macs": self.macs,
            "place": self.place,
        }


class SwitchableModel:
    """A model of which any set of blocks can be replaced for the time being.

    The new layers are made once, with the same weights for the same seed, whatever is replaced together.

    Args:
        model: is changed by :meth:`replaced`, and is as it was afterwards.
        blocks: names of modules, none inside another.
        layer: what replaces them: keyword arguments of :class:`ulsam.Edit`, such as ``groups`` or ``layer``; the
            layer "none" removes them.
        input_size: C, H, W.
        seed: of the new layers' weights.

    >>> import timm
    >>> model = timm.create_model("mobilenetv2_035")
    >>> switched = SwitchableModel(model, ["blocks.4.2", "blocks.5.2"], {}, (3, 64, 64))
    >>> with switched.replaced(["blocks.5.2"]):
    ...     type(model.blocks[4][2]).__name__, type(model.blocks[5][2]).__name__
    ('InvertedResidual', 'ULSAM')
    >>> type(model.blocks[5][2]).__name__
    'InvertedResidual'
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[str],
        layer: dict[str, Any],
        input_size: tuple[int, int, int],
        seed: int = 0,
    ) -> None:
        self.model = model
        self.old = {name: model.get_submodule(name) for name in blocks}
        self._layer, self._input_size = layer, input_size
        edited = copy.deepcopy(model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            edit_of(blocks, layer).apply(edited, input_size)
        self.new = {name: edited.get_submodule(name) for name in blocks}
        for module in self.new.values():
            del vars(module)["replaced_module"]  # a copy of the old block

    def reconstruct(self, batches: Sequence[Tensor]) -> list[ReconstructedLayer]:
        """Reconstruct the new layers that can be from the blocks which they are to replace, each alone.

        Args:
            batches: images [B, C, H, W], on any device; model and layers follow.

        Returns:
            One entry a layer that was reconstructed.
        """
        for module in (self.model, *self.new.values()):  # timing may have taken the model to the CPU
            module.to(batches[0].device)
        return reconstruct_each(self.model, self.new, batches)

    def edited(self, blocks: Sequence[str], device: torch.device) -> nn.Module:
        """A copy of the model in which these blocks are replaced for good: an edited model, which knows its blocks."""
        for module in (self.model, *self.new.values()):  # timing leaves them on the CPU
            module.to(device)
        model = copy.deepcopy(self.model)
        with torch.random.fork_rng(devices=[]):
            edit_of(blocks, self._layer).apply(model, self._input_size)
        for name in blocks:
            model.get_submodule(name).load_state_dict(self.new[name].state_dict())
        return model

    @contextmanager
    def replaced(self, blocks: Collection[str]) -> Iterator[nn.Module]:
        """Within it these blocks of the model are replaced."""
        try:
            for name in blocks:
                self.model.set_submodule(name, self.new[name])
            yield self.model
        finally:
            for name in blocks:
                self.model.set_submodule(name, self.old[name])


def find_blocks(
    model: nn.Module, input_size: tuple[int, int, int], layer: dict[str, Any], at: At | None = None, seed: int = 0
) -> tuple[list[Block], SwitchableModel, list[str]]:
    """The blocks that ``layer`` can replace, the model in which they are, and a line about each one that is left out.

    Without ``at`` these are the residual blocks; of a model without any, the outermost candidates
    (`ulsam.candidates`), where an `nn.Sequential` counts as what it holds. A block is residual if it has a shortcut:
    with all of its weights at zero it hands on a map of positive values unchanged.

    Args:
        model: on the CPU.
        input_size: C, H, W.
        layer, seed: as for :class:`SwitchableModel`.
        at: names, globs or layer numbers of the blocks to choose from; also of single convolutions.

    Raises:
        UlsamError: there is no such block, one of ``at`` is no candidate or lies inside another, or what the blocks
            save does not add up, because they share parameters.

    >>> import timm
    >>> found, _, _ = find_blocks(timm.create_model("resnet18"), (3, 64, 64), {})
    >>> [block.name for block in found]
    ['layer1.0', 'layer1.1', 'layer2.1', 'layer3.1', 'layer4.1']
    """
    every = {candidate.name: candidate for candidate in candidates(model, input_size, leaves=at is not None)}
    names = _outermost(model, every) if at is None else _named(model, every, at)
    groups = edit_of(["any"], layer).groups
    fitting = [name for name in names if groups is None or groups in every[name].groups]
    notes = [
        f"{name} is left out: {groups} groups do not divide its {every[name].shape[0]} channels"
        for name in names
        if name not in fitting
    ]
    if not fitting:
        why = f": {notes[0]}" if notes else " that takes and outputs the same feature map [B, C, H, W]"
        if not notes and candidates(model, input_size, leaves=True):
            why += " (single convolutions: name them by `at`)"
        raise UlsamError(f"this {type(model).__name__} has no block to replace{why}")
    switched = SwitchableModel(model, fitting, layer, input_size, seed)
    numbers = {name: number for number, name in layer_names(model).items()}
    with switched.replaced(fitting):
        flows, after = trace(model, input_size), cost(model, input_size)
    blocks = []
    for name in fitting:
        block, layer_params = every[name], sum(part.numel() for part in switched.new[name].parameters())
        channels, height, width = block.shape
        params = block.params + 2 * channels - layer_params  # a candidate's figures are for ULSAM in its plain form
        macs = block.macs + 2 * channels * height * width - flows[name].macs
        blocks.append(Block(name, numbers.get(name), block.type, block.shape, params, macs))
    before = cost(model, input_size)
    together = before.params - after.params, before.macs - after.macs
    if together != (sum(block.params for block in blocks), sum(block.macs for block in blocks)):
        raise UlsamError("what the blocks of this model save does not add up: they share parameters")
    return blocks, switched, notes


def _outermost(model: nn.Module, every: dict[str, Candidate]) -> list[str]:
    residual = [name for name in every if _is_residual(model.get_submodule(name), every[name])]
    if residual:  # the innermost of them: a stage of residual blocks is one too
        return [name for name in residual if not any(other.startswith(f"{name}.") for other in residual)]
    plain = [name for name in every if type(model.get_submodule(name)).forward is not nn.Sequential.forward]
    return [name for name in plain if not any(name.startswith(f"{other}.") for other in plain)]


@torch.no_grad()
def _is_residual(module: nn.Module, candidate: Candidate) -> bool:
    zeroed = copy.deepcopy(module).eval()
    for parameter in zeroed.parameters():
        parameter.zero_()
    x = torch.linspace(0.5, 1.5, candidate.shape[0] * candidate.shape[1] * candidate.shape[2]).view(1, *candidate.shape)
    return torch.allclose(zeroed(x), x)


def _named(model: nn.Module, every: dict[str, Candidate], at: At) -> list[str]:
    names = match(model, at)
    for name in names:
        if name not in every:
            raise UlsamError(f"{name} cannot be replaced: `ulsam candidates` lists the blocks that can")
        if inner := next((other for other in names if other.startswith(f"{name}.")), None):
            raise UlsamError(f"{inner} lies inside {name}: name only one of them")
    return names
