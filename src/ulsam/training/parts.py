"""What a training run is made of: images, model, batches, optimizer, each built from the settings."""

import dataclasses
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.optim import param_groups_weight_decay
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from ulsam.base.distributed import World
from ulsam.base.errors import MachineError, UlsamError, first_line, is_out_of_memory
from ulsam.base.extras import installed
from ulsam.base.reading import machine_fault
from ulsam.data import loading, opening, sources
from ulsam.data.augment import TrainTransform
from ulsam.data.cache import cache_for
from ulsam.model.build import make_spec, ulsam_parameters
from ulsam.model.spec import Edit, ModelSpec
from ulsam.surgery.places import match
from ulsam.surgery.trace import trace
from ulsam.training.config import TrainConfig
from ulsam.training.evaluate import spec_transform
from ulsam.training.optimizers import make_optimizer
from ulsam.training.schedules import schedule_of

DIVERGED = "diverged: "
"""What the error of a run begins with whose loss or gradient is no longer finite, also in the log of its process."""


def open_images(config: TrainConfig) -> tuple[sources.AnyImages, sources.AnyImages, list[str]]:
    """Training images, validation images and notes for the user; see `ulsam.data.opening.open_data`."""
    return opening.open_data(
        config.data,
        data_dir=config.data_dir,
        train_split=config.train_split,
        val_split=config.val_split,
        val_fraction=config.val_fraction,
        fold=config.fold,
        class_names=config.class_names,
        batch_size=config.batch_size,
        seed=config.seed,
        split_seed=config.split_seed,
    )


def spec_of_run(config: TrainConfig, classes: Sequence[str], several: bool = False) -> ModelSpec:
    """The spec that the settings describe; with thresholds of a half, where images may have ``several`` labels.

    Raises:
        UlsamError: the settings fit no model, or name a teacher for images of several labels.
    """
    if several and config.teacher:
        raise UlsamError("a teacher is for one class an image, and these images may have several labels")
    given = {name: getattr(config, name) for name in ("mean", "std", "interpolation", "crop_pct")}
    dropout = {"drop_rate": config.drop_rate, "drop_path_rate": config.drop_path}
    if config.channels != 3:
        dropout["in_chans"] = config.channels
    spec = make_spec(
        config.model,
        classes,
        [Edit.parse(text) for text in config.edits],
        size=config.size,
        model_args={**config.model_args, **{name: rate for name, rate in dropout.items() if rate}},
        **{name: value for name, value in given.items() if value is not None},
    )
    return dataclasses.replace(spec, thresholds=(0.5,) * len(spec.classes)) if several else spec


SMALLEST = 16
"""Pixels; smaller images are hardly meant: compact models halve the size five times."""


def notes_of(spec: ModelSpec) -> list[str]:
    """What is noteworthy about a run of this spec on this machine."""
    notes = []
    if not installed("matplotlib"):
        notes.append("no curves.png: matplotlib is not installed: pip install 'ulsam[plots]'")
    if max(spec.input_size[1:]) < SMALLEST:
        notes.append(
            f"images of {max(spec.input_size[1:])} px leave most models maps of a single pixel, from which "
            "they learn little: leave `size` out for the model's own"
        )
    return notes


def prepared_model(model: nn.Module, config: TrainConfig, spec: ModelSpec) -> nn.Module:
    """``model``, which is trained in place of the spec's, if it can be.

    Raises:
        UlsamError: a setting that would change the spec's model is given, the model does not run at the input size,
            or its outputs are not the classes.
    """
    for name in ("edits", "pretrained", "weights", "drop_rate", "drop_path"):
        if getattr(config, name):
            raise UlsamError(f"a prepared model is trained as it is: leave {name} out of its settings")
    shape = trace(model, spec.input_size)[""].output_shape
    if shape != (1, len(spec.classes)):
        raise UlsamError(
            f"the prepared model outputs {list(shape or ())} for an image; {[1, len(spec.classes)]} is right here"
        )
    return model


def train_transform(config: TrainConfig, spec: ModelSpec) -> TrainTransform:
    """What training makes of an image."""
    return TrainTransform(
        spec.input_size,
        mean=spec.mean,
        std=spec.std,
        interpolation=spec.interpolation,
        crop_scale=(config.crop_scale[0], config.crop_scale[1]),
        hflip=config.hflip,
        color_jitter=config.color_jitter,
        rand_augment=config.rand_augment,
        random_erasing=config.random_erasing,
    )


