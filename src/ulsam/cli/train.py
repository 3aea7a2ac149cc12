"""`ulsam train DATA`: train a model on a folder of images, or go on with a run."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ulsam.base.distributed import launch_line
from ulsam.base.errors import UlsamError, printable
from ulsam.base.processes import is_first_process
from ulsam.cli.common import add_edit_options, edits_from, free_folder, preset_arguments
from ulsam.cli.settings import add_settings, given_settings
from ulsam.training.config import TrainConfig, read_config
from ulsam.training.loop import Interrupted, resume, train
from ulsam.training.machine import keep_freed_memory
from ulsam.training.summary import result_lines


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="?", metavar="DATA", help="image folder, or a timm name such as torch/imagenet")
    parser.add_argument("--out", metavar="DIR", help="folder of the run, a new one (default: runs/NET-N)")
    parser.add_argument("--config", metavar="YAML", help="settings from a file; options on the command line come first")
    parser.add_argument("--resume", metavar="DIR", help="go on with the run in this folder")
    add_edit_options(parser)
    add_settings(parser)


def run(args: argparse.Namespace) -> None:
    keep_freed_memory()
    given = given_settings(args)
    if args.data is not None:
        given["data"] = args.data
    if args.resume:
        if args.out or args.config:
            raise UlsamError("--resume goes on in its own folder with its own settings: leave --out and --config out")
        with resumable():
            summary = resume(args.resume, {**given, **_layers(args, {})})
        _show(summary, args.resume)
        return
    before = read_config(args.config) if args.config else {}
    config = TrainConfig.from_mapping({**before, **given, **_layers(args, {**before, **given})})
    out = args.out or free_folder(config.model)
    with resumable():
        summary = train(config, out)
    _show(summary, out)


@contextmanager
def resumable() -> Iterator[None]:
    """Within it a run that is interrupted names the command that goes on with it."""
    try:
        yield
    except Interrupted as stop:
        if stop.run is None:
            raise
        command = launch_line(["train", "--resume", str(stop.run)])
        raise KeyboardInterrupt(f"{stop.where}; go on with: {command}") from None


def _show(summary: dict[str, Any], out: str | Path) -> None:
    if is_first_process():
        print(*map(printable, result_lines(summary, Path(out))), sep="\n")


def _layers(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that the edit options mean: edits, or arguments of a preset."""
    model = settings.get("model", TrainConfig.model)
    found: dict[str, Any] = {}
    if edits := edits_from(args, model):
        found["edits"] = [str(edit) for edit in edits]
    if arguments := preset_arguments(args, model):
        found["model_args"] = {**(settings.get("model_args") or {}), **arguments}
    return found
