"""The training loop, from settings to a model file.

Nothing random is saved: every picture and every step seeds the generators anew from (seed, epoch, position), so a run
that was killed goes on from its last checkpoint to the same weights, bit for bit on the same machine and versions.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ulsam.costs import Cost, cost
from ulsam.data import loading, sources
from ulsam.distributed import World, launch_line, start
from ulsam.errors import UlsamError, printable
from ulsam.evaluate import NotFinite, Scores, Stopped, evaluate, recipe_transform
from ulsam.files import clear_parts, write_atomic
from ulsam.models import build, save_model, sketch
from ulsam.places import match
from ulsam.train import parts, report
from ulsam.train.config import TrainConfig, read_config
from ulsam.train.state import environment, read_checkpoint, write_checkpoint

#: Settings that a resumed run may change: what is trained, and how, stays the same.
HARMLESS = ("data", "data_dir", "workers", "cache", "max_unreadable", "device", "threads", "save_seconds")


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: the state is saved, and the message says how to go on."""


@dataclass
class Position:
    """How far a run has come: with the weights, their average and the optimizer this is its whole state."""

    epoch: int = 0  # epochs that are finished
    batch: int = 0  # batches that each process did in the current one
    updates: int = 0  # of the weights, in all
    loss_sum: float = 0.0  # over the pictures of the current epoch
    pictures: int = 0
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)  # of metrics.csv


def train(config: TrainConfig, run: str | Path) -> dict[str, Any]:
    """Train a net and write everything about it into the new folder ``run``.

    The folder then holds ``config.yaml`` (repeats the run), ``metrics.csv``, ``curves.png``, ``checkpoint.pt``,
    ``model.safetensors`` (the last epoch's weights, or their average; no epoch is picked by its score) and
    ``summary.json``, whose content is returned. Under torchrun all processes call this, and the first one writes.

    Raises:
        UlsamError: the folder is not empty, the data or the net is not usable, the loss is no longer finite, too many
            pictures cannot be read, or the disk is full.
        Interrupted: Ctrl-C or SIGTERM, after saving.
    """
    run = Path(run)
    with start(config.device) as world:
        config = parts.resolved(config, world)
        _check_free(run)
        trainer = Trainer(config, run, world)  # before the folder is made: most mistakes show here
        if world.writes:
            try:
                run.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UlsamError(f"cannot make the folder {run}: {error.strerror}") from error
            write_atomic(run / "config.yaml", config.to_yaml())
        return trainer.fit()


