"""timm's optimizers by name: which of them training can use, their arguments, and the state that they resume from."""

import copy
import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers

from ulsam.base.errors import UlsamError, first_line
from ulsam.training.setting_kinds import MOMENTUM

#: What `create_optimizer_v2` makes groups of parameters with, or what has a setting of its own.
_NOT_ARGUMENTS = set(inspect.signature(create_optimizer_v2).parameters) - {"foreach", "kwargs"}
_STATES = {"sgd": {"momentum_buffer"}, "adamw": {"step", "exp_avg", "exp_avg_sq"}}


def optimizer_names() -> list[str]:
    """The names that the setting ``opt`` takes.

    >>> {"sgd", "adamw", "lamb", "adan", "lion"} <= set(optimizer_names())
    True
    """
    return [name for name in list_optimizers() if _unusable(name) is None]


def check_optimizer(opt: str, opt_args: Mapping[str, Any], momentum: float) -> None:
    """Raise unless training can use an optimizer of timm with these arguments.

    Args:
        opt: its name.
        opt_args: its arguments, other than those that have settings of their own.
        momentum: 0 to 1, both excluded, for an optimizer that has one.

    Raises:
        UlsamError: an unknown name, an optimizer that needs another package or a second backward pass, or arguments
            that it does not take.

    >>> check_optimizer("lamb", {"betas": [0.9, 0.99]}, 0.9)
    >>> check_optimizer("lamp", {}, 0.9)
    Traceback (most recent call last):
    ulsam.base.errors.UlsamError: timm has no optimizer 'lamp'; nearest: lamb, lambw, lambc
    """
    if (alone := opt.lower().removeprefix("lookahead_")) != opt.lower():
        raise UlsamError(f"lookahead's averages are no part of a checkpoint: take {alone} alone")
    if opt not in list_optimizers():
        near = difflib.get_close_matches(opt.lower(), optimizer_names(), n=3)
        raise UlsamError(f"timm has no optimizer {opt!r}{'; nearest: ' + ', '.join(near) if near else ''}")
    if reason := _unusable(opt):
        raise UlsamError(f"the optimizer {opt} {reason}: take another one, such as sgd, adamw or lamb")
    info = get_optimizer_info(opt)
    if info.has_momentum and not 0 < momentum < 1:
        raise UlsamError(f"`momentum` must lie between 0 and 1, both excluded, not {momentum}")
    if not info.has_momentum and momentum != MOMENTUM:
        raise UlsamError(f"the optimizer {opt} takes no `momentum`: leave it out")
    dropped = {
        name for name in ("betas", "eps") if not getattr(info, f"has_{name}")
    }  # timm passes over them in silence
    for name in opt_args:
        if name in _NOT_ARGUMENTS:
            raise UlsamError(f"`opt_args` cannot hold {name}: it has a setting of its own, or none")
        if name in dropped:
            raise UlsamError(f"opt_args: the optimizer {opt} takes no {name}")
    try:
        weights = torch.nn.Parameter(torch.zeros(2, 2, 1, 1)), torch.nn.Parameter(torch.zeros(2))
        _stepped(make_optimizer([{"params": list(weights)}], opt, opt_args, lr=0.1, momentum=momentum))
    except Exception as error:  # whatever an optimizer raises at these arguments
        raise UlsamError(
            f"the optimizer {opt} does not take `opt_args` {dict(opt_args)}: {first_line(error)}"
        ) from error


def make_optimizer(
    groups: Sequence[dict[str, Any]], opt: str, opt_args: Mapping[str, Any], *, lr: float, momentum: float
) -> torch.optim.Optimizer:
    """timm's optimizer for groups of parameters, each with its own weight decay.

    >>> groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "weight_decay": 0.1}]
    >>> type(make_optimizer(groups, "lamb", {}, lr=0.01, momentum=0.9)).__name__
    'Lamb'
    """
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in opt_args.items()}
    return create_optimizer_v2(groups, opt=opt, lr=lr, weight_decay=0.0, momentum=momentum, **given)


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any], opt: str) -> None:
    """Give the optimizer its state; raises ValueError and what else the state of another one leads to.

    What the state of an optimizer looks like is seen in a copy of it, which makes one step.
    """
    before = after = optimizer.state_dict()["param_groups"]
    example = None if opt in _STATES else _stepped(copy.deepcopy(optimizer))
    if example is not None:
        after = example.state_dict()["param_groups"]
    for old, new, other in zip(before, after, saved["param_groups"], strict=True):
        counted = {name for name in new if new[name] != old.get(name)}  # as `step`, which some keep here
        names = (old.keys() | other.keys()) - counted - {"lr"}
        changed = [name for name in names if old.get(name) != other.get(name)]
        changed += [name for name in counted & other.keys() if type(other[name]) is not type(new[name])]
        if changed:
            raise ValueError(f"{min(changed)} of its optimizer is not that of {opt}")
    optimizer.load_state_dict(saved)
    states = {} if example is None else _states(example)
    for (place, parameter), state in zip(_parameters(optimizer), _states(optimizer).values(), strict=True):
        if not state:
            continue
        if example is None:
            fits = all(value.numel() == 1 or value.shape == parameter.shape for value in state.values())
            fits &= state.keys() == _STATES[opt]
        else:
            fits = {name: _shape(value) for name, value in state.items()} == {
                name: _shape(value) for name, value in states[place].items()
            }
        if not fits:
            raise ValueError(f"the state of its optimizer is not that of {opt}")


def _unusable(name: str) -> str | None:
    """Why training cannot use one of timm's optimizers; None where it can."""
    info = get_optimizer_info(name)
    if isinstance(info.opt_class, str):
        return f"needs the package {info.opt_class.partition('.')[0]}, which ulsam does not use"
    if info.second_order:
        return "needs a second backward pass"
    if info.opt_class.__name__ == "Kron":  # each process would draw its own numbers, and move its weights elsewhere
        return "draws random numbers in its steps"
    return None


def _stepped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer after a step with gradients of 0, of which PyTorch's hooks for every optimizer do not hear."""
    for _, parameter in _parameters(optimizer):
        parameter.grad = torch.zeros_like(parameter)
    with torch.no_grad():
        inspect.unwrap(type(optimizer).step)(optimizer)
    return optimizer


def _parameters(optimizer: torch.optim.Optimizer) -> list[tuple[int, torch.nn.Parameter]]:
    return list(enumerate(parameter for group in optimizer.param_groups for parameter in group["params"]))


def _states(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """The state of each parameter by its place; empty where it has none."""
    return {place: dict(optimizer.state.get(parameter, {})) for place, parameter in _parameters(optimizer)}


def _shape(value: Any) -> Any:
    """What the same value of another step has in common with this one."""
    return (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else type(value)
