"""`ulsam train DATA`: train a model on a folder of images, or resume a run."""

import argparse
import os
from typing import Any

from ulsam.base.errors import UlsamError
from ulsam.cli.common import add_edit_options, edits_from, free_folder, only_json, preset_arguments, print_json
from ulsam.cli.settings import add_settings, given_settings
from ulsam.training.config import TrainConfig, read_config

EXAMPLE = """\
ulsam train images --pretrained --replace 14,17 --epochs 30 -b 64 --out runs/mine
ulsam train --resume runs/mine"""
FROM_RANDOM = "start   from random weights: --pretrained starts from timm's, --weights FILE from those in a file"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="?", metavar="DATA", help="image folder, or a timm name such as torch/imagenet")
    parser.add_argument("--out", metavar="DIR", help="folder of the run, a new one (default: runs/MODEL-N)")
    parser.add_argument(
        "-c", "--config", metavar="YAML", help="settings from a file; options on the command line come first"
    )
    parser.add_argument("--resume", metavar="DIR", help="resume the run in this folder")
    add_edit_options(parser)
    add_settings(parser)


def run(args: argparse.Namespace) -> None:
    from ulsam.training.loop import resume, train

    if args.resume:
        if args.out or args.config:
            raise UlsamError("--resume goes on in its own folder with its own settings: leave --out and --config out")
        with only_json(args):
            summary = resume(args.resume, {**_given(args), **_layers(args, {})})
    else:
        config = config_from(args)
        with only_json(args):
            if not (config.pretrained or config.weights) and os.environ.get("RANK", "0") == "0":
                print(FROM_RANDOM)
            summary = train(config, args.out or free_folder(config.model))
    if args.json:
        print_json(summary)


def config_from(args: argparse.Namespace) -> TrainConfig:
    """The settings of a new run: those of the options before those of ``--config``.

    Raises:
        UlsamError: no data, a file that cannot be read, or what is no setting.
    """
    settings = {**(read_config(args.config) if args.config else {}), **_given(args)}
    return TrainConfig.from_mapping({**settings, **_layers(args, settings)})


def _given(args: argparse.Namespace) -> dict[str, Any]:
    return {**given_settings(args), **({} if args.data is None else {"data": args.data})}


def _layers(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that the edit options mean: edits, or arguments of a preset."""
    model = settings.get("model", TrainConfig.model)
    found: dict[str, Any] = {}
    if edits := edits_from(args, model):
        found["edits"] = [str(edit) for edit in edits]
    if arguments := preset_arguments(args, model):
        found["model_args"] = {**(settings.get("model_args") or {}), **arguments}
    return found
