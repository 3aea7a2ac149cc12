"""`ulsam train DATA`: train a model on a folder of images, or go on with a run."""

import argparse
from typing import Any

from ulsam.base.errors import UlsamError
from ulsam.cli.common import add_edit_options, edits_from, free_folder, preset_arguments
from ulsam.cli.settings import add_settings, given_settings
from ulsam.training.config import TrainConfig, read_config
from ulsam.training.loop import resume, train


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="?", metavar="DATA", help="image folder, or a timm name such as torch/imagenet")
    parser.add_argument("--out", metavar="DIR", help="folder of the run, a new one (default: runs/NET-N)")
    parser.add_argument("--config", metavar="YAML", help="settings from a file; options on the command line come first")
    parser.add_argument("--resume", metavar="DIR", help="go on with the run in this folder")
    add_edit_options(parser)
    add_settings(parser)


def run(args: argparse.Namespace) -> None:
    given = given_settings(args)
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
