"""`ulsam train DATA`: train a model on a folder of images, or resume a run."""

import argparse
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ulsam.base.errors import Interrupted, LostProcess, UlsamError, printable
from ulsam.base.processes import is_first_process
from ulsam.cli.common import add_edit_options, edits_from, free_folder, only_json, preset_arguments, print_json
from ulsam.cli.settings import add_settings, given_settings
from ulsam.training.config import TrainConfig, read_config

EXAMPLE = """\
ulsam train images --pretrained --replace 14,17 --epochs 30 -b 64 --out runs/mine
ulsam train --resume runs/mine"""
FROM_RANDOM = "start   from random weights: --pretrained starts from timm's, --weights FILE from those in a file"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data",
        nargs="?",
        metavar="DATA",
        help="image folder, a CSV of paths and labels, or a timm name such as torch/imagenet",
    )
    parser.add_argument("--out", metavar="DIR", help="folder of the run, a new one (default: runs/MODEL-N)")
    parser.add_argument(
        "-c", "--config", metavar="YAML", help="settings from a file; options on the command line come first"
    )
    parser.add_argument("--resume", metavar="DIR", help="resume the run in this folder")
    add_edit_options(parser)
    add_settings(parser)


def run(args: argparse.Namespace) -> None:
    from ulsam.training import signals
    from ulsam.training.machine import keep_freed_memory
    from ulsam.training.summary import result_lines
    from ulsam.training.train import resume, train

    keep_freed_memory()
    if "WORLD_SIZE" in os.environ:  # torchrun's
        signals.AFTER_LOSS = signal.SIG_IGN
    if args.resume:
        if args.out or args.config:
            raise UlsamError("--resume continues in its own folder with its own settings: leave --out and --config out")
        out = args.resume
        with only_json(args), resumable():
            summary = resume(args.resume, {**_given(args), **_layers(args, {})})
    else:
        config = config_from(args)
        out = args.out or free_folder(config.model)
        with only_json(args), resumable():
            if not (config.pretrained or config.weights or args.quiet) and is_first_process():
                print(FROM_RANDOM)
            summary = train(config, out)
    if args.json:
        print_json(summary)
    elif is_first_process():
        print(*map(printable, result_lines(summary, Path(out))), sep="\n")


@contextmanager
def resumable() -> Iterator[None]:
    """Within it a run that is interrupted, or loses a process, names the command that resumes it."""
    from ulsam.base.distributed import launch_line

    try:
        yield
    except (Interrupted, LostProcess) as stop:
        if stop.run is None:
            raise
        how = f"resume with: {launch_line(['train', '--resume', str(stop.run)])}"
        if isinstance(stop, Interrupted):
            raise KeyboardInterrupt(f"{stop.event}; {how}") from None
        stop.args = (f"{stop.event}; {how}",)
        raise


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
