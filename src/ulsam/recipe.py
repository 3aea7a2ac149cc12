"""The recipe of a network: the small typed value that the command line parses and a model file holds."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self, get_args

from torch import nn

from ulsam import surgery
from ulsam.errors import UlsamError
from ulsam.module import Form

Kind = Literal["replace", "insert", "drop"]
Json = None | bool | int | float | str | list[Any] | dict[str, Any]


@dataclass(frozen=True)
class Edit:
    """One change of a net; its text form is e.g. ``replace 14,17 g=4`` or ``insert 17:1 g=8 form=released``.

    >>> Edit.parse("replace 14,17 g=8")
    Edit(kind='replace', at='14,17', groups=8, form='equations')
    >>> str(Edit("drop", "14"))
    'drop 14'
    """

    kind: Kind
    at: str
    groups: int = 4
    form: Form = "equations"

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UlsamError(f"unknown edit {self.kind!r}; valid: {', '.join(get_args(Kind))}")
        if self.form not in get_args(Form):
            raise UlsamError(f"unknown form {self.form!r}; valid: {', '.join(get_args(Form))}")
        if type(self.groups) is not int or type(self.at) is not str:
            raise UlsamError(
                f"an edit takes a place as text and a whole number of groups, not {self.at!r}, {self.groups!r}"
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the text form.

        Raises:
            UlsamError: it is not of that form.
        """
        kind, *rest = text.split() or [""]
        options = dict(word.split("=", 1) for word in rest if "=" in word)
        places = [word for word in rest if "=" not in word]
        if len(places) != 1 or set(options) - {"g", "form"} or not options.get("g", "4").isdecimal():
            raise UlsamError(f"cannot read the edit {text!r}; write it as 'replace 14,17 g=4 form=equations'")
        form: Any = options.get("form", "equations")
        return cls(kind, places[0], int(options.get("g", "4")), form)  # type: ignore[arg-type]

    def __str__(self) -> str:
        if self.kind == "drop":
            return f"drop {self.at}"
        form = "" if self.form == "equations" else f" form={self.form}"
        return f"{self.kind} {self.at} g={self.groups}{form}"

    def apply(self, model: nn.Module) -> None:
        """Change ``model`` in place; the errors are those of `ulsam.surgery`."""
        if self.kind == "drop":
            surgery.drop(model, self.at)
        elif self.kind == "insert":
            surgery.insert(model, self.at, self.groups, form=self.form)
        else:
            surgery.replace(model, self.at, self.groups, form=self.form)


@dataclass(frozen=True)
class Recipe:
    """Everything that makes a trained net usable: how to build it, and how a picture becomes its input.

    Args:
        base: timm's name of the net that was edited.
        classes: names in the order of the outputs.
        edits: in the order in which they are done.
        model_args: JSON keyword arguments for `timm.create_model`.
        input_size: C, H, W.
        interpolation: of the resize before the crop, as timm names it.
        crop_pct: share of the resized picture's side that the centre crop keeps.
        mean, std: a channel, for pictures scaled to 0..1.
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

    def to_json(self) -> str:
        """One line of JSON.

        >>> Recipe.from_json(Recipe("mobilenetv2_100", ("a", "b")).to_json()).classes
        ('a', 'b')
        """
        return json.dumps({**asdict(self), "edits": [str(edit) for edit in self.edits]}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read :meth:`to_json`'s line; unknown keys and wrong types are refused.

        Raises:
            UlsamError: it is not the JSON of a recipe.
        """
        try:
            data = json.loads(text)
            made = cls(
                base=_typed(data.pop("base"), str),
                classes=_all(data.pop("classes"), str),
                edits=tuple(Edit.parse(edit) for edit in _all(data.pop("edits"), str)),
                model_args=_typed(data.pop("model_args"), dict),
                input_size=_three(data.pop("input_size")),
                interpolation=_typed(data.pop("interpolation"), str),
                crop_pct=float(data.pop("crop_pct")),
                mean=tuple(float(v) for v in data.pop("mean")),
                std=tuple(float(v) for v in data.pop("std")),
            )
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise UlsamError(f"not the recipe of a net: {type(error).__name__} {error}") from error
        if data:
            raise UlsamError(f"not the recipe of a net: unknown entries {', '.join(data)}")
        return made

    def __str__(self) -> str:
        edits = "; ".join(map(str, self.edits)) or "none"
        shown = ", ".join(self.classes[:8]) + (", ..." if len(self.classes) > 8 else "")
        size = "x".join(map(str, self.input_size))
        lines = [
            f"base        {self.base}",
            f"edits       {edits}",
            f"arguments   {json.dumps(dict(self.model_args))}",
            f"classes     {len(self.classes)}: {shown}",
            f"input       {size}, {self.interpolation}, crop {self.crop_pct:g}",
            f"mean, std   {_numbers(self.mean)}; {_numbers(self.std)}",
        ]
        return "\n".join(lines)


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def _all(values: Any, kind: type) -> tuple[Any, ...]:
    return tuple(_typed(value, kind) for value in _typed(values, list))


def _three(values: Sequence[Any]) -> tuple[int, int, int]:
    channels, height, width = _all(values, int)
    return channels, height, width
