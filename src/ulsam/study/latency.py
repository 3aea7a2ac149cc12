"""How long each arm's model takes for one image on this machine's CPU, measured side by side."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ulsam.base.provenance import processor, versions
from ulsam.base.timing import Timing, time_in_turn
from ulsam.model.build import build
from ulsam.model.spec import ModelSpec
from ulsam.surgery.fold import fold

MAX_TURNS = 200
SECONDS = 20.0  # for all arms together; a slow model takes longer, for its least turns


def measure(models: Mapping[str, tuple[nn.Module, Sequence[int]]]) -> dict[str, Timing]:
    """Time models, folded (`ulsam.fold`), on one image each, in turn, in shuffled order.

    Args:
        models: each with its input size C, H, W, by name; the first one is what the others are compared with.

    >>> model = torch.nn.Conv2d(3, 8, 3)
    >>> found = measure({"base": (model, (3, 32, 32)), "same": (model, (3, 32, 32))})
    >>> found["base"].ratio, 0.2 < found["same"].ratio < 5
    (1.0, True)
    """
    calls = {}
    for name, (model, size) in models.items():
        image = torch.randn(1, *size).contiguous(memory_format=torch.channels_last)
        calls[name] = functools.partial(fold(model, size), image)
    return time_in_turn(calls, SECONDS, MAX_TURNS)


def entry(specs: Mapping[str, ModelSpec], before: Mapping[str, Any] | None) -> dict[str, Any]:
    """Latencies as JSON, with machine and versions; ``before`` if it is of the same models on the same machine."""
    where = {**versions(), "processor": processor()}
    models = {name: spec.to_json() for name, spec in specs.items()}
    if before and (before["models"], before["where"]) == (models, where):
        return dict(before)
    found = measure({name: (build(spec)[0], spec.input_size) for name, spec in specs.items()})
    arms = {name: latency.to_json() for name, latency in found.items()}
    return {
        "what": "seconds of one image, folded model, CPU, float32, channels_last",
        "arms": arms,
        "models": models,
        "where": where,
    }
