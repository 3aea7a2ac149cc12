"""Where an edit goes: module names, globs, and the paper's layer numbers."""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import cast

from torch import nn

from ulsam.base.errors import UlsamError
from ulsam.surgery.layer_host import host_class

At = str | int | Sequence[str | int]


def layer_names(model: nn.Module) -> dict[int, str]:
    """The paper's layer numbers of a MobileNet-V1 or V2: 1 is the stem, then one a block; empty for any other model.

    Knows timm's and torchvision's models, at any width, edited or not.

    >>> import timm
    >>> layer_names(timm.create_model("mobilenetv2_100"))[17]
    'blocks.5.2'
    """
    if type(model).__name__ == "MobileNetV2" and len(getattr(model, "features", ())) == 19:
        return {n + 1: f"features.{n}" for n in range(18)}
    stages = getattr(model, "blocks", None)
    if not hasattr(model, "conv_stem") or not isinstance(stages, nn.Sequential):
        return {}
    lengths = tuple(len(stage._modules) for stage in stages)
    kinds = {host_class(original(block)).__name__ for stage in stages for block in stage.children()}
    layouts = {
        (1, 2, 2, 6, 2): {"DepthwiseSeparableConv"},
        (1, 2, 3, 4, 3, 3, 1): {"DepthwiseSeparableConv", "InvertedResidual"},
    }
    if layouts.get(lengths) != kinds:
        return {}
    names = [f"blocks.{stage}.{block}" for stage, length in enumerate(lengths) for block in range(length)]
    return {1: "conv_stem", **{n: name for n, name in enumerate(names, start=2)}}


def paper_places(model: nn.Module) -> dict[str, str]:
    """Where attention layers can be, in the paper's numbers by module name: "17" in a layer's place, "17:1" behind it.

    Of a layer with a narrow inverted residual behind it, the attention is the first part. Empty where
    :func:`layer_names` is.

    >>> import timm
    >>> places = paper_places(timm.create_model("mobilenetv2_100"))
    >>> places["blocks.5.2"], places["blocks.5.2.ulsam"], places["blocks.5.2.0"]
    ('17', '17:1', '17')
    """
    numbers = layer_names(model).items()
    places = {name: str(n) for n, name in numbers} | {f"{name}.ulsam": f"{n}:1" for n, name in numbers}
    return places | {f"{name}.0": place for name, place in places.items()}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile` or DataParallel, or ``model`` itself.

    Raises:
        UlsamError: it is DistributedDataParallel, whose reducer knows the parameters that were there when it was made.

    >>> model = nn.Sequential(nn.ReLU())
    >>> unwrapped(nn.DataParallel(model)) is model
    True
    """
    if not isinstance(model, nn.Module):
        hint = "; ulsam.load gives (model, spec)" if isinstance(model, tuple) else ""
        raise UlsamError(f"an edit is of a model, an nn.Module, not of {type(model).__name__}{hint}")
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise UlsamError(
                "edit the model before DistributedDataParallel wraps it: new weights would not be synchronized"
            )
        if isinstance(model, nn.DataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:  # of torch.compile, whose classes take a second to import
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


def match(model: nn.Module, at: At) -> list[str]:
    """The module names that ``at`` means, in the order of the model; see :func:`replace` for what it may be.

    Raises:
        UlsamError: something in ``at`` matches no module; the message names the nearest valid ones.

    >>> match(nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU(), nn.ReLU())), "1.*")
    ['1.0', '1.1']
    """
    wanted = words(at)
    if not any(wanted):
        raise UlsamError("no place named; name a module such as blocks.4.2, or a layer number such as 14")
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    chosen: set[str] = set()
    for part in wanted:
        exact = part in names
        number = re.fullmatch(r"(\d+)(:1)?", part)
        if number and not exact:
            chosen.add(_numbered(model, int(number[1])))
            continue
        found = [part] if exact else [name for name in names if _glob(part).fullmatch(name)]
        if not found:
            if re.match(r"[\[(]?\d+\D", part) and layer_names(model):
                raise UlsamError(
                    f"cannot read the layer number in {part!r}; write numbers with commas, as 14,17 (17:1: behind 17)"
                )
            near = difflib.get_close_matches(part, names, n=3, cutoff=0.4)
            hint = f"nearest names: {', '.join(near)}" if near else f"names here begin with {', '.join(names[:3])}"
            raise UlsamError(f"no module is named {part!r}; {hint}")
        chosen.update(found)
    if outside := chosen.difference(names):  # of a wrapper that forwards its attributes
        inside = next((child for child, _ in model.named_children()), "")
        raise UlsamError(
            f"{min(outside)} is no module of this {type(model).__name__}, which wraps the model: edit its .{inside}"
        )
    return [name for name in names if name in chosen]


def _numbered(model: nn.Module, number: int) -> str:
    numbers = layer_names(model)
    if not numbers:
        raise UlsamError(
            f"layer number {number}: the paper's numbers exist for MobileNet-V1 and V2 alone; "
            f"name modules of this {type(model).__name__} (see `ulsam candidates`)"
        )
    if number not in numbers:
        raise UlsamError(f"there is no layer {number}; this model has layers 1 to {max(numbers)}")
    return numbers[number]


def _glob(pattern: str) -> re.Pattern[str]:
    """``*`` within one level, ``**`` across levels, ``?`` one character."""
    tokens = {"**": r".+", "*": r"[^.]+", "?": r"[^.]"}
    parts = re.split(r"(\*\*|\*|\?)", pattern)
    return re.compile("".join(tokens.get(part, re.escape(part)) for part in parts))


def words(at: At) -> list[str]:
    """The single names, globs and numbers in ``at``.

    >>> words("14, 17:1")
    ['14', '17:1']
    """
    items: Iterable[str | int] = [at] if isinstance(at, str | int) else at
    if not isinstance(items, Iterable) or not all(isinstance(item, str | int) for item in items):
        raise UlsamError(f"a place is a name such as 'blocks.4.2', a layer number, or a list of them, not {at!r}")
    return [part.strip() for item in items for part in str(item).split(",")]


def original(module: nn.Module) -> nn.Module:
    """What stood at this place before the edit, or the module itself."""
    return cast(nn.Module, vars(module).get("replaced_module", (module,))[0])


def lies_in(name: str, others: Iterable[str]) -> bool:
    """Whether a module is one of the others, or lies in one.

    >>> lies_in("blocks.4.2", ["blocks.4"]), lies_in("blocks.4", ["blocks.4.2"])
    (True, False)
    """
    return any(f"{name}.".startswith(f"{other}.") for other in others)
