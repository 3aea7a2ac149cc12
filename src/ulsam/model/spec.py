"""The spec of a model: the small typed value that the command line parses and a model file holds."""

import json
import math
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self, TypeVar, cast, get_args

from torch import nn

from ulsam.base.errors import UlsamError, printable
from ulsam.layer.inverted_residual import DEFAULT_WIDTH, InvertedResidual
from ulsam.layer.make_layer import TIMMS, Chain, Layer
from ulsam.layer.ulsam import MOMENTUM, ULSAM, Form
from ulsam.surgery import edit as surgery
from ulsam.surgery.edited import edited, is_followed, undo_edits
from ulsam.surgery.layer_host import host_class
from ulsam.surgery.places import unwrapped

ModelT = TypeVar("ModelT", bound=nn.Module)
Kind = Literal["replace", "insert", "remove"]
Json = None | bool | int | float | str | list[Any] | dict[str, Any]

#: How timm calls what an image can be resized with.
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
#: No model needs a larger number among its arguments; a depth of 10**5 takes the memory before the first layer is made.
LARGEST_ARGUMENT = 10_000
#: Edits of a model, and characters of all their texts: each edit takes the time of a forward pass.
MAX_EDITS, MAX_TEXT = 200, 20_000


@dataclass(frozen=True)
class Edit:
    """One change of a model; its text form is e.g. ``replace 14,17 g=4``, ``insert 17:1 g=8 form=released`` or
    ``insert 17:1 layer=se``.

    ULSAM has 4 groups and the form "equations" where none are given; other layers, and a removal, have neither. A
    ``width`` is that of a narrow inverted residual behind the named one, or of the layer "inverted_residual" itself.

    >>> Edit.parse("replace 14,17 g=8")
    Edit(kind='replace', at='14,17', groups=8, form='equations', layer='ulsam', width=None)
    >>> str(Edit("remove", "14, 16")), str(Edit("replace", "14", layer="eca"))
    ('remove 14,16', 'replace 14 layer=eca')

    Raises:
        UlsamError: an unknown kind or layer, a form that does not train, no place or one with a space or "=" in it,
            groups below 1, a removal with a layer, or groups or a form for what has none.
    """

    kind: Kind
    at: str
    groups: int | None = None
    form: Form | None = None
    layer: Layer = "ulsam"
    width: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UlsamError(f"unknown edit {self.kind!r}; valid: {', '.join(get_args(Kind))}")
        if self.layer not in get_args(Layer):
            raise UlsamError(f"unknown layer {self.layer!r}; valid: {', '.join(get_args(Layer))}")
        if self.form not in (None, *(forms := ("equations", "released"))):  # folding makes a folded layer, no edit
            raise UlsamError(f"unknown form {self.form!r}; valid: {', '.join(forms)}")
        if type(self.groups) is int and self.groups < 1:
            raise UlsamError(f"groups must be 1 or more, not {self.groups}")
        if type(self.width) is int and self.width < 1:
            raise UlsamError(f"width must be 1 or more, not {self.width}")
        if {type(self.groups), type(self.width)} - {int, type(None)} or type(self.at) is not str:
            raise UlsamError(
                "an edit takes a place as text, a whole number of groups and a whole width, not "
                f"{self.at!r}, {self.groups!r}, {self.width!r}"
            )
        object.__setattr__(self, "at", re.sub(r"\s*,\s*", ",", self.at.strip()))
        if not self.at or re.search(r"[\s=]", self.at):
            raise UlsamError(f"cannot read the place {self.at!r}; write names or layer numbers with commas, as 14,17")
        plain = (self.groups, self.form) == (None, None)
        if self.kind == "remove" and not (plain and self.layer == "ulsam" and self.width is None):
            raise UlsamError(f"a removal makes no layer: it has neither groups nor a form, layer or width ({self.at})")
        if self.layer != "ulsam" and not plain:
            raise UlsamError(f"groups and form are for ULSAM alone: the layer {self.layer} has neither ({self.at})")
        if self.layer == "inverted_residual":
            object.__setattr__(self, "width", self.width or DEFAULT_WIDTH)
        if self.kind != "remove" and self.layer == "ulsam":
            object.__setattr__(self, "groups", self.groups or 4)
            object.__setattr__(self, "form", self.form or "equations")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the text form.

        Raises:
            UlsamError: it is not of that form.
        """
        if len(text) > MAX_TEXT:
            raise UlsamError(f"an edit has {len(text)} characters: name its places by globs, in at most {MAX_TEXT}")
        kind, *rest = text.split() or [""]
        options: dict[str, Any] = dict(word.split("=", 1) for word in rest if "=" in word)
        places = [word for word in rest if "=" not in word]
        counts = {name: options.pop(key) for key, name in (("g", "groups"), ("width", "width")) if key in options}
        sound = set(options) <= {"form", "layer"} and all(re.fullmatch(r"\d{1,9}", count) for count in counts.values())
        if len(places) != 1 or not sound:
            raise UlsamError(
                f"cannot read the edit {text!r}; write it as 'replace 14,17 g=4 form=equations' or 'insert 17 layer=se'"
            )
        return cls(kind, places[0], **{name: int(count) for name, count in counts.items()}, **options)  # type: ignore[arg-type]

    def __str__(self) -> str:
        words = [self.kind, self.at]
        if self.groups is not None:
            words.append(f"g={self.groups}")
        if self.form not in (None, "equations"):
            words.append(f"form={self.form}")
        if self.layer != "ulsam":
            words.append(f"layer={self.layer}")
        if self.width is not None:
            words.append(f"width={self.width}")
        return " ".join(words)

    def apply(self, model: nn.Module, input_size: Sequence[int] | None = None) -> None:
        """Change ``model`` in place; ``input_size`` (C, H, W) and the errors are those of `ulsam.surgery.edit`."""
        if self.kind == "remove":
            surgery.remove(model, self.at, input_size=input_size)
        else:
            edit = surgery.insert if self.kind == "insert" else surgery.replace
            edit(model, self.at, self.groups, layer=self.layer, form=self.form, width=self.width, input_size=input_size)


@dataclass(frozen=True)
class ModelSpec:
    """Everything that makes a trained model usable: how to build it, and how an image becomes its input.

    Args:
        base: timm's name of the model that was edited.
        classes: names in the order of the outputs; none: the model outputs features, as a start for training.
        edits: in the order in which they are done.
        model_args: JSON keyword arguments for `timm.create_model`.
        input_size: C, H, W.
        interpolation: of the resize before the crop, as timm names it.
        crop_pct: share of the resized image's side that the center crop keeps.
        mean: of each channel, for images scaled to 0..1.
        std: of each channel, likewise.
        thresholds: of a model that gives several labels an image, for each class: the probability, a sigmoid of its
            output, from which on an image has the label. None: an image has one class, and a softmax gives their
            probabilities.

    Raises:
        UlsamError: two classes of one name, a size that is no whole number from 1 to 8192, an interpolation that timm
            does not know, a crop outside 0.1..1.5, a standard deviation of 0 or below, not one mean and std a channel,
            an argument above `LARGEST_ARGUMENT`, or more edits than `MAX_EDITS` and `MAX_TEXT` allow.
    """

    base: str
    classes: tuple[str, ...]
    edits: tuple[Edit, ...] = ()
    model_args: Mapping[str, Json] = field(default_factory=dict)
    input_size: tuple[int, int, int] = (3, 224, 224)
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    thresholds: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.input_size) != 3 or not all(type(n) is int and 1 <= n <= 8192 for n in self.input_size):
            raise UlsamError(f"input_size is C, H, W, each from 1 to 8192, not {reprlib.repr(self.input_size)}")
        if len(set(self.classes)) != len(self.classes):
            twice = Counter(self.classes).most_common(1)[0][0]
            raise UlsamError(f"two classes are called {reprlib.repr(twice)}: give each a name of its own")
        if len(self.edits) > MAX_EDITS or sum(len(str(edit)) for edit in self.edits) > MAX_TEXT:
            raise UlsamError(
                f"a model has at most {MAX_EDITS} edits, of {MAX_TEXT} characters in all; these are {len(self.edits)}"
            )
        if self.interpolation not in INTERPOLATIONS:
            raise UlsamError(
                f"interpolation is one of {', '.join(INTERPOLATIONS)}, not {reprlib.repr(self.interpolation)}"
            )
        if not 0.1 <= self.crop_pct <= 1.5:  # above 1 the crop has a border; timm has such models
            raise UlsamError(f"crop_pct is between 0.1 and 1.5, not {self.crop_pct}")
        if self.model_args.get("in_chans", self.input_size[0]) != self.input_size[0]:
            raise UlsamError(
                f"in_chans {reprlib.repr(self.model_args['in_chans'])} is not input_size's {self.input_size[0]}"
            )
        if (largest := max(map(abs, _numbers_in(self.model_args)), default=0)) > LARGEST_ARGUMENT:
            raise UlsamError(
                f"no argument of a model may be above {LARGEST_ARGUMENT}, but one is {reprlib.repr(largest)}"
            )
        sound = all(map(math.isfinite, self.mean)) and all(0 < value < math.inf for value in self.std)
        if not sound or not len(self.mean) == len(self.std) == self.input_size[0]:
            raise UlsamError(f"{self.input_size[0]} channels need as many means, and as many stds above 0")
        if self.thresholds is not None and not (
            len(self.thresholds) == len(self.classes) and all(0 <= value <= 1 for value in self.thresholds)
        ):
            raise UlsamError(f"{len(self.classes)} classes need as many thresholds, each from 0 to 1")

    @property
    def several(self) -> bool:
        """Whether the model gives several labels an image: it has ``thresholds``."""
        return self.thresholds is not None

    def check_one_class(self, what: str) -> None:
        """Raise unless the model gives one class an image.

        Raises:
            UlsamError: it gives several labels; ``what`` is what is for one class alone.

        >>> ModelSpec("resnet18", ("a", "b"), thresholds=(0.5, 0.5)).check_one_class("slimming")
        Traceback (most recent call last):
        ulsam.base.errors.UlsamError: slimming is for one class an image, and this model gives several labels
        """
        if self.several:
            raise UlsamError(f"{what} is for one class an image, and this model gives several labels")

    def check_classes(self, what: str = "the model") -> None:
        """Raise unless the model has classes; a starting point for training has none.

        Args:
            what: the model, for the message.

        Raises:
            UlsamError: it has none.

        >>> ModelSpec("resnet18", ()).check_classes("start.safetensors")
        Traceback (most recent call last):
        ulsam.base.errors.UlsamError: start.safetensors has no classes: `ulsam.train` gives it those of your images
        """
        if not self.classes:
            raise UlsamError(f"{what} has no classes: `ulsam.train` gives it those of your images")

    def to_json(self) -> str:
        """One line of JSON.

        >>> ModelSpec.from_json(ModelSpec("mobilenetv2_100", ("a", "b")).to_json()).classes
        ('a', 'b')
        """
        entries = {**asdict(self), "edits": [str(edit) for edit in self.edits]}
        if self.thresholds is None:
            del entries["thresholds"]
        return json.dumps(entries, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read :meth:`to_json`'s line; unknown keys and wrong types are refused.

        Raises:
            UlsamError: it is not the JSON of a spec.
        """
        try:
            data = _typed(json.loads(text), dict)
            own = data.pop("thresholds", None)
            made = cls(
                base=_typed(data.pop("base"), str),
                classes=_all(data.pop("classes"), str),
                edits=tuple(Edit.parse(_renamed(edit)) for edit in _all(data.pop("edits"), str)),
                model_args=_typed(data.pop("model_args"), dict),
                input_size=cast(tuple[int, int, int], _all(data.pop("input_size"), int)),
                interpolation=_typed(data.pop("interpolation"), str),
                crop_pct=float(_typed(data.pop("crop_pct"), float, int)),
                mean=tuple(map(float, _all(data.pop("mean"), float, int))),
                std=tuple(map(float, _all(data.pop("std"), float, int))),
                thresholds=None if own is None else tuple(map(float, _all(own, float, int))),
            )
        except UlsamError as error:
            raise UlsamError(f"not the spec of a model: {error}") from error
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise UlsamError(f"not the spec of a model: {type(error).__name__} {error}") from error
        if data:
            raise UlsamError(f"not the spec of a model: unknown entries {reprlib.repr(list(data))}")
        return made

    def __str__(self) -> str:
        edits = "; ".join(map(str, self.edits)) or "none"
        names = ", ".join(self.classes[:8]) + (", ..." if len(self.classes) > 8 else "")
        size = "x".join(map(str, self.input_size))
        lines = [
            f"base        {self.base}",
            f"edits       {printable(edits)}",
            f"arguments   {json.dumps(dict(self.model_args))}",
            f"classes     {len(self.classes)}: {printable(names)}" if names else "classes     none",
            f"input       {size}, {self.interpolation}, crop {self.crop_pct:g}",
            f"mean, std   {_numbers(self.mean)}; {_numbers(self.std)}",
        ]
        if self.thresholds is not None:
            some = _numbers([round(value, 3) for value in self.thresholds[:8]])
            lines.append(f"labels      several an image, from {some}{', ...' if len(self.thresholds) > 8 else ''} on")
        return "\n".join(lines)


