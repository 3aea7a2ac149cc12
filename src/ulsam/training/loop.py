"""The training loop, from settings to a model file.

Nothing random is saved: every image and every step seeds the generators anew from (seed, epoch, position), so a run
that was killed resumes from its last checkpoint to the same weights, bit for bit on the same machine and versions.
"""

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from logging import INFO, WARNING
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm

from ulsam.base import logs
from ulsam.base.distributed import World, lost_processes
from ulsam.base.errors import Interrupted, LostProcess, NotFinite, UlsamError
from ulsam.base.provenance import command_line, environment, versions
from ulsam.data import loading, sources
from ulsam.data.targets import check_labels
from ulsam.model.build import build, meta_model
from ulsam.surgery.cost import cost
from ulsam.training import best, class_weights, distill, parts, restore
from ulsam.training import summary as report
from ulsam.training.callbacks import Callback
from ulsam.training.checkpoint import Position, write_checkpoint
from ulsam.training.config import TrainConfig
from ulsam.training.evaluate import Scores, Stopped, evaluate_batches, outcomes
from ulsam.training.label_scores import LabelScores, evaluate_label_batches
from ulsam.training.optimizers import load_optimizer
from ulsam.training.probe import probe
from ulsam.training.reconstruct_first import reconstruct_model
from ulsam.training.signals import stop_signals
from ulsam.training.step import TrainingStep
from ulsam.training.trackers import open_trackers
from ulsam.training.train_summary import ImageCounts, TrainSummary
from ulsam.training.trained_on import seen_before
from ulsam.training.unreadable import Unreadable


