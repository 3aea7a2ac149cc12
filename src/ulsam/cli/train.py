"""`ulsam train DATA`: train a net on a folder of pictures, or go on with a run."""

import argparse
import dataclasses
import json
import types
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ulsam.cli.common import add_edit_options, edits_from, free_folder, preset_arguments
from ulsam.errors import UlsamError
from ulsam.train.config import TrainConfig, read_config
from ulsam.train.loop import resume, train


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="?", metavar="DATA", help="image folder, or a timm name such as torch/imagenet")
    parser.add_argument("--out", metavar="DIR", help="folder of the run, a new one (default: runs/NET-N)")
    parser.add_argument("--config", metavar="YAML", help="settings from a file; options on the command line come first")
    parser.add_argument("--resume", metavar="DIR", help="go on with the run in this folder")
    add_edit_options(parser)
    settings = parser.add_argument_group("settings")
    hints = get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        if field.name in ("data", "edits"):
            continue
        option = "--" + field.name.replace("_", "-")
        settings.add_argument(option, dest=field.name, default=None, **_argument(field, hints[field.name]))


def run(args: argparse.Namespace) -> None:
    names = [field.name for field in dataclasses.fields(TrainConfig) if field.name not in ("data", "edits")]
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.data is not None:
        given["data"] = args.data
    if args.resume:
        if args.out or args.config:
            raise UlsamError("--resume goes on in its own folder with its own settings: leave --out and --config out")
        resume(args.resume, {**given, **_layers(args, {})})
        return
    before = read_config(args.config) if args.config else {}
    config = TrainConfig.from_mapping({**before, **given, **_layers(args, {**before, **given})})
    train(config, args.out or free_folder(config.model))


def _layers(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that the edit options mean: edits, or arguments of a preset."""
    model = settings.get("model", TrainConfig.model)
    found: dict[str, Any] = {}
    if edits := edits_from(args, model):
        found["edits"] = [str(edit) for edit in edits]
    if arguments := preset_arguments(args, model):
        found["model_args"] = {**(settings.get("model_args") or {}), **arguments}
    return found


def _argument(field: "dataclasses.Field[Any]", kind: Any) -> dict[str, Any]:
    """argparse's keywords for one setting."""
    default = field.default_factory() if callable(field.default_factory) else field.default
    shown = "" if default is None or default in ([], {}) else f" (default: {_text(default)})"
    keywords: dict[str, Any] = {"help": (field.metadata["help"] + shown).replace("%", "%%")}
    if get_origin(kind) is types.UnionType:
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        return {**keywords, "choices": get_args(kind)}
    if get_origin(kind) is list:
        return {**keywords, "nargs": "+", "type": get_args(kind)[0], "metavar": field.name.upper()}
    if kind is bool:
        return {**keywords, "action": argparse.BooleanOptionalAction}
    return {**keywords, "type": _json_object if get_origin(kind) is dict else kind, "metavar": field.name.upper()}


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is no JSON object such as \'{{"act_layer": "relu"}}\'')
    return value


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
