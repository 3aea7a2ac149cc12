"""A model for inference: BatchNorm folded into the convolutions before it, in the layout that is fastest."""

import copy
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from itertools import chain
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_leaves

from ulsam.base.errors import UlsamError, first_line
from ulsam.layer.ulsam import ULSAM
from ulsam.surgery.edited import is_followed
from ulsam.surgery.trace import cannot_run, check_initialized, default_input_size, in_place_changes

ItemT = TypeVar("ItemT")
ConvNorm = tuple[nn.Conv2d, nn.BatchNorm2d]
Folded = Mapping[nn.Module, nn.Module]
"""Modules of the model, and what stands in their places once they are folded."""

_running = threading.RLock()  # the random numbers and the stance towards compiled code are the whole process's


@torch.inference_mode(False)
@torch.no_grad()
def fold(model: nn.Module, input_size: Sequence[int] | None = None, *, channels_last: bool = True) -> nn.Module:
    """A copy of ``model`` for inference, with the same outputs to 1e-4: fewer layers, no BatchNorm that can be folded.

    A BatchNorm2d (also timm's with an activation in it) is folded into the convolution before it. This takes a
    convolution whose output goes into that BatchNorm and nowhere else. Convolutions and BatchNorms with hooks or
    parametrizations stay as they are. Pruned and normalized weights (`torch.nn.utils.prune`, the older
    `torch.nn.utils.weight_norm`) become ordinary ones first. Released ULSAM layers are folded too.

    The copy is checked against ``model`` on two random images: what would change the outputs is left unfolded. A model
    that amplifies the rounding of float32 past 1e-4 is checked in float64. The copy is in eval mode and cannot be
    trained well; ``model`` is left as it is.

    Args:
        model: any `nn.Module` on one image [B, C, H, W], on any device.
        input_size: C, H, W of the images with which the model is traced; by default
            `ulsam.surgery.trace.default_input_size`.
        channels_last: the memory layout of the convolutions' weights; maps follow it.

    Raises:
        UlsamError: the model cannot be copied, does not run on such images, outputs no tensor, or does not run in
            channels_last.

    >>> import timm
    >>> model = timm.create_model("mobilenetv1_100").eval()
    >>> folded = fold(model, (3, 64, 64))
    >>> any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    False
    """
    check_initialized(model)
    size = tuple(input_size or default_input_size(model))
    like = next((one for one in model.parameters() if one.is_floating_point()), torch.empty(0))
    exact = torch.promote_types(like.dtype, torch.float32)
    try:
        return _fold(model, size, like, exact, channels_last)
    except UlsamError as error:
        if exact == torch.float64:
            raise
        try:
            folded, x = _fold(model, size, like, torch.float64, channels_last), like.new_zeros(1, *size)
            wanted, got = ([one.dtype for one in _run(one, x)] for one in (plain_copy(model).eval(), folded))
        except Exception:  # the same, an operator or a device without float64, or code that kept a float64 tensor
            raise error from None
        if got != wanted:  # it kept one
            raise
        return folded