class Trainer:
    """One run in one process: the parts are built here; :meth:`prepare` readies them, :meth:`fit` is the loop.

    ``fresh`` is False for a run that resumes from a checkpoint; ``model`` is trained in place of the settings' own.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        world: World,
        fresh: bool = True,
        model: nn.Module | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.config, self.run, self.world = config, run, world
        self.callbacks = [*callbacks, *open_trackers(config.track)] if world.writes else []
        self.fresh, self.prepared = fresh, model is not None
        loading.seed_all(config.seed)

        notes = self._open_images()
        notes += self._build_model(model)
        self.loader, self.order, self.epoch_updates, cached = parts.batches_of(
            config, self.spec, self.train_images, world
        )
        self.cost = cost(self.model, self.spec.input_size)
        self.base_cost = cost(meta_model(dataclasses.replace(self.spec, edits=())), self.spec.input_size)
        self._say(*report.data_lines(self.image_counts, self.val_images.split, len(self.classes), cached))
        self._say(*report.model_lines(config, self.cost, self.base_cost, prepared=model))
        notes += self._choose_losses()
        self._say(*(f"note    {note}" for note in [*notes, *parts.notes_of(self.spec)]))
        self.at = Position()
        self.best: best.State | None = None  # weights of the best epoch, where they are to be kept
        self.unreadable = {
            "train": Unreadable(len(self.train_images), config.max_unreadable, world.writes),
            "val": Unreadable(len(self.val_images), config.max_unreadable, world.writes),
        }

    def _open_images(self) -> list[str]:
        """Open the images, and note what identifies them; notes for the user."""
        self.train_images, self.val_images, notes = parts.open_images(self.config)
        best.check_chosen_on(self.config, self.val_images.split)
        images = self.train_images
        self.image_counts: ImageCounts = {"train": len(images), "val": len(self.val_images)}
        self.classes = images.classes
        self.several = isinstance(images, sources.LabelSetImages)
        self.image_names = hashlib.sha256("\0".join(images.names).encode(errors="surrogateescape")).hexdigest()
        self.image_state = images.state if isinstance(images, sources.FolderImages) and self.world.writes else None
        return notes

    def _build_model(self, model: nn.Module | None) -> list[str]:
        """The spec and its model, or the given one in its place; notes for the user."""
        self.spec = parts.spec_of_run(self.config, self.classes, self.several)
        if model is not None:
            self.model = parts.prepared_model(model, self.config, self.spec)
            return []
        pretrained, weights = (self.config.pretrained, self.config.weights) if self.fresh else (False, None)
        self.model, notes = build(self.spec, pretrained=pretrained, weights=weights)
        return notes + (seen_before([self.config]) if self.fresh else [])

    def _choose_losses(self) -> list[str]:
        """The weights of the classes and the teacher; notes for the user."""
        self.class_weights = class_weights.class_weights_of(self.config.class_weights, self.train_images)
        if self.class_weights:
            self._say(f"weights {class_weights.describe(self.class_weights)}")
        self.teacher = distill.open_teacher(self.config, self.spec, self.model)
        if self.teacher is None:
            return []
        self._say(f"teacher {distill.describe(self.config, self.teacher)}")
        return list(self.teacher.notes)

    def prepare(self) -> None:
        """Reconstruct the edited model, choose what the settings leave at "auto", and make the optimizer."""
        if self.fresh and not self.prepared:
            for line in reconstruct_model(self.config, self.spec, self.model, self.train_images, self.world):
                self._say(f"reconstruct {line}")
        self.config, choice = probe(
            self.config, self.model, self.spec.input_size, self.epoch_updates, self.world, teacher=self.teacher
        )
        self._say(*choice)
        self.training_step = TrainingStep(
            self.config, self.model, self.epoch_updates, self.world, self.teacher, self.class_weights, self.several
        )
        self.model, self.layout = self.training_step.model, self.training_step.layout
        self.optimizer = self.training_step.optimizer
        self.mixing = parts.mixing_of(self.config, len(self.classes), self.several)
        self.ema = ModelEmaV3(self.model, decay=self.config.ema, use_warmup=True) if self.config.ema else None

    def restore(self, saved: dict[str, Any]) -> None:
        """Resume from a checkpoint; says what is not as it was.

        Raises:
            UlsamError: the checkpoint is of another model, other classes, other settings or another number of
                processes.
        """
        try:
            restore.check_same(saved, self.config, self.classes, self.teacher, self.world.size, self.run, self.several)
            self.at = restore.position(saved["position"], self.config, self.epoch_updates)
            self.model.load_state_dict(saved["model"])
            load_optimizer(self.optimizer, saved["optimizer"], self.config.opt)
            self.training_step.scaler.load_state_dict(saved["scaler"])
            if self.ema:
                self.ema.module.load_state_dict(saved["ema"])
            if self.config.keep == "best":
                best.check_state(saved["best"], self.at.rows, self.model)
                self.best = saved["best"]
            for split, names in self.unreadable.items():
                names.reasons.update({str(name): str(reason) for name, reason in saved["unreadable"][split].items()})
        except UlsamError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UlsamError(f"the checkpoint in {self.run} is not of this run: {reason}") from error
        where = f"in epoch {self.at.epoch + 1}, after {self.at.batch} of its batches"
        self._say(f"resume  {'after the last epoch' if self._done else where}")
        for change in restore.environment_changes(saved["environment"], self._environment()):
            self._say(f"warning {change}; the weights will not be bit for bit those of an unbroken run", level=WARNING)

    def save(self) -> None:
        """Write the checkpoint: all processes call this, the first one writes."""
        if self.world.writes:
            state = {
                "environment": self._environment(),
                "settings": restore.fixed_settings(self.config),
                "prepared": self.prepared,
                "teacher": self.teacher.digest if self.teacher else None,
                "classes": list(self.classes),
                "several": self.several,
                "unreadable": {split: found.reasons for split, found in self.unreadable.items()},
                "position": dataclasses.asdict(self.at),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.training_step.scaler.state_dict(),
                "ema": self.ema.module.state_dict() if self.ema else None,
                "best": self.best,
            }
            write_checkpoint(self.run, state)

    def fit(self) -> TrainSummary:
        """Run the epochs that are left, measure, and write the result; the callbacks hear of it."""
        result: TrainSummary | None = None

        def end(callback: Callback) -> None:
            callback.end(result)

        with ExitStack() as ending:
            for callback in self.callbacks:
                callback.start(self.run, dataclasses.asdict(self.config), self.at.updates)
                ending.callback(end, callback)
            result = summary = self._fit()
        return summary

    def _fit(self) -> TrainSummary:
        config, world = self.config, self.world
        scores: Scores | LabelScores | None = None
        update_images = config.accumulate * config.batch_size * world.size
        bar: tqdm[Any] = logs.progress(
            total=config.epochs * self.epoch_updates * update_images,
            initial=self.at.updates * update_images,
            unit="img",
            leave=True,
            shown=world.writes,
        )
        with bar, stop_signals() as stopping, self._resumable(), parts.clear_errors():
            saved_at = time.monotonic()
            while not self._done:
                bar.set_description(f"epoch {self.at.epoch + 1}/{config.epochs}")
                epoch_batches = self.epoch_updates * config.accumulate
                batches = self._begin_epoch() if self.at.batch < epoch_batches else iter(())
                while self.at.batch < epoch_batches:
                    late = time.monotonic() - saved_at > config.save_seconds
                    loss, stop, save = self._update(batches, stopping(), late)
                    bar.update(update_images)
                    bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                    for callback in self.callbacks:
                        callback.step(self.at.updates, {"loss": loss, "lr": self.optimizer.param_groups[0]["lr"]})
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
            if self.best is not None and best.best_row(self.at.rows) != self.at.rows[-1]:
                self._result.load_state_dict(self.best)
                scores = None
            scores = scores or self._measure(stopping)
        return self._finish(scores)

    def _begin_epoch(self) -> Iterator[loading.Batch]:
        """Put everything in training mode; the batches of the epoch that are left."""
        self.training_step.train()
        loading.seed_all(self.config.seed, 3, self.at.epoch, self.world.rank)  # a stream's workers
        if self.order:
            self.order.epoch, self.order.start = self.at.epoch, self.at.batch
        elif isinstance(self.train_images, sources.StreamImages):
            self.train_images.set_epoch(self.at.epoch)
        return iter(self.loader)

    def _update(self, batches: Iterator[loading.Batch], stopping: bool, late: bool) -> tuple[float, bool, bool]:
        """One optimizer update: its mean loss, and whether any process wants to stop, or the first one to save."""
        config, at, world = self.config, self.at, self.world
        began = time.monotonic()
        self.training_step.schedule.step_update(at.updates + 1)
        loss_sum, count = 0.0, 0
        bad: list[tuple[str, str]] = []
        for turn in range(config.accumulate):
            batch = next(batches, None)
            if batch is None:
                raise UlsamError("the stream of shards has ended before its epoch: use no more `workers` than shards")
            bad += batch.unreadable
            if len(batch.labels) < config.batch_size:
                self.unreadable["train"].add(bad)
                tried = min(loading.TRIES, len(self.train_images))
                raise UlsamError(f"{tried} training images in a row cannot be read")
            loading.seed_all(config.seed, 2, at.epoch, at.batch + turn, world.rank)  # dropout, mixup
            images = batch.images.to(world.device, non_blocking=True, memory_format=self.layout)
            check_labels(batch.labels, len(self.classes), several=self.several)
            labels: Tensor = batch.labels.to(world.device, non_blocking=True)
            if self.mixing:
                images, labels = self.mixing(images, labels)
            smoothing = 0.0 if self.mixing else config.smoothing
            last = turn + 1 == config.accumulate
            loss_sum += self.training_step.add_gradients(images, labels, smoothing=smoothing, last=last) * len(images)
            count += len(images)

        shared = torch.tensor([loss_sum, count, stopping, world.writes and late, len(bad)], dtype=torch.float64)
        loss_sum, count, stop, save, met = world.sum(shared).tolist()
        if met:
            self.unreadable["train"].add(pair for share in world.gather(bad) for pair in share)
        if not math.isfinite(loss_sum):
            raise self._diverged(f"the loss is {loss_sum / count}", at.batch // config.accumulate + 1)
        self.training_step.update()
        at.batch += config.accumulate
        at.updates += 1
        at.loss_sum += loss_sum
        at.images += int(count)
        at.seconds += time.monotonic() - began
        if self.ema:
            self.ema.update(self.model, step=at.updates)
        return loss_sum / count, bool(stop), bool(save)

    def _measure(self, stopping: Callable[[], bool]) -> Scores | LabelScores:
        """Measure the model, or the average of its weights, on the validation images."""
        model = self._result
        self.world.agree(model.buffers())  # each process has BatchNorm statistics of its own; the first one's are saved
        batches = parts.val_batches_of(self.config, self.spec, self.val_images, self.world)
        how: dict[str, Any] = {
            "world": self.world,
            "amp": self.training_step.amp,
            "channels_last": self.config.layout == "channels_last",
            "progress": self.val_images.split if self.world.writes else None,
            "stop": stopping,
        }
        scores: Scores | LabelScores
        try:
            if self.several:
                scores = evaluate_label_batches(model, batches, self.classes, **how)
            else:
                scores = evaluate_batches(model, batches, len(self.classes), **how)
        except Stopped:
            epochs = self.at.epoch + (self.at.batch > 0)
            raise self._stopped(f"the measurement of epoch {epochs}") from None
        except NotFinite as error:
            raise self._diverged(str(error), self.at.batch // self.config.accumulate) from error
        self.unreadable["val"].add(scores.unreadable)
        return scores

    def _end_epoch(self, scores: Scores | LabelScores | None) -> None:
        """Add the epoch to the books and save."""
        at = self.at
        row = report.epoch_row(at, self.optimizer.param_groups[0]["lr"], scores, self.several)
        self.at = Position(epoch=at.epoch + 1, updates=at.updates, rows=[*at.rows, row])
        if self.config.keep == "best" and best.best_row(self.at.rows) == row:
            self.best = best.state_of(self._result)
        if self.world.writes:
            report.write_metrics(self.run, self.at.rows)
        self.save()
        for callback in self.callbacks:
            callback.epoch(row, self.at.updates)
        self._say(report.epoch_line(row, self.config.epochs, self.val_images.split))

    def _finish(self, scores: Scores | LabelScores) -> TrainSummary:
        """Write the model file, the curves and, last, the summary: with it the run is finished."""
        if isinstance(scores, LabelScores):
            self.spec = dataclasses.replace(self.spec, thresholds=scores.thresholds)
        summary: TrainSummary = {
            "command": command_line(),
            "config": dataclasses.asdict(self.config),
            "spec": report.spec_entry(self.spec),
            "prepared": self.prepared,
            "class_weights": self.class_weights,
            "teacher": report.teacher_entry(self.teacher) if self.teacher else None,
            "images": self.image_counts,
            "split": self.val_images.split,
            "scores": report.score_entry(scores, self.classes),
            "outcomes": outcomes(scores, self.val_images) if isinstance(scores, Scores) else None,
            "cost": report.cost_entry(self.cost),
            "base_cost": report.cost_entry(self.base_cost),
            "epochs": self.at.rows,
            "kept": best.kept_entry(self.config, self.at.rows, self.val_images.split),
            "unreadable": {"train": self.unreadable["train"].names, "val": self.unreadable["val"].names},
            "versions": {**versions(), "device": self.world.device.type},
        }
        if self.world.writes:
            report.write_result(self.run, summary, self._result, None if self.prepared else self.spec)
        return summary

    @property
    def _result(self) -> nn.Module:
        """What is measured and saved: the model, or the average of its weights."""
        return self.ema.module if self.ema else self.model

    @property
    def _done(self) -> bool:
        return self.at.epoch == self.config.epochs or best.is_over(self.at.rows, self.config.patience)

    def _diverged(self, what: str, step: int) -> UlsamError:
        taught = ", or a lower `distill_features`" if self.config.distill_features else ""
        return UlsamError(
            f"{parts.DIVERGED}{what} in epoch {self.at.epoch + 1}, step {step}, at learning rate "
            f"{self.optimizer.param_groups[0]['lr']:.3g}: try a lower `lr`, `clip_grad=1`, or `amp=none`{taught}"
        )

    def _stopped(self, where: str) -> Interrupted:
        call = restore.resume_call(self.run, self.prepared)
        return Interrupted(f"stopped in {where}", f"resume with: {call}", None if self.prepared else self.run)

    @contextmanager
    def _resumable(self) -> Iterator[None]:
        """Within it the end of another process says how to resume."""
        try:
            with lost_processes():
                yield
        except LostProcess as lost:
            call = restore.resume_call(self.run, self.prepared)
            raise LostProcess(lost.event, f"resume with: {call}", None if self.prepared else self.run) from lost

    def _environment(self) -> dict[str, str]:
        """What must be as it was for a resumed run to end in the same weights."""
        images = f"{len(self.train_images)} (names {self.image_names[:8]})"
        found = {**environment(), "device": self.world.device.type, "training images": images}
        return {**found, "image files": self.image_state} if self.image_state else found

    def _say(self, *lines: str, level: int = INFO) -> None:
        for line in lines if self.world.writes else ():
            logs.say(line, level=level)