def resume(run: str | Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Go on with a run that was stopped or killed, to the end that it would have had.

    Args:
        run: its folder.
        overrides: settings; only those in `HARMLESS` may differ from the run's own.

    Raises:
        UlsamError: not the folder of a run, a finished one, a setting or a number of processes that would change the
            result, or a checkpoint that is not this run's.
    """
    run = Path(run)
    if not os.path.isfile(run / "config.yaml"):
        raise UlsamError(f"{run} is not the folder of a run: there is no config.yaml in it")
    if os.path.isfile(run / "summary.json"):
        raise UlsamError(f"{run} is finished: its result is in {run / 'summary.json'}")
    before = read_config(run / "config.yaml")
    config = TrainConfig.from_mapping({**before, **(overrides or {})})
    for name, value in dataclasses.asdict(TrainConfig.from_mapping(before)).items():
        if name not in HARMLESS and getattr(config, name) != value:
            raise UlsamError(f"--resume goes on with the run's own settings: {name} was {value} and cannot be changed")
    saved = read_checkpoint(run)
    with start(config.device) as world:
        trainer = Trainer(parts.resolved(config, world), run, world, fresh=saved is None)
        if saved is not None:
            trainer.restore(saved)
        if world.writes:
            clear_parts(run)
        return trainer.fit()


class Trainer:
    """One run in one process: the parts are built here, :meth:`fit` is the loop."""

    def __init__(self, config: TrainConfig, run: Path, world: World, fresh: bool = True) -> None:
        self.config, self.run, self.world = config, run, world
        if config.threads:
            torch.set_num_threads(config.threads)
        loading.seed_all(config.seed)

        self.train_pictures, self.val_pictures, notes = parts.open_pictures(config)
        self.classes = self.train_pictures.classes
        names = hashlib.sha256("\0".join(self.train_pictures.names).encode(errors="surrogateescape")).hexdigest()
        self.identity = f"{len(self.train_pictures)} (names {names[:8]})"
        self.recipe = parts.recipe_of(config, self.classes)
        start_weights: dict[str, Any] = {"pretrained": config.pretrained, "weights": config.weights} if fresh else {}
        model, skipped = build(self.recipe, **start_weights)
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = model.to(world.device).to(memory_format=self.layout)
        self.frozen = [model.get_submodule(name) for name in (match(model, config.freeze) if config.freeze else [])]
        for module in self.frozen:
            module.requires_grad_(False)

        self.loader, self.order, self.epoch_updates, cache_line = parts.batches_of(
            config, self.recipe, self.train_pictures, world
        )
        self.optimizer, self.schedule = parts.optimizer_of(config, self.model, self.epoch_updates)
        self.mixing = parts.mixing_of(config, len(self.classes))
        self.amp = parts.AMP_DTYPES[config.amp]
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.amp == torch.float16)
        self.ema = ModelEmaV3(self.model, decay=config.ema, use_warmup=True) if config.ema else None
        self.net: nn.Module = self.model
        if world.size > 1:
            ids = [world.device] if world.device.type == "cuda" else None
            self.net = DistributedDataParallel(self.model, device_ids=ids)

        self.at = Position()
        self.unreadable = {
            "train": parts.Unreadable(len(self.train_pictures), config.max_unreadable, world.writes),
            "val": parts.Unreadable(len(self.val_pictures), config.max_unreadable, world.writes),
        }
        self.cost = cost(self.model, self.recipe.input_size)
        self.base_cost = cost(sketch(dataclasses.replace(self.recipe, edits=())), self.recipe.input_size)
        n_train, n_val = len(self.train_pictures), len(self.val_pictures)
        self._say(
            f"data    {n_train} training, {n_val} {self.val_pictures.split} pictures of {len(self.classes)} classes"
        )
        if cache_line:
            self._say(f"cache   {cache_line}")
        self._say(f"net     {config.model}; edits: {'; '.join(config.edits) or 'none'}")
        self._say(f"cost    {_cost_line(self.cost, self.base_cost)}")
        for note in [*notes, *skipped]:
            self._say(f"note    {note}")

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from a checkpoint; says what is not as it was.

        Raises:
            UlsamError: the checkpoint is of another net, other classes, other settings or another number of processes.
        """
        try:
            self._check_same(saved)
            self.at = self._position(saved["position"])
            self.model.load_state_dict(saved["model"])
            self._restore_optimizer(saved["optimizer"])
            self.scaler.load_state_dict(saved["scaler"])
            if self.ema:
                self.ema.module.load_state_dict(saved["ema"])
            for split, names in self.unreadable.items():
                names.reasons.update({str(name): str(reason) for name, reason in saved["unreadable"][split].items()})
        except UlsamError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UlsamError(f"the checkpoint in {self.run} is not of this run: {reason}") from error
        if self.at.epoch == self.config.epochs:
            self._say("resume  after the last epoch")
        else:
            self._say(f"resume  in epoch {self.at.epoch + 1}, after {self.at.batch} of its batches")
        for name, now in self._environment().items():
            if now != saved["environment"].get(name):
                change = f"{name}: {saved['environment'].get(name)} before, {now} now"
                self._say(f"warning {change}; the weights will not be bit for bit those of an unbroken run")

    def _check_same(self, saved: dict[str, Any]) -> None:
        """Raise unless the run was started with these settings, classes and as many processes."""
        processes = saved["environment"]["processes"]
        if processes != str(self.world.size):
            raise UlsamError(f"this run has {processes} process(es), not {self.world.size}: start as many")
        if saved["classes"] != list(self.classes):
            raise UlsamError("the data has other classes than this run was started with")
        for name, now in self._settings().items():
            if saved["settings"][name] != now:
                raise UlsamError(
                    f"{self.run / 'config.yaml'} was changed: {name} was {saved['settings'][name]} and is {now} now; "
                    "put it back, or start a new run"
                )

    def _position(self, saved: dict[str, Any]) -> Position:
        """The position in a checkpoint; raises ValueError and what else a wrong one leads to."""
        at = Position(**saved)
        batches = self.epoch_updates * self.config.accumulate
        for name, most in (("epoch", self.config.epochs), ("batch", batches), ("updates", None), ("pictures", None)):
            value = saved.get(name, 0)
            if type(value) is not int or value < 0 or (most is not None and value > most):
                raise ValueError(f"{name} is {value!r}" + ("" if most is None else f", not 0 to {most}"))
        if not (type(at.loss_sum) is type(at.seconds) is float and math.isfinite(at.loss_sum) and at.seconds >= 0):
            raise ValueError(f"loss and seconds are {at.loss_sum!r}, {at.seconds!r}")
        if at.batch % self.config.accumulate or (at.batch and not (at.pictures and at.seconds)):
            raise ValueError(f"batch is {at.batch}, after {at.pictures} pictures in {at.seconds} s")
        sound = all(
            tuple(row) == report.COLUMNS and all(value is None or type(value) in (int, float) for value in row.values())
            for row in at.rows
        )
        if len(at.rows) != at.epoch or not sound:
            raise ValueError(f"{at.epoch} epochs, but its rows are not theirs")
        return at

    def _restore_optimizer(self, saved: dict[str, Any]) -> None:
        """Give the optimizer its state; raises ValueError and what else the state of another one leads to."""
        new = self.optimizer.state_dict()["param_groups"]
        for group, other in zip(new, saved["param_groups"], strict=True):
            changed = [
                name for name in group.keys() | other.keys() if name != "lr" and group.get(name) != other.get(name)
            ]
            if changed:
                raise ValueError(f"{min(changed)} of its optimizer is not that of {self.config.opt}")
        self.optimizer.load_state_dict(saved)
        kinds = {"momentum_buffer"} if self.config.opt == "sgd" else {"step", "exp_avg", "exp_avg_sq"}
        for parameter, state in self.optimizer.state.items():
            fits = all(value.numel() == 1 or value.shape == parameter.shape for value in state.values())
            if state.keys() != kinds or not fits:
                raise ValueError(f"the state of its optimizer is not that of {self.config.opt}")

    def save(self) -> None:
        """Write the checkpoint: all processes call this, the first one writes."""
        if self.world.writes:
            state = {
                "environment": self._environment(),
                "settings": self._settings(),
                "classes": list(self.classes),
                "unreadable": {split: found.reasons for split, found in self.unreadable.items()},
                "position": dataclasses.asdict(self.at),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "ema": self.ema.module.state_dict() if self.ema else None,
            }
            write_checkpoint(self.run, state)

    def fit(self) -> dict[str, Any]:
        """Run the epochs that are left, measure, and write the result."""
        config, world = self.config, self.world
        scores: Scores | None = None
        update_pictures = config.accumulate * config.batch_size * world.size
        bar = tqdm(
            total=config.epochs * self.epoch_updates * update_pictures,
            initial=self.at.updates * update_pictures,
            unit="img",
            disable=None if world.writes else True,
        )
        with bar, parts.plain_words(), parts.stop_signals() as stopping:
            saved_at = time.monotonic()
            while self.at.epoch < config.epochs:
                bar.set_description(f"epoch {self.at.epoch + 1}/{config.epochs}")
                epoch_batches = self.epoch_updates * config.accumulate
                batches = self._begin_epoch() if self.at.batch < epoch_batches else iter(())
                while self.at.batch < epoch_batches:
                    late = time.monotonic() - saved_at > config.save_seconds
                    loss, stop, save = self._update(batches, stopping(), late)
                    bar.update(update_pictures)
                    bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                    if (stop or save) and (self.order or self.at.batch == epoch_batches):
                        self.save()
                        saved_at = time.monotonic()
                    if stop:
                        raise self._stopped(f"epoch {self.at.epoch + 1}, step {self.at.batch // config.accumulate}")
                epoch = self.at.epoch + 1
                measured = epoch % config.val_every == 0 or epoch == config.epochs
                if measured:
                    self.save()  # what goes wrong in measuring loses no training
                scores = self._measure(stopping) if measured else None
                self._end_epoch(scores)
                saved_at = time.monotonic()
            scores = scores or self._measure(stopping)
        return self._finish(scores)

    def _begin_epoch(self) -> Iterator[loading.Batch]:
        """Put everything in training mode; the batches of the epoch that are left."""
        self.net.train()
        for module in self.frozen:
            module.eval()  # BatchNorm statistics too
        loading.seed_all(self.config.seed, 3, self.at.epoch, self.world.rank)  # a stream's workers
        if self.order:
            self.order.epoch, self.order.start = self.at.epoch, self.at.batch
        elif isinstance(self.train_pictures, sources.StreamPictures):
            self.train_pictures.set_epoch(self.at.epoch)
        return iter(self.loader)

    def _update(self, batches: Iterator[loading.Batch], stopping: bool, late: bool) -> tuple[float, bool, bool]:
        """One optimizer update: its mean loss, and whether any process wants to stop, or the first one to save."""
        config, at, world, net = self.config, self.at, self.world, self.net
        began = time.monotonic()
        self.schedule.step_update(at.updates + 1)
        loss_sum, pictures = 0.0, 0
        bad: list[tuple[str, str]] = []
        for turn in range(config.accumulate):
            batch = next(batches, None)
            if batch is None:
                raise UlsamError("the stream of shards has ended before its epoch: use no more --workers than shards")
            bad += batch.unreadable
            if len(batch.labels) < config.batch_size:
                self.unreadable["train"].add(bad)
                tried = min(loading.TRIES, len(self.train_pictures))
                raise UlsamError(f"{tried} training pictures in a row cannot be read")
            loading.seed_all(config.seed, 2, at.epoch, at.batch + turn, world.rank)  # dropout, mixup
            images = batch.images.to(world.device, non_blocking=True, memory_format=self.layout)
            loading.check_labels(batch.labels, len(self.classes))
            labels: Tensor = batch.labels.to(world.device, non_blocking=True)
            if self.mixing:
                images, labels = self.mixing(images, labels)
            more = isinstance(net, DistributedDataParallel) and turn + 1 < config.accumulate
            with net.no_sync() if more else contextlib.nullcontext():  # type: ignore[operator]
                with torch.autocast(world.device.type, dtype=self.amp, enabled=self.amp is not None):
                    logits = net(images)
                smoothing = 0.0 if self.mixing else config.smoothing
                loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
                self.scaler.scale(loss / config.accumulate).backward()
            loss_sum += loss.item() * len(images)
            pictures += len(images)

        shared = torch.tensor([loss_sum, pictures, stopping, world.writes and late, len(bad)], dtype=torch.float64)
        loss_sum, pictures, stop, save, met = world.sum(shared).tolist()
        if met:
            self.unreadable["train"].add(pair for share in world.gather(bad) for pair in share)
        if not math.isfinite(loss_sum):
            raise self._diverged(f"the loss is {loss_sum / pictures}", at.batch // config.accumulate + 1)
        if config.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        at.batch += config.accumulate
        at.updates += 1
        at.loss_sum += loss_sum
        at.pictures += int(pictures)
        at.seconds += time.monotonic() - began
        if self.ema:
            self.ema.update(self.model, step=at.updates)
        return loss_sum / pictures, bool(stop), bool(save)

    def _measure(self, stopping: Callable[[], bool]) -> Scores:
        """Measure the net, or the average of its weights, on the validation pictures."""
        net = self.ema.module if self.ema else self.model
        self.world.agree(net.buffers())  # each process has BatchNorm statistics of its own; the first one's are saved
        batches = loading.eval_loader(
            self.val_pictures,
            recipe_transform(self.recipe),
            batch_size=self.config.batch_size,
            workers=self.config.workers,
            rank=self.world.rank,
            world=self.world.size,
            device=self.world.device,
        )
        try:
            scores = evaluate(
                net,
                batches,
                len(self.classes),
                world=self.world,
                amp=self.amp,
                channels_last=self.config.channels_last,
                progress=self.val_pictures.split if self.world.writes else None,
                stop=stopping,
            )
        except Stopped:
            epochs = self.at.epoch + (self.at.batch > 0)
            raise self._stopped(f"the measurement of epoch {epochs}") from None
        except NotFinite as error:
            raise self._diverged(str(error), self.at.batch // self.config.accumulate) from error
        self.unreadable["val"].add(scores.unreadable)
        return scores

    def _end_epoch(self, scores: Scores | None) -> None:
        """Add the epoch to the books and save."""
        at = self.at
        row = {
            "epoch": at.epoch + 1,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": at.loss_sum / at.pictures,
            "val_loss": scores and scores.loss,
            "val_top1": scores and scores.top1,
            "val_top5": scores and scores.top5,
            "seconds": round(at.seconds, 2),
            "images_per_second": round(at.pictures / at.seconds, 1),
        }
        self.at = Position(epoch=at.epoch + 1, updates=at.updates, rows=[*at.rows, row])
        if self.world.writes:
            report.write_metrics(self.run, self.at.rows)
        self.save()
        split = self.val_pictures.split
        measured = f"{split} top-1 {100 * scores.top1:.2f} %, loss {scores.loss:.4f}" if scores else "not measured"
        self._say(
            f"epoch   {row['epoch']}/{self.config.epochs}: training loss {row['train_loss']:.4f}, {measured} "
            f"({row['images_per_second']:.0f} img/s)"
        )

    def _finish(self, scores: Scores) -> dict[str, Any]:
        """Write the model file, the curves and, last, the summary: with it the run is finished."""
        bad = {split: sorted(found.reasons) for split, found in self.unreadable.items()}
        summary = {
            "command": report.command_line(),
            "config": dataclasses.asdict(self.config),
            "recipe": json.loads(self.recipe.to_json()),
            "pictures": {"train": len(self.train_pictures), "val": len(self.val_pictures)},
            "split": self.val_pictures.split,
            "scores": report.score_entry(scores, self.classes),
            "cost": report.cost_entry(self.cost),
            "base_cost": report.cost_entry(self.base_cost),
            "epochs": self.at.rows,
            "unreadable": bad,
            "versions": {**report.versions(), "device": self.world.device.type},
        }
        if self.world.writes:
            save_model(self.ema.module if self.ema else self.model, self.recipe, self.run / "model.safetensors")
            report.draw_curves(self.run, self.at.rows, self.val_pictures.split)
            report.write_summary(self.run, summary)
        low, high = scores.interval
        self._say(
            f"result  top-1 {100 * scores.top1:.2f} % (95 % interval {100 * low:.1f} to {100 * high:.1f}), "
            f"top-5 {100 * scores.top5:.2f} % on {scores.pictures} {self.val_pictures.split} pictures; {self.run}"
        )
        if count := len(bad["train"]) + len(bad["val"]):
            self._say(f"note    {count} pictures could not be read; they are named above and in summary.json")
        return summary

    def _diverged(self, what: str, step: int) -> UlsamError:
        return UlsamError(
            f"{what} in epoch {self.at.epoch + 1}, step {step}, at learning rate "
            f"{self.optimizer.param_groups[0]['lr']:.3g}: try a lower --lr, --clip-grad 1, or --amp none"
        )

    def _stopped(self, where: str) -> Interrupted:
        return Interrupted(f"stopped in {where}; go on with: {launch_line(['train', '--resume', str(self.run)])}")

    def _settings(self) -> dict[str, Any]:
        """The settings that a resumed run may not change."""
        return {name: value for name, value in dataclasses.asdict(self.config).items() if name not in HARMLESS}

    def _environment(self) -> dict[str, str]:
        """What must be as it was for a resumed run to end in the same weights."""
        return {**environment(), "device": self.world.device.type, "training pictures": self.identity}

    def _say(self, line: str) -> None:
        if self.world.writes:
            tqdm.write(printable(line))


def _check_free(run: Path) -> None:
    """Raise unless there is no such folder, or an empty one."""
    try:
        taken = run.exists() and not (run.is_dir() and all(path.name.startswith(".") for path in run.iterdir()))
    except OSError as error:
        raise UlsamError(f"cannot make the folder {run}: {error.strerror}") from error
    if taken:
        resume = f"go on with --resume {run}, or " if (run / "config.yaml").is_file() else ""
        raise UlsamError(f"{run} exists: {resume}choose another --out")


def _cost_line(edited: Cost, base: Cost) -> str:
    def change(now: int, before: int) -> str:
        return "" if now == before else f" ({100 * (now / before - 1):+.1f} % against the base net)"

    size = "x".join(map(str, edited.input_size))
    return (
        f"{edited.params / 1e6:.3f} M parameters{change(edited.params, base.params)}, "
        f"{edited.macs / 1e6:.1f} M MACs{change(edited.macs, base.macs)} at {size}"
    )
