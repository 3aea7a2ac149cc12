"""The settings of training as options, for every command that trains."""

import argparse
import dataclasses
import json
import types
from collections.abc import Collection
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ulsam.training.config import TrainConfig

_NO_OPTIONS = ("data", "edits")  # the one is DATA, the others have options of their own
_SHORT = {"batch_size": "-b", "workers": "-j"}  # as in timm's scripts
_GROUPS = {  # the first setting of each group of options
    "data_dir": "data",
    "model": "model and the weights it starts from",
    "teacher": "distillation",
    "in_chans": "image size and augmentation",
    "epochs": "optimization",
    "device": "machine",
    "val_every": "measuring and saving",
}
_METAVARS = {
    **{"int": "N", "float": "X"},
    **dict.fromkeys(("data_dir", "images_for_reconstruction"), "DIR"),
    **dict.fromkeys(("class_names", "weights", "teacher"), "FILE"),
    **dict.fromkeys(("train_split", "val_split", "model", "freeze", "interpolation", "opt", "device", "track"), "NAME"),
    "rand_augment": "POLICY",
    "fold": "K/N",
}


def add_settings(parser: argparse.ArgumentParser, but: Collection[str] = ()) -> None:
    """Add an option for each setting of `ulsam.training.config.TrainConfig`; ``data`` and ``edits`` have none here.

    Args:
        but: settings that the command decides itself.

    >>> parser = argparse.ArgumentParser()
    >>> add_settings(parser)
    >>> given_settings(parser.parse_args(["--lr", "0.02"]))
    {'lr': 0.02}
    """
    group: argparse._ActionsContainer = parser
    hints = get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        if field.name in _GROUPS:
            group = parser.add_argument_group(_GROUPS[field.name])
        if field.name not in (*_NO_OPTIONS, *but):
            options = [_SHORT[field.name]] if field.name in _SHORT else []
            options.append("--" + field.name.replace("_", "-"))
            group.add_argument(*options, dest=field.name, default=None, **_argument(field, hints[field.name]))


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that options of :func:`add_settings` were given for; see there."""
    names = [field.name for field in dataclasses.fields(TrainConfig) if field.name not in _NO_OPTIONS]
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


def _argument(field: "dataclasses.Field[Any]", kind: Any) -> dict[str, Any]:
    """argparse's keywords for one setting."""
    default = field.default_factory() if callable(field.default_factory) else field.default
    shown = "" if default is None or default in ([], {}) else f" (default: {_text(default)})"
    keywords: dict[str, Any] = {"help": (field.metadata["help"] + shown).replace("%", "%%")}
    others: list[Any] = []
    if get_origin(kind) is types.UnionType:
        kind, *others = get_args(kind)
    if get_origin(kind) is Literal:
        return {**keywords, "choices": get_args(kind)}
    if kind is bool:
        return {**keywords, "action": argparse.BooleanOptionalAction}
    if str in others:
        return {**keywords, "type": _word_or_object, "metavar": "WORD|JSON"}
    if get_origin(kind) is dict:
        return {**keywords, "type": _json_object, "metavar": "JSON"}
    if get_origin(kind) is list:
        kind = get_args(kind)[0]
        keywords["nargs"] = "+"
    metavar = _METAVARS.get(kind.__name__) or _METAVARS[field.name]
    return {**keywords, "type": kind, "metavar": metavar}


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is no JSON object such as \'{{"act_layer": "relu"}}\'')
    return value


def _word_or_object(text: str) -> str | dict[str, Any]:
    return _json_object(text) if text.lstrip().startswith("{") else text


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