def _renamed(edit: str) -> str:
    """An edit in the words of files that were written before 0.1.0.

    >>> _renamed("drop 14,17"), _renamed("replace 14 layer=thin width=32")
    ('remove 14,17', 'replace 14 layer=inverted_residual width=32')
    """
    return re.sub(r" layer=thin\b", " layer=inverted_residual", re.sub(r"^drop ", "remove ", edit))


def _numbers_in(value: Any) -> Iterator[int | float]:
    """All numbers in a JSON value."""
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _numbers_in(item)


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _typed(value: Any, *kinds: type) -> Any:
    if type(value) not in kinds:
        raise TypeError(f"{reprlib.repr(value)} is no {kinds[0].__name__}")
    return value


def _all(values: Any, *kinds: type) -> tuple[Any, ...]:
    return tuple(_typed(value, *kinds) for value in _typed(values, list))


def edits_of(model: nn.Module) -> list[str]:
    """The edits that a model holds, as texts; :func:`apply` makes them again in a model that was built anew.

    For libraries that rebuild the unedited model when they load weights: keep these texts beside the weights.

    Raises:
        UlsamError: an edit has no text, as one with a BatchNorm momentum of its own or a folded layer.

    >>> import ulsam
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1))
    >>> edits_of(ulsam.insert(ulsam.replace(model, "1", input_size=(3, 9, 9)), "0", layer="se", input_size=(3, 9, 9)))
    ['insert 0 layer=se', 'replace 1 g=4']
    """
    model = unwrapped(model)
    found = []
    for name, module in model.named_modules():
        if "replaced_module" in vars(module):
            made = module[0] if host_class(module) is nn.Sequential else module
            found.append(Edit("remove", name) if isinstance(made, nn.Identity) else _edit_of("replace", name, made))
        if is_followed(module):
            found.append(_edit_of("insert", name, cast(nn.Module, module.ulsam)))
    return [str(edit) for edit in found]


