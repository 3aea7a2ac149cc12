"""The types of the settings that `ulsam.train` takes by name."""

from typing import Any, Literal, TypedDict


class TrainSettings(TypedDict, total=False):
    """The fields of `ulsam.TrainConfig`, which says what each one does, other than ``data`` and ``model``.

    >>> settings: TrainSettings = {"epochs": 3, "edits": ["remove 14"]}
    """

    data_dir: str | None
    train_split: str
    val_split: str | None
    val_fraction: float | None
    fold: str | None
    split_seed: int | None
    class_names: str | None
    sampler: Literal["shuffle", "balanced"]
    workers: int
    cache: Literal["auto", "true", "false"]
    max_unreadable: float
    model_args: dict[str, Any]
    edits: list[str]
    pretrained: bool
    weights: str | None
    reconstruct: bool
    reconstruct_images: int
    images_for_reconstruction: str | None
    freeze: list[str]
    teacher: str | None
    distill: float | None
    distill_temperature: float | None
    distill_features: float | None
    in_chans: int | None
    size: int | None
    mean: list[float] | None
    std: list[float] | None
    interpolation: str | None
    crop_pct: float | None
    crop_scale: list[float]
    hflip: float
    color_jitter: float
    rand_augment: str | None
    random_erasing: float
    mixup: float
    cutmix: float
    epochs: int
    batch_size: int
    accumulate: int
    opt: str
    opt_args: dict[str, Any]
    lr: float
    ulsam_lr: float
    momentum: float
    weight_decay: float
    sched: Literal["cosine", "tanh", "poly", "step", "multistep", "constant"]
    decay_rate: float | None
    decay_epochs: int | None
    decay_milestones: list[float]
    warmup_epochs: float
    min_lr: float
    clip_grad: float | None
    class_weights: dict[str, float] | str | None
    smoothing: float
    drop_rate: float
    drop_path: float
    ema: float
    device: str
    layout: Literal["auto", "contiguous", "channels_last"]
    amp: Literal["auto", "none", "bf16", "fp16"]
    compile: Literal["auto", "none", "inductor"]
    threads: int | None
    seed: int
    val_every: int
    keep: Literal["last", "best"]
    patience: int | None
    save_seconds: float
    track: list[str]
