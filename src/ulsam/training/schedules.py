"""Schedules of the learning rate by timm's names, each a function of the number of updates alone."""

import math
from collections.abc import Callable
from typing import Any

import torch
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler, TanhLRScheduler
from timm.scheduler.scheduler import Scheduler

from ulsam.training.config import TrainConfig

_FALLING: dict[str, Callable[..., Scheduler]] = {
    "cosine": CosineLRScheduler,
    "tanh": TanhLRScheduler,
    "poly": PolyLRScheduler,
}


def schedule_of(config: TrainConfig, optimizer: torch.optim.Optimizer, epoch_updates: int) -> Scheduler:
    """timm's schedule with linear warm-up from 0; ``step_update(n)`` sets the rate of the n-th update, from 1 on.

    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    >>> config = TrainConfig("birds", sched="multistep", decay_milestones=[1], warmup_epochs=0, lr=0.1)
    >>> schedule = schedule_of(config, optimizer, epoch_updates=2)
    >>> for update in (1, 2, 3):
    ...     schedule.step_update(update)
    ...     print(f"{optimizer.param_groups[0]['lr']:.2f}")
    0.10
    0.10
    0.01
    """
    shared: dict[str, Any] = {"warmup_t": round(config.warmup_epochs * epoch_updates), "t_in_epochs": False}
    if config.sched in _FALLING:
        power = {"power": 1.0 if config.decay_rate is None else config.decay_rate} if config.sched == "poly" else {}
        return _FALLING[config.sched](
            optimizer, t_initial=config.epochs * epoch_updates + 1, lr_min=config.min_lr, **power, **shared
        )
    milestones = list(config.decay_milestones)
    if config.sched == "step":
        every = config.decay_epochs or math.ceil(config.epochs / 3)
        milestones = list(range(every, config.epochs, every))
    # timm takes a milestone m as reached at m - 1, and the updates here count from 1
    reached = [round(epoch * epoch_updates) + 2 for epoch in milestones]
    rate = 0.1 if config.decay_rate is None else config.decay_rate
    return MultiStepLRScheduler(optimizer, decay_t=reached, decay_rate=rate, warmup_prefix=False, **shared)