def apply(model: ModelT, edits: Iterable[str], *, input_size: Sequence[int] | None = None) -> ModelT:
    """Make edits, given as texts such as those of :func:`edits_of`; in place, and returns ``model``.

    Raises:
        UlsamError: one cannot be read or made. The model is then as it was.

    >>> model = apply(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), ["insert 0 g=2"], input_size=(3, 9, 9))
    >>> edits_of(model)
    ['insert 0 g=2']
    """
    parsed = [Edit.parse(text) for text in edits]
    inner = unwrapped(model)
    before = [inner.get_submodule(name) for name in edited(inner)]
    before += [cast(nn.Module, module.ulsam) for module in before if is_followed(module)]
    try:
        for edit in parsed:
            edit.apply(model, input_size)
    except BaseException:
        undo_edits(inner, kept=before)
        raise
    return model


def _edit_of(kind: Kind, name: str, layer: nn.Module) -> Edit:
    attention, width = (layer[0], cast(InvertedResidual, layer[1]).width) if isinstance(layer, Chain) else (layer, None)
    if isinstance(attention, ULSAM):
        norm = attention.depthwise_norm if attention.form == "released" else None
        if norm is not None and norm.momentum != MOMENTUM:
            raise UlsamError(f"the text of an edit has no momentum, but the layer at {name} has {norm.momentum}")
        return Edit(kind, name, attention.groups, attention.form, width=width)
    if isinstance(attention, InvertedResidual):
        return Edit(kind, name, layer="inverted_residual", width=attention.width)
    found = next((key for key, kind in TIMMS.items() if host_class(attention).__name__ == kind), None)
    if found is None:
        raise UlsamError(f"the {type(attention).__name__} at {name} has no text: no edit makes such a layer")
    return Edit(kind, name, layer=cast(Layer, found), width=width)
