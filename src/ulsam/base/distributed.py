"""One process or several under torchrun: who am I, and sums over all."""

import contextlib
import datetime
import os
import re
import shlex
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ulsam.base.errors import LostProcess, UlsamError, first_line


@dataclass(frozen=True)
class World:
    """This process among all: ``rank`` of ``size``, on ``device``."""

    rank: int
    size: int
    device: torch.device

    @property
    def writes(self) -> bool:
        """Whether this is the one process that prints and writes files."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over all processes; counts stay exact in integers and float64."""
        if self.size > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values

    def agree(self, tensors: Iterable[Tensor]) -> None:
        """Give all processes the first one's values, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def launch_line(words: Sequence[str]) -> str:
    """How a person starts ``ulsam`` with these words in as many processes as there are now.

    >>> launch_line(["train", "--resume", "my run"])
    "ulsam train --resume 'my run'"
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if size == 1:
        return shlex.join(["ulsam", *words])
    machines = ["--nnodes", str(size // here)] if size > here else []
    return shlex.join(["torchrun", *machines, "--nproc-per-node", str(here), "-m", "ulsam", *words])


def device_of(name: str) -> torch.device:
    """The device of this name, which is there; of ``auto``, a GPU where there is one.

    Raises:
        UlsamError: it is not there.

    >>> device_of("cpu")
    device(type='cpu')
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(name)
    except RuntimeError as error:
        raise UlsamError(
            f"no device {name!r} here; use `device=cpu`, cuda, mps or xpu; those of other engines are for an exported "
            "model, NAME.onnx"
        ) from error
    try:
        torch.empty(1, device=place).item()  # fails on a device that computes nothing, too
    except NotImplementedError as error:
        raise UlsamError(f"no device {name!r} here: this PyTorch has none; use `device=cpu`") from error
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UlsamError(f"no device {name!r} here: {first_line(error).split('. ')[0]}; use `device=cpu`") from error
    return place


@contextlib.contextmanager
def start(device: str = "auto") -> Iterator[World]:
    """Join the processes that torchrun started (by its environment variables), or be the only one.

    Afterwards PyTorch's current CUDA device is the one that it was.

    Args:
        device: ``auto`` (a GPU where there is one), ``cpu``, ``cuda``, ``mps`` or what else torch knows.

    Raises:
        UlsamError: the device is not there.

    >>> with start("cpu") as world:
    ...     world.rank, world.size
    (0, 1)
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    place = device_of(device)
    if str(place) == "cuda" and size > 1:
        place = device_of(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    with torch.cuda.device(place) if place.type == "cuda" else contextlib.nullcontext():
        yield from _joined(rank, size, place)


def _joined(rank: int, size: int, place: torch.device) -> Iterator[World]:
    if size == 1:
        yield World(0, 1, place)
        return
    from torch.distributed.rendezvous import rendezvous  # which not every build of PyTorch has

    patience = datetime.timedelta(minutes=30)
    store = next(rendezvous("env://", timeout=patience))[0]
    dist.init_process_group(
        "nccl" if place.type == "cuda" else "gloo", store=store, rank=rank, world_size=size, timeout=patience
    )
    try:
        with lost_processes():
            yield World(rank, size, place)
    except LostProcess as lost:
        lost.reports = _is_first(store, rank)
        raise
    except UlsamError:
        if rank:
            time.sleep(5)  # the first process reports what all have met; torchrun then ends the others before they do
        raise
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def lost_processes() -> Iterator[None]:
    """Within it the end of another process, on which this one waits, is one line.

    Raises:
        LostProcess: it is gone.
    """
    try:
        yield
    except RuntimeError as error:
        among_others = dist.is_available() and dist.is_initialized()
        if not among_others or not (isinstance(error, dist.DistError) or re.search(r"[\\/]gloo[\\/]", str(error))):
            raise
        raise LostProcess(
            f"one of the {dist.get_world_size()} processes is gone or does not answer (killed? memory full?): "
            "what is saved is whole"
        ) from error


def _is_first(store: Any, rank: int) -> bool:
    """Whether no other process has asked; where the first process kept the store and is gone, the second one is it."""
    try:
        return bool(store.add("ulsam: lost", 1) == 1)
    except RuntimeError:
        return rank == 1
