"""Every setting of a training run, as one flat typed value that a YAML file holds and the command line fills."""

# ruff: noqa: RUF009  (_option makes dataclass fields)

import dataclasses
import difflib
import math
import os
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self, get_type_hints

import yaml

from ulsam.base.errors import UlsamError
from ulsam.base.processes import MAX_WORKERS
from ulsam.base.reading import read_text
from ulsam.data.folds import parse_fold
from ulsam.training.setting_kinds import MOMENTUM, checked, is_number


def _option(default: Any, help: str) -> Any:
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


_LARGE = 1_000_000
_RANGES: dict[str, tuple[float, float]] = {  # least and most, both included; no run needs more
    **dict.fromkeys(("epochs", "val_every", "accumulate", "decay_epochs", "patience"), (1, _LARGE)),
    **dict.fromkeys(("seed", "split_seed"), (0, 2**63 - 1)),
    **dict.fromkeys(("mixup", "cutmix", "color_jitter", "weight_decay", "decay_rate"), (0, 1000)),
    **dict.fromkeys(("min_lr", "warmup_epochs", "save_seconds"), (0, 1e9)),
    "distill_features": (0, 3e38),
    "batch_size": (1, 65_536),
    "size": (1, 8192),
    "in_chans": (1, 64),
    "threads": (1, 1024),  # OpenMP ends the process where it cannot make as many as it is asked for
    "workers": (0, MAX_WORKERS),
    "distill_temperature": (0, 1000),
    "reconstruct_images": (0, 100 * _LARGE),
}
_POLICY = {"m": 30, "mmax": 10, "n": 16, "mstd": 1000, "p": 1, "inc": 1, "w": 16, "d": 16}  # most of each number
_MAX_YAML = 1_000_000  # characters of settings
_SHARES = (
    "smoothing",
    "hflip",
    "random_erasing",
    "drop_rate",
    "drop_path",
    "ema",
    "max_unreadable",
    "distill",
    "val_fraction",
)
_SCHEDULES = {  # which schedules a setting is for
    "decay_rate": ("step", "multistep", "poly"),
    "decay_epochs": ("step",),
    "decay_milestones": ("multistep",),
    "min_lr": ("cosine", "tanh", "poly"),
}
_TAUGHT = {"distill": 0.5, "distill_temperature": 4.0, "distill_features": 0.0}  # where a teacher is given


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run; each field's help text is shown by ``ulsam train --help``.

    Where ``model`` is a model file, its architecture, edits, image and weights are taken into the settings.

    >>> TrainConfig(data="birds", edits=["replace 14,17 g=4"]).epochs
    10
    >>> TrainConfig(data="birds", model="mobilenetv2_100.grocery81_slim75").model
    'mobilenetv2_100'
    """

    # data
    data: str = field(
        metadata={"help": "image folder (train/ with val/ or test/, or class folders), CSV, or timm name"}
    )
    data_dir: str | None = _option(
        None, "where a named data set (torch/..., hfds/..., wds/...) or the images of a CSV lie"
    )
    train_split: str = _option("train", "name of the split to train on")
    val_split: str | None = _option(None, "name of the split to measure on (default: val, else test, else held out)")
    val_fraction: float | None = _option(None, "hold this share of the training images out and measure on it")
    fold: str | None = _option(None, "K/N, such as 2/5: hold the Kth of N parts of the training images out")
    split_seed: int | None = _option(None, "of the choice of the images that are held out (default: seed)")
    class_names: str | None = _option(None, "text file with the class names of a wds/ data set, one a line")
    sampler: Literal["shuffle", "balanced"] = _option("shuffle", "balanced: every class equally often")
    workers: int = _option(2, "processes that read and augment images")
    cache: Literal["auto", "true", "false"] = _option(
        "auto", "keep decoded training images in memory; auto: if they fit into a quarter of what is available"
    )
    max_unreadable: float = _option(0.1, "stop when more than this share (and more than 3) cannot be read")
    # model
    model: str = _option("mobilenetv2_100", "timm's name of the base model, or a model file, to train that further")
    model_args: dict[str, Any] = _option({}, "JSON object of further arguments for timm's create_model")
    edits: list[str] = _option([], "changes of the model, e.g. 'replace 14,17 g=4'")
    pretrained: bool = _option(False, "start from timm's hub weights of the base model")
    weights: str | None = _option(None, "start from this weight file (safetensors, or a PyTorch checkpoint)")
    reconstruct: bool = _option(
        True, "from weights: train the layers behind removed and replaced blocks towards the unedited model's features"
    )
    reconstruct_images: int = _option(512, "images to reconstruct on; 0: none, and new layers start as made")
    images_for_reconstruction: str | None = _option(
        None, "folder of images to reconstruct on; labels are not needed (default: the training images)"
    )
    freeze: list[str] = _option([], "modules (names or globs) whose weights and BatchNorm statistics stay as they are")
    # teacher
    teacher: str | None = _option(None, "model file of a trained model to learn from too, on the same classes")
    distill: float | None = _option(
        None, "weight of the teacher's soft targets against the labels, 0..1 (default: 0.5)"
    )
    distill_temperature: float | None = _option(None, "temperature that softens the targets (default: 4)")
    distill_features: float | None = _option(None, "weight of the difference of feature maps (default: 0, off)")
    # image
    in_chans: int | None = _option(
        None, "channels of the images (default: 3, RGB); 1 is gray, other numbers are taken as they are stored"
    )
    size: int | None = _option(None, "height and width of the input in pixels (default: the model's own)")
    mean: list[float] | None = _option(None, "of the input normalization, a channel (default: the model's own)")
    std: list[float] | None = _option(None, "of the input normalization, a channel (default: the model's own)")
    interpolation: str | None = _option(None, "bilinear or bicubic (default: the model's own)")
    crop_pct: float | None = _option(None, "share of the image that the center crop keeps when measuring")
    crop_scale: list[float] = _option([0.25, 1.0], "least and largest area of the random crop in training")
    hflip: float = _option(0.5, "probability of a horizontal flip")
    color_jitter: float = _option(0.0, "strength of random brightness, contrast and saturation")
    rand_augment: str | None = _option(None, "timm's RandAugment policy, e.g. rand-m7-n2-mstd0.5")
    random_erasing: float = _option(0.0, "probability of erasing a rectangle")
    mixup: float = _option(0.0, "alpha of mixup; 0 is off")
    cutmix: float = _option(0.0, "alpha of cutmix; 0 is off")
    # optimization
    epochs: int = _option(10, "passes over the training images")
    batch_size: int = _option(32, "images a step and process")
    accumulate: int = _option(1, "steps whose gradients are added up before an update")
    opt: str = _option("sgd", "timm's name of the optimizer; sgd is with Nesterov momentum")
    opt_args: dict[str, Any] = _option({}, "JSON object of further arguments of the optimizer, e.g. its betas")
    lr: float = _option(0.01, "peak learning rate")
    ulsam_lr: float = _option(1.0, "the learning rate of ULSAM layers, as a multiple of that of the rest")
    momentum: float = _option(MOMENTUM, "of optimizers that have one, as sgd has")
    weight_decay: float = _option(1e-4, "not applied to norms, biases and ULSAM's weights")
    sched: Literal["cosine", "tanh", "poly", "step", "multistep", "constant"] = _option(
        "cosine", "timm's name of the schedule of the learning rate"
    )
    decay_rate: float | None = _option(
        None, "factor of step and multistep (default: 0.1), or the power of poly (default: 1, a straight line)"
    )
    decay_epochs: int | None = _option(None, "epochs between the falls of step (default: a third of all)")
    decay_milestones: list[float] = _option([], "epochs after which multistep falls")
    warmup_epochs: float = _option(0.5, "epochs of linear warm-up from 0")
    min_lr: float = _option(0.0, "learning rate at the end of cosine, tanh and poly")
    clip_grad: float | None = _option(None, "largest norm of the gradient")
    class_weights: dict[str, float] | str | None = _option(
        None, "of the training loss: balanced, or a JSON object of weights by class name"
    )
    smoothing: float = _option(0.1, "label smoothing")
    drop_rate: float = _option(0.0, "dropout before the classifier")
    drop_path: float = _option(0.0, "stochastic depth, where the model has it")
    ema: float = _option(0.0, "decay of the averaged weights, which are then measured and saved; 0 is off")
    # machine
    device: str = _option("auto", "auto, cpu, cuda or mps")
    layout: Literal["auto", "contiguous", "channels_last"] = _option("auto", "of images and weights; auto: by a probe")
    amp: Literal["auto", "none", "bf16", "fp16"] = _option("auto", "mixed precision; auto: by a probe")
    compile: Literal["auto", "none", "inductor"] = _option(
        "auto", "torch.compile; auto: by a probe, in long runs alone"
    )
    threads: int | None = _option(None, "CPU threads of training (default: PyTorch's, one a core)")
    seed: int = _option(0, "of everything random")
    # run
    val_every: int = _option(1, "measure every N epochs, and after the last one")
    keep: Literal["last", "best"] = _option(
        "last", "which epoch's weights are saved; best: of the highest validation top-1, then the lowest loss"
    )
    patience: int | None = _option(
        None, "stop where no epoch was better on the validation images for so many (default: never)"
    )
    save_seconds: float = _option(120.0, "at least this long between two checkpoints within an epoch")
    track: list[str] = _option([], "trackers to report to: tensorboard, wandb, mlflow")

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = getattr(self, spec.name)
            object.__setattr__(self, spec.name, checked(spec.name, value, _KINDS[spec.name]))
        if self.model != type(self).model:
            from ulsam.training.from_model_file import settings_from  # lazy, as it imports timm

            for name, value in settings_from(vars(self)).items():
                object.__setattr__(self, name, value)
        for name, default in _TAUGHT.items():
            if self.teacher is not None and getattr(self, name) is None:
                object.__setattr__(self, name, default)
            elif self.teacher is None and getattr(self, name) is not None:
                raise UlsamError(f"`{name}` needs a teacher: name the model file of a trained model")
        if self.edits:
            from ulsam.model.spec import Edit  # it imports PyTorch, which the help of these settings does without

            for text in self.edits:
                Edit.parse(text)
        self._check_values()
        if self.opt != "sgd" or self.opt_args:  # lazy, as above
            from ulsam.training.optimizers import check_optimizer

            check_optimizer(self.opt, self.opt_args, self.momentum)

    def _check_values(self) -> None:
        self._check_numbers()
        self._check_policy()
        self._check_optimization()
        self._check_held_out()
        self._check_schedule()
        self._check_class_weights()
        self._check_images()
        self._check_channels()
        if self.pretrained and self.weights:
            raise UlsamError("`pretrained` and `weights` exclude each other: start from the hub or from a file")

    def _check_numbers(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value:
                raise UlsamError(f"`{name}` must be {low} or more, not {reprlib.repr(value)}")
            if value is not None and value > high:
                raise UlsamError(f"`{name}` must be {high:.15g} or less, not {reprlib.repr(value)}")
        for name in _SHARES:
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UlsamError(f"`{name}` must lie between 0 and 1, not {value}")
        for name in ("lr", "ulsam_lr", "clip_grad", "distill_temperature", "decay_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UlsamError(f"`{name}` must be above 0, not {value}")

    def _check_policy(self) -> None:
        for key, number in re.findall(r"-([a-z]+)([\d.]+)", self.rand_augment or ""):
            high = _POLICY.get(key, 100)
            if not is_number(number) or float(number) > high:
                raise UlsamError(f"`rand_augment` takes a number up to {high} after {key}, not {number}")

    def _check_optimization(self) -> None:
        if self.teacher is not None and not (self.distill or self.distill_features):
            raise UlsamError("`distill` and `distill_features` are both 0: the teacher would teach nothing")
        if self.min_lr > self.lr:
            raise UlsamError(f"`min_lr`, where the schedule ends, is {self.min_lr}: above its peak `lr`, {self.lr}")
        if self.warmup_epochs >= self.epochs:
            raise UlsamError(f"`warmup_epochs` is {self.warmup_epochs}, which leaves nothing of {self.epochs} epochs")
        if self.opt == "sgd" and not 0 < self.momentum < 1:
            raise UlsamError(f"`momentum` must lie between 0 and 1, both excluded, not {self.momentum}")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise UlsamError(f"`mixup` and `cutmix` need an even batch size, not {self.batch_size}")

    def _check_held_out(self) -> None:
        if self.fold is not None and self.val_fraction is not None:
            raise UlsamError("`fold` and `val_fraction` exclude each other: both say which images are held out")
        if self.fold is not None:
            parse_fold(self.fold)

    def _check_images(self) -> None:
        if self.crop_pct is not None and not 0.1 <= self.crop_pct <= 1.5:
            raise UlsamError(f"`crop_pct` must lie between 0.1 and 1.5, not {self.crop_pct}")
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise UlsamError(f"`crop_scale` takes two shares of the area, e.g. 0.25 1.0, not {self.crop_scale}")
        if self.interpolation not in (None, "bilinear", "bicubic"):
            raise UlsamError(f"`interpolation` must be bilinear or bicubic, not {self.interpolation!r}")

    def _check_schedule(self) -> None:
        for name, its in _SCHEDULES.items():
            if getattr(self, name) not in (None, [], 0.0) and self.sched not in its:
                raise UlsamError(f"`{name}` is for `sched` {' and '.join(its)}, not {self.sched}: leave it out")
        if self.decay_epochs is not None and self.decay_epochs >= self.epochs:
            raise UlsamError(f"`decay_epochs` must be below epochs, {self.epochs}, not {self.decay_epochs}")
        falls = self.decay_milestones
        if self.sched == "multistep" and not falls:
            raise UlsamError(
                "`sched=multistep` needs `decay_milestones`: the epochs after which the rate falls, such as 6 9"
            )
        if falls != sorted(set(falls)) or not all(0 < epoch < self.epochs for epoch in falls):
            raise UlsamError(
                f"`decay_milestones` must rise, within the {self.epochs} epochs, not {reprlib.repr(falls)}"
            )

    @property
    def channels(self) -> int:
        """Of the images: ``in_chans``, a setting of its own or among ``model_args``."""
        return int(self.in_chans or self.model_args.get("in_chans", 3))

    def _check_channels(self) -> None:
        given = self.model_args.get("in_chans", 3)
        low, high = _RANGES["in_chans"]
        if type(given) is not int or not low <= given <= high:
            raise UlsamError(f"`in_chans` is a whole number from {low} to {high}, not {reprlib.repr(given)}")
        if self.in_chans and self.model_args.get("in_chans", self.in_chans) != self.in_chans:
            raise UlsamError(f"`in_chans` is {self.in_chans}, and {given} in `model_args`: leave one of them out")
        for name in ("mean", "std"):
            value = getattr(self, name)
            if value is not None and (len(value) != self.channels or not all(map(math.isfinite, value))):
                raise UlsamError(f"`{name}` takes a number for each of the {self.channels} channels, not {value}")
        if self.std is not None and min(self.std) <= 0:
            raise UlsamError(f"`std` must be above 0 in every channel, not {self.std}")
        for name in ("color_jitter", "rand_augment"):
            if self.channels != 3 and getattr(self, name):
                raise UlsamError(
                    f"`{name}` works on RGB images, not on those of {self.channels} channels: leave it out"
                )

    def _check_class_weights(self) -> None:
        weights = self.class_weights
        if isinstance(weights, str) and weights != "balanced":
            raise UlsamError(f"`class_weights` is balanced, or weights by class name, not {reprlib.repr(weights)}")
        if isinstance(weights, dict) and not (weights and all(0 < weight < 1e6 for weight in weights.values())):
            raise UlsamError(f"`class_weights` takes numbers above 0 by class name, not {reprlib.repr(weights)}")
        if weights == "balanced" == self.sampler:
            raise UlsamError(
                "`sampler` and `class_weights` are both balanced, which counts rare classes twice: choose one"
            )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Settings by name; what is not given keeps its default.

        Raises:
            UlsamError: an unknown name, a value of the wrong type or out of range.

        >>> TrainConfig.from_mapping({"data": "birds", "lr": 1}).lr
        1.0
        """
        names = [spec.name for spec in fields(cls)]
        for name in values:
            if name not in names:
                near = difflib.get_close_matches(str(name), names, n=1)
                raise UlsamError(f"unknown setting {name!r}{'; did you mean ' + near[0] + '?' if near else ''}")
        if "data" not in values:
            raise UlsamError("no data given: name an image folder or a data set")
        return cls(**values)

    def to_yaml(self) -> str:
        """All settings, one a line; :func:`read_config` reads it back."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)


_KINDS = get_type_hints(TrainConfig)


def read_config(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file, unchecked; pass them to :meth:`TrainConfig.from_mapping`.

    Raises:
        UlsamError: no such file, not YAML, or not a mapping.
    """
    try:
        text = read_text(path)
        if len(text) > _MAX_YAML:
            raise UlsamError(f"{path} has {len(text)} characters: no settings have more than {_MAX_YAML}")
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror.lower() if isinstance(error, OSError) and error.strerror else error
        raise UlsamError(f"cannot read the settings in {path}: {reason}") from error
    except UlsamError:
        raise
    except RecursionError as error:
        raise UlsamError(f"{path} is not YAML of settings: too many brackets within each other") from error
    except (yaml.YAMLError, ValueError) as error:  # and numbers and dates that are none
        raise UlsamError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UlsamError(f"{path} holds no settings; write lines such as 'epochs: 10'")
    return values


def config_of(data: "TrainConfig | str | os.PathLike[str]", settings: Mapping[str, Any]) -> TrainConfig:
    """The settings of a run on some data; or settings, of which some are replaced.

    Raises:
        UlsamError: as of :meth:`TrainConfig.from_mapping`.

    >>> config_of(config_of("birds", {"epochs": 3}), {"lr": 0.1}).epochs
    3
    """
    if isinstance(data, TrainConfig):
        return TrainConfig.from_mapping({**dataclasses.asdict(data), **settings}) if settings else data
    return TrainConfig.from_mapping({"data": os.fspath(data), **settings})


def config_beside(model: Path) -> TrainConfig | None:
    """The settings of the run in whose folder a model file lies; None where it lies in no such folder.

    >>> config_beside(Path("elsewhere/model.safetensors"))
    """
    beside = model.parent / "config.yaml"
    if model.name != "model.safetensors" or not beside.is_file():
        return None
    try:
        return TrainConfig.from_mapping(read_config(beside))
    except UlsamError:  # of another program: both names are common
        return None
