"""The types of what training returns and ``summary.json`` holds: plain dicts of JSON values, with known keys."""

from typing import Any, Literal, NotRequired, TypedDict


class CostEntry(TypedDict):
    """What a model costs for one image.

    Attributes:
        params: parameters.
        macs: multiply-adds.
        activations: numbers that convolutions and linear layers output.
        input_size: C, H, W in pixels.
        rule: how this was counted.
    """

    params: int
    macs: int
    activations: int
    input_size: list[int]
    rule: str


class ScoreEntry(TypedDict):
    """What a model scores on images; all scores are shares 0..1.

    Attributes:
        images: how many were measured.
        loss: mean cross-entropy in nats; with several labels an image, mean binary cross-entropy.
        unreadable: how many images could not be read.
        per_class: the scores of each class, by its name; None where the class has no image.
        top1, top5: accuracy. These and the interval are absent where an image may have several labels.
        top1_interval_95: low and high end, over the choice of images.
        map, f1: mean average precision, and mean F1 at the thresholds; None without any label. These two, ``macro`` and
            ``micro`` are there only where an image may have several labels.
        macro: means over the classes.
        micro: over all pairs of an image and a label.
    """

    images: int
    loss: float
    unreadable: int
    per_class: dict[str, dict[str, Any]]
    top1: NotRequired[float]
    top1_interval_95: NotRequired[list[float]]
    top5: NotRequired[float]
    map: NotRequired[float | None]
    f1: NotRequired[float | None]
    macro: NotRequired[dict[str, float | None]]
    micro: NotRequired[dict[str, float | None]]


class OutcomeEntry(TypedDict):
    """Which images were classified right; see `ulsam.training.evaluate.outcomes`.

    Attributes:
        images: how many were read.
        right: a bit an image, as hexadecimal digits.
        names: SHA-256 of their names.
    """

    images: int
    right: str
    names: str


class EpochEntry(TypedDict):
    """One epoch, a line of ``metrics.csv``. What was not measured is None.

    Attributes:
        epoch: its number, from 1.
        lr: the learning rate at its end.
        train_loss, val_loss: means over the images, in nats.
        val_top1, val_top5: shares 0..1; absent where an image may have several labels.
        val_map, val_f1: shares 0..1; there only where an image may have several labels.
        seconds: of training.
        images_per_second: while training.
    """

    epoch: int
    lr: float
    train_loss: float
    val_loss: float | None
    val_top1: NotRequired[float | None]
    val_top5: NotRequired[float | None]
    val_map: NotRequired[float | None]
    val_f1: NotRequired[float | None]
    seconds: float
    images_per_second: float


class KeptEpoch(TypedDict):
    """Which epoch's weights are saved.

    Attributes:
        keep: the setting.
        epoch: whose weights are saved.
        trained: how many epochs were trained.
        best: the one with the best score; None where none was scored.
        chosen_on: the split that decided; None where scores decided nothing.
    """

    keep: Literal["last", "best"]
    epoch: int
    trained: int
    best: int | None
    chosen_on: str | None


class TeacherEntry(TypedDict):
    """The teacher of a distilled run.

    Attributes:
        spec: its `ulsam.ModelSpec`.
        sha256: of its file.
        places: names of the modules whose feature maps were compared.
    """

    spec: dict[str, Any]
    sha256: str
    places: list[str]


class ImageCounts(TypedDict):
    """How many images there are of each use."""

    train: int
    val: int


class UnreadableNames(TypedDict):
    """The names of images that could not be read, of each use."""

    train: list[str]
    val: list[str]


class TrainSummary(TypedDict):
    """What `ulsam.train` returns, and ``summary.json`` holds.

    Attributes:
        command: the command line of the process.
        config: all fields of the run's `ulsam.TrainConfig`.
        spec: the model's `ulsam.ModelSpec`.
        prepared: whether a model was given that no spec builds.
        class_weights: the weight of each class, by its name; None where they are equal.
        teacher: of a distilled run; else None.
        images: how many there are to train and to measure on.
        split: the name of the images that the scores are on.
        scores: of the saved weights, on all of these images.
        outcomes: which images were right; None of a stream of shards, or with several labels an image.
        cost, base_cost: of the model, and of its base model without edits.
        epochs: a row for each.
        kept: which epoch's weights are saved.
        unreadable: the images that could not be read.
        versions: of the packages, and the kind of device.
    """

    command: str
    config: dict[str, Any]
    spec: dict[str, Any]
    prepared: bool
    class_weights: dict[str, float] | None
    teacher: TeacherEntry | None
    images: ImageCounts
    split: str
    scores: ScoreEntry
    outcomes: OutcomeEntry | None
    cost: CostEntry
    base_cost: CostEntry
    epochs: list[EpochEntry]
    kept: KeptEpoch
    unreadable: UnreadableNames
    versions: dict[str, str]