def batches_of(
    config: TrainConfig, spec: ModelSpec, images: sources.AnyImages, world: World
) -> tuple[loading.Loader, loading.EpochOrder | None, int, str | None]:
    """The loader, its order (None for a stream), the optimizer updates in an epoch, and what to say of the cache."""
    transform = train_transform(config, spec)
    order = None
    if isinstance(images, sources.StreamImages):
        batches = images.batches(config.batch_size, config.workers)
    else:
        balanced = config.sampler == "balanced"
        order = loading.EpochOrder(
            images, config.batch_size, config.seed, balanced=balanced, rank=world.rank, world=world.size
        )
        batches = len(order)
    if batches < config.accumulate:
        raise UlsamError(f"an epoch has {batches} batches, fewer than `accumulate={config.accumulate}`")
    cache, cache_line = cache_for(
        images, transform.reduction, config.cache, processes=world.size, channels=transform.channels
    )
    loader = loading.train_loader(
        images,
        transform,
        order,
        batch_size=config.batch_size,
        seed=config.seed,
        workers=config.workers,
        cache=cache,
        device=world.device,
    )
    return loader, order, batches // config.accumulate, cache_line


def val_batches_of(
    config: TrainConfig, spec: ModelSpec, images: sources.AnyImages, world: World
) -> Iterable[loading.Batch]:
    """The loader of the validation images, this process's share of them."""
    return loading.eval_loader(
        images,
        spec_transform(spec),
        batch_size=config.batch_size,
        workers=config.workers,
        rank=world.rank,
        world=world.size,
        device=world.device,
    )


def freeze(model: nn.Module, places: Sequence[str]) -> list[nn.Module]:
    """Keep the weights of the modules at these places as they are; the modules.

    Raises:
        UlsamError: a place that no module matches.
    """
    frozen = [model.get_submodule(name) for name in (match(model, places) if places else [])]
    for module in frozen:
        module.requires_grad_(False)
    return frozen


def optimizer_of(config: TrainConfig, model: nn.Module, epoch_updates: int) -> tuple[torch.optim.Optimizer, Scheduler]:
    """timm's optimizer and its schedule by updates; no weight decay on norms, biases and ULSAM's weights."""
    groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=ulsam_parameters(model))
    if not groups:
        raise UlsamError("every parameter is frozen: leave something to train out of `freeze`")
    if config.ulsam_lr != 1:
        groups = _scaled_groups(groups, model, config.ulsam_lr)
    optimizer = make_optimizer(groups, config.opt, config.opt_args, lr=config.lr, momentum=config.momentum)
    return optimizer, schedule_of(config, optimizer, epoch_updates)


def _scaled_groups(groups: list[dict[str, Any]], model: nn.Module, scale: float) -> list[dict[str, Any]]:
    """The groups, with the parameters of ULSAM layers in one of their own behind them, at ``scale`` times the rate."""
    ours = {id(model.get_parameter(name)) for name in ulsam_parameters(model)}
    own = [parameter for group in groups for parameter in group["params"] if id(parameter) in ours]
    if not own:
        raise UlsamError("`ulsam_lr` has nothing to act on: this model has no ULSAM layer that is trained")
    rest = [{**group, "params": [p for p in group["params"] if id(p) not in ours]} for group in groups]
    return [
        *(group for group in rest if group["params"]),
        {"params": own, "weight_decay": 0.0, "lr_scale": scale},  # timm's schedules multiply by lr_scale
    ]


Mixing = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def mixing_of(config: TrainConfig, n_classes: int, several: bool = False) -> Mixing | None:
    """timm's mixup and cutmix, or None; the label smoothing is then its own. ``several``: labels an image."""
    if not (config.mixup or config.cutmix):
        return None
    if several:
        mixup = Mixup(config.mixup, config.cutmix, label_smoothing=0.0, num_classes=config.batch_size)

        def mix(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            images, shares = mixup(images, torch.arange(len(images), device=images.device))  # of each image in each
            return images, smoothed(shares.to(labels) @ labels, config.smoothing)

        return mix
    found: Mixing = Mixup(config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=n_classes)
    return found


def smoothed(labels: Tensor, smoothing: float) -> Tensor:
    """Labels 0 to 1 of several an image, each moved towards a half.

    >>> smoothed(torch.tensor([[0.0, 1.0]]), 0.1)
    tensor([[0.0500, 0.9500]])
    """
    return labels * (1 - smoothing) + smoothing / 2


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn what is no bug, but a limit of the machine or of the model, into one line.

    Raises:
        UlsamError: the memory is full, BatchNorm got one value a channel, or torch.compile failed.
    """
    try:
        yield
    except RuntimeError as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise UlsamError(f"torch.compile failed: {first_line(error)}; use `compile=none`") from error
        if is_out_of_memory(error):
            raise UlsamError("the memory is full: use a smaller `batch_size`, and `accumulate` instead") from error
        raise
    except MemoryError as error:
        raise MachineError(f"no memory is left for training: {machine_fault(error)}") from error
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UlsamError("BatchNorm cannot train on one image at a time here: use `batch_size=2` or more") from error


@contextmanager
def same_generators(device: torch.device) -> Iterator[None]:
    """Leave Python's, NumPy's and PyTorch's random generators as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
