"""Begin a run, or resume one."""

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Unpack, cast

from torch import nn

from ulsam.base.files import make_folder, read_json, write_atomic
from ulsam.data.labelled import check_no_class
from ulsam.training import restore
from ulsam.training.callbacks import Callback
from ulsam.training.checkpoint import read_checkpoint
from ulsam.training.config import TrainConfig, config_of
from ulsam.training.loop import Trainer
from ulsam.training.machine import session
from ulsam.training.run_lock import check_idle, run_lock
from ulsam.training.settings import TrainSettings
from ulsam.training.train_summary import TrainSummary


def train(
    data: str | os.PathLike[str] | TrainConfig,
    out: str | os.PathLike[str],
    *,
    model: nn.Module | str | os.PathLike[str] | None = None,
    callbacks: Sequence[Callback] = (),
    **settings: Unpack[TrainSettings],
) -> TrainSummary:
    """Train a model and write everything about it into the new folder ``out``.

    The folder then holds ``config.yaml`` (repeats the run), ``metrics.csv``, ``curves.png``, ``checkpoint.pt``,
    ``model.safetensors`` (the last epoch's weights, or their average; the best epoch's with ``keep="best"``) and
    ``summary.json``, whose content is returned. Under torchrun all processes call this, and the first one writes.

    Random generators and PyTorch's number of threads are afterwards as they were. On a CPU a training step is up to
    half as fast again after `ulsam.training.machine.keep_freed_memory`, which the command line calls: it changes the
    whole process for good, so this function does not.

    Args:
        data: an image folder, or timm's name of a data set; or all settings, as `ulsam.TrainConfig`.
        out: a new folder, or an empty one.
        model: timm's name of the base model; a model file, to train that further; or a model that no spec builds, such
            as a channel-pruned one, to train as it is, with the weights it has. The latter changes in place.
            ``weights.safetensors``, a plain state dict, then stands in for ``model.safetensors``, and the summary says
            ``"prepared": true``: of its spec, the classes and the image are those of this model.
        callbacks: each is called at the start, after every update and every epoch, and at the end. Trackers are the
            setting ``track``.
        settings: fields of `ulsam.TrainConfig`, such as ``edits`` or ``epochs``.

    Returns:
        What ``summary.json`` holds: `ulsam.TrainSummary` names its keys.

    Raises:
        UlsamError: the folder is not empty, or another process trains into it, the data or the model is not usable, the
            teacher is not for it, the loss is no longer finite, too many images cannot be read, or the disk is full.
        Interrupted: Ctrl-C or SIGTERM, after saving.

    >>> import tempfile
    >>> from ulsam.data.birds import draw_birds
    >>> folder = tempfile.mkdtemp()
    >>> birds = draw_birds(f"{folder}/birds", classes=2, train=8, val=4, size=32)
    >>> small = {"model": "test_efficientnet", "size": 32, "batch_size": 8, "epochs": 1, "workers": 0}
    >>> summary = train(birds, f"{folder}/run", edits=["insert blocks.1 g=4"], **small)
    >>> summary["scores"]["images"], summary["spec"]["edits"]
    (8, ['insert blocks.1 g=4'])
    """
    run, prepared = Path(out), model if isinstance(model, nn.Module) else None
    named = {} if model is None or isinstance(model, nn.Module) else {"model": os.fspath(model)}
    config = config_of(data, {**settings, **named})
    with session(config) as (config, world):
        if world.writes:
            check_idle(run)
        restore.check_free(run)
        check_no_class(run, config.data)
        trainer = Trainer(config, run, world, model=prepared, callbacks=callbacks)
        trainer.prepare()  # before the folder is made: most mistakes show here
        if world.writes:
            make_folder(run)
        with run_lock(run) if world.writes else nullcontext():
            if world.writes:
                restore.check_free(run)  # another process may have begun since
                if prepared is not None:
                    trainer.save()  # settings cannot make this model, so the run begins with a checkpoint
                write_atomic(run / "config.yaml", trainer.config.to_yaml())
            return trainer.fit()


def resume(
    run: str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    model: nn.Module | None = None,
    callbacks: Sequence[Callback] = (),
) -> TrainSummary:
    """Resume a run that was stopped or killed, to the end that it would have had.

    Args:
        run: its folder.
        overrides: settings; only those in `restore.CHANGEABLE_ON_RESUME`, and the place of the teacher's file, may
            differ from the run's own.
        model: for a run that :func:`train` began with one, a model of the same shapes; its weights do not matter.
        callbacks: as of :func:`train`.

    Returns:
        As :func:`train`.

    Raises:
        UlsamError: not the folder of a run, a finished one, or one that another process trains into; a setting, a
            teacher or a number of processes that would change the result; or a checkpoint that is not this run's.
    """
    run = Path(run)
    config = restore.resumed_config(run, overrides or {})
    restore.check_prepared(run, read_checkpoint(run), model is not None)
    with session(config) as (config, world), run_lock(run) if world.writes else nullcontext():
        saved = read_checkpoint(run)  # as the last process left it
        trainer = Trainer(config, run, world, fresh=saved is None, model=model, callbacks=callbacks)
        trainer.prepare()
        if saved is not None:
            trainer.restore(saved)
        return trainer.fit()


def train_or_resume(config: TrainConfig, out: str | os.PathLike[str]) -> TrainSummary:
    """Train into ``out``, or resume the run of these settings that was stopped there; of a finished one, its summary.

    Raises:
        UlsamError: the run there has other settings, or as of :func:`train` and :func:`resume`.
        Interrupted: as of :func:`train`.

    >>> import tempfile
    >>> from ulsam.data.birds import draw_birds
    >>> folder = tempfile.mkdtemp()
    >>> birds = draw_birds(f"{folder}/birds", classes=2, train=8, val=4, size=32)
    >>> small = {"model": "test_efficientnet", "size": 32, "batch_size": 8, "epochs": 1, "workers": 0}
    >>> config = TrainConfig(str(birds), **small)
    >>> train_or_resume(config, f"{folder}/run") == train_or_resume(config, f"{folder}/run")
    True
    """
    run = Path(out)
    if not (run / "config.yaml").exists():
        return train(config, run)
    restore.check_run(config, run)
    if (run / "summary.json").exists():
        return cast(TrainSummary, read_json(run / "summary.json"))
    given = {name: getattr(config, name) for name in restore.CHANGEABLE_ON_RESUME}
    return resume(run, {name: value for name, value in given.items() if value not in ("auto", None)})
