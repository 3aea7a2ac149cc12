"""New models whose outputs depend on all their blocks."""

from typing import TypeVar

import torch
from torch import nn

ModelT = TypeVar("ModelT", bound=nn.Module)


def calibrated(model: ModelT, size: int = 64) -> ModelT:
    """Sets the BatchNorms to the statistics of noise: features of new weights fade out without; in eval mode."""
    norms = [module for module in model.eval().modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    with torch.no_grad():
        model(torch.rand(4, 3, size, size))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum
    return model