def _fold(model: nn.Module, size: Sequence[int], like: Tensor, exact: torch.dtype, channels_last: bool) -> nn.Module:
    """Fold in the dtype ``exact``; the copy has the model's dtypes."""
    folded = plain_copy(model).eval()
    for module in folded.modules():
        _make_ordinary(module)
    dtypes = {name: tensor.dtype for name, tensor in _tensors(folded)}
    _cast(folded, lambda _: exact)
    x = torch.randn(2, *size, generator=torch.Generator().manual_seed(0)).to(like.device, exact)
    try:
        pairs, expected = _pairs(folded, x)
    except Exception as error:  # of the model's own code
        raise cannot_run(model, size, error, given=True) from error
    if not expected:
        raise UlsamError(f"this {type(model).__name__} outputs no tensor, so folding cannot be checked")
    if channels_last:
        for _, tensor in _tensors(folded):
            if tensor.ndim == 4:
                tensor.data = tensor.data.to(memory_format=torch.channels_last)
    is_random = not _repeats(folded, x, expected, channels_last)
    for step in _steps(folded, x, expected, pairs, is_random):
        folded = _swap(folded, step)
    # a bias that folding made has no dtype of its own yet: it gets its weight's
    _cast(folded, lambda name: dtypes.get(name, dtypes.get(name.rpartition(".")[0] + ".weight", like.dtype)))
    return folded


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` that inference mode and autograd have left no trace on: every tensor of it is a leaf.

    Call it outside inference mode.

    Raises:
        UlsamError: something in the model cannot be copied.

    >>> with torch.inference_mode():
    ...     model = nn.Linear(3, 2)
    >>> model.weight.is_inference(), plain_copy(model).weight.is_inference()
    (True, False)
    """
    memo: dict[int, Any] = {}
    modules, seen = [model], {model}
    while modules:
        for value in tree_leaves(vars(modules.pop())):
            if isinstance(value, nn.Module) and value not in seen:  # also one that an edit put aside
                modules.append(value)
                seen.add(value)
            elif isinstance(value, Tensor) and (value.is_inference() or not value.is_leaf):
                plain = value.detach().clone()
                is_parameter = isinstance(value, nn.Parameter)
                memo[id(value)] = nn.Parameter(plain, value.requires_grad) if is_parameter else plain
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # of whatever the model holds
        raise UlsamError(f"this {type(model).__name__} cannot be copied: {first_line(error)}") from error


def has_inference_tensors(model: nn.Module) -> bool:
    """Whether the model was made or loaded in inference mode, so that autograd cannot use it.

    >>> has_inference_tensors(nn.Linear(3, 2))
    False
    """
    return any(tensor.is_inference() for _, tensor in _tensors(model))


def _make_ordinary(module: nn.Module) -> None:
    """Make ordinary parameters of those that a hook computes before each call: pruned or normalized ones."""
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)
        elif isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers, under all of their names."""
    return chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))


def _cast(model: nn.Module, dtype: Callable[[str], torch.dtype]) -> None:
    """Cast each parameter and buffer of real numbers to the dtype that its name gets."""
    for name, tensor in _tensors(model):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype(name))


def _pairs(model: nn.Module, x: Tensor) -> tuple[list[ConvNorm], list[Tensor]]:
    """What can be folded as far as the modules show, and what the model outputs.

    The convolution's output is the BatchNorm's input, and both run once.
    """
    made: dict[int, tuple[Tensor, int, nn.Conv2d]] = {}  # a convolution's output and its version, by id
    pairs: list[ConvNorm] = []
    calls: Counter[nn.Module] = Counter()

    def after(conv: nn.Module, _: Any, output: Any) -> None:
        calls[conv] += 1
        if isinstance(output, Tensor):  # kept, so that its id is not given twice
            made[id(output)] = (output, in_place_changes(output), cast(nn.Conv2d, conv))

    def before(norm: nn.Module, args: tuple[Any, ...]) -> None:
        calls[norm] += 1
        if args and id(args[0]) in made:
            output, version, conv = made[id(args[0])]
            if in_place_changes(output) == version:  # not changed in place
                pairs.append((conv, cast(nn.BatchNorm2d, norm)))

    of_layers = {child for module in model.modules() if isinstance(module, ULSAM) for child in module.children()}
    handles = []
    for module in model.modules():
        if module in of_layers or not _is_plain(module):
            continue
        if isinstance(module, nn.Conv2d) and not is_followed(module):
            handles.append(module.register_forward_hook(after))
        elif isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            handles.append(module.register_forward_pre_hook(before))
    try:
        expected = _run(model, x)
    finally:
        for handle in handles:
            handle.remove()
    uses = Counter(conv for conv, _ in pairs)
    return [pair for pair in pairs if calls[pair[0]] == calls[pair[1]] == uses[pair[0]] == 1], expected


def _is_plain(module: nn.Module) -> bool:
    """Whether the module is in eval mode, and calling it does what its class says."""
    own = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return not (module.training or own or parametrize.is_parametrized(module))


def _repeats(model: nn.Module, x: Tensor, expected: Sequence[Tensor], channels_last: bool) -> bool:
    """Whether the model, in the layout that it is in by now, gives the outputs that it gave; a random one does not.

    Raises:
        UlsamError: it fails, or gives others that do not depend on the random numbers: it cannot do with the layout.
    """
    name = type(model).__name__
    try:
        found = _run(model, x)
        same = _agree(expected, found)
        is_random = not same and not _agree(found, _run(model, x, seed=1))
    except Exception as error:  # of the model's own code
        if not channels_last:
            raise
        raise UlsamError(
            f"this {name} fails in channels_last: {first_line(error)}; pass channels_last=False"
        ) from error
    if channels_last and not (same or is_random):
        raise UlsamError(f"this {name} outputs something else in channels_last; pass channels_last=False")
    return same


def _steps(
    model: nn.Module, x: Tensor, expected: Sequence[Tensor], pairs: Sequence[ConvNorm], is_random: bool
) -> list[Folded]:
    """The ways of folding parts of the model that keep what it outputs.

    There are two tests. With NaN instead of a convolution's output wherever another than its BatchNorm looks at it, no
    new NaN may come out: this finds a use however little it weighs on these images. Then the folded model is compared
    with the model, unless that is random: this finds code that uses the modules' weights.
    """

    def are_hidden(some: Sequence[ConvNorm]) -> bool:
        with _poisoned(some):
            return _gives(model, x, expected, values=False)

    def are_exact(some: Sequence[Folded]) -> bool:
        with _swapped(model, some) as folded:
            return _gives(folded, x, expected, values=not is_random)

    steps: list[Folded] = []
    for conv, norm in _most(pairs, are_hidden):
        steps.append({conv: fuse_conv_bn_eval(conv, norm), norm: _rest(norm)})
    for module in model.modules():
        if isinstance(module, ULSAM) and module.form == "released" and all(map(_is_plain, module.children())):
            steps.append({module: module.fold()})
    return _most(steps, are_exact)


def _most(
    items: Sequence[ItemT], are_good: Callable[[Sequence[ItemT]], bool], kept: Sequence[ItemT] = ()
) -> list[ItemT]:
    """``kept`` and as many of the items as are good together: all in one test if they are, else found by halving."""
    if not items or are_good([*kept, *items]):
        return [*kept, *items]
    if len(items) < 2:
        return list(kept)
    half = len(items) // 2
    return _most(items[half:], are_good, _most(items[:half], are_good, kept))


@contextmanager
def _poisoned(pairs: Sequence[ConvNorm]) -> Iterator[None]:
    """Within it every BatchNorm gets its convolution's output, and all others get NaN."""
    outputs: dict[nn.Module, Tensor] = {}

    def hide(conv: nn.Module, _: Any, output: Tensor) -> Tensor:
        outputs[conv] = output
        return torch.full_like(output, torch.nan)

    handles = []
    for conv, norm in pairs:
        handles.append(conv.register_forward_hook(hide))
        handles.append(norm.register_forward_pre_hook(lambda _norm, _args, conv=conv: (outputs[conv],)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _swapped(model: nn.Module, steps: Sequence[Folded]) -> Iterator[nn.Module]:
    """The model with the steps taken; afterwards they are undone."""
    whole = model
    for step in steps:
        whole = _swap(whole, step)
    try:
        yield whole
    finally:
        for step in reversed(steps):
            _swap(whole, {new: old for old, new in step.items()})


def _swap(model: nn.Module, step: Folded) -> nn.Module:
    """Put the new modules where the old ones are, under all of their names; the model, or what stands in its place."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in step:
                parent._modules[name] = step[child]
    return step.get(model, model)


def _rest(norm: nn.BatchNorm2d) -> nn.Module:
    """What is left of a folded BatchNorm: of timm's what it does behind the norm, and an inserted layer."""
    children, order = dict(norm.named_children()), ["drop", "act", "ulsam"]
    rest = OrderedDict((name, children[name]) for name in order if name in children)
    return nn.Sequential(rest) if rest else nn.Identity()


def _run(model: nn.Module, x: Tensor, seed: int = 0) -> list[Tensor]:
    """Copies of the tensors that the model outputs, eagerly: compiled code would not see the hooks and swaps."""
    gpus = [x.device] if x.is_cuda else []
    with _running, torch.random.fork_rng(gpus), torch.compiler.set_stance("force_eager"):
        torch.manual_seed(seed)
        return [tensor.clone() for tensor in _tensors_in(model(x.clone()))]


def _gives(model: nn.Module, x: Tensor, expected: Sequence[Tensor], *, values: bool) -> bool:
    """Whether the model runs and its outputs agree with the expected ones."""
    try:
        return _agree(expected, _run(model, x), values=values)
    except Exception:  # of the model's own code, which meets NaN, or no BatchNorm where it looks for one
        return False


def _agree(expected: Sequence[Tensor], actual: Sequence[Tensor], *, values: bool = True) -> bool:
    """Whether these are of the same shapes, with NaN in the same places; and of the same values to 1e-4."""
    if [one.shape for one in expected] != [one.shape for one in actual]:
        return False
    return all(
        torch.equal(before.isnan(), after.isnan()) and (not values or _is_close(before, after))
        for before, after in zip(expected, actual, strict=True)
    )


def _is_close(before: Tensor, after: Tensor) -> bool:
    if not (before.is_floating_point() or before.is_complex()):
        return torch.equal(before, after)
    largest = float(before.nan_to_num(0, 0, 0).abs().max()) if before.numel() else 0.0
    return torch.allclose(before, after, rtol=1e-4, atol=1e-4 * largest, equal_nan=True)


def _tensors_in(output: Any) -> list[Tensor]:
    """All tensors in what a model outputs: one, or a nest of lists, tuples, dicts and dataclasses."""
    if isinstance(output, Tensor):
        return [output]
    if is_dataclass(output) and not isinstance(output, type):
        output = [getattr(output, field.name) for field in fields(output)]
    if not isinstance(output, Mapping | list | tuple):
        return []
    return [
        tensor
        for value in (output.values() if isinstance(output, Mapping) else output)
        for tensor in _tensors_in(value)
    ]
