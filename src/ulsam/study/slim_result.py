"""The types of what slimming returns and ``slim.json`` holds: plain dicts of JSON values, with known keys."""

from typing import Any, Literal, NotRequired, TypedDict

from ulsam.training.train_summary import CostEntry, ScoreEntry


class OriginalModel(CostEntry):
    """The model that is slimmed: its cost, the name of its base model, and its edits."""

    spec: str
    edits: list[str]


class BlockEntry(TypedDict):
    """A block that can be replaced.

    Attributes:
        name: of the module.
        number: the paper's layer number; None where the model has none.
        type: of the module.
        shape: C, H, W of its output.
        params, macs: what replacing it saves.
        place: what an edit calls it.
    """

    name: str
    number: int | None
    type: str
    shape: list[int]
    params: int
    macs: int
    place: str


class SetScore(TypedDict):
    """The score with a set of blocks replaced.

    Attributes:
        blocks: their places; none for the model as it is.
        loss: mean cross-entropy on the sample, in nats.
        top1: share 0..1.
    """

    blocks: list[str]
    loss: float
    top1: float


class SetTiming(TypedDict):
    """The time with a set of blocks replaced.

    Attributes:
        blocks: their places; none for the model as it is.
        seconds: of one call, the median.
        ratio: to the time of the model as it is.
        ratio_quartiles: the lower and the upper one.
        turns: how often it was timed.
    """

    blocks: list[str]
    seconds: float
    ratio: float
    ratio_quartiles: list[float]
    turns: int


class ChosenBlocks(TypedDict):
    """The choice.

    Attributes:
        blocks: the places of the blocks to replace.
        how: the search that found them; see `ulsam.study.slim_search.SearchResult`.
        greedy: where the greedy search ended.
        rivals: the sets that could be chosen, the chosen one included; see `ulsam.study.slim_search.SearchResult`.
    """

    blocks: list[str]
    how: Literal["exact", "greedy", "timed", "all"]
    greedy: list[str]
    rivals: list[list[str]]


class SampleCounts(TypedDict):
    """How many training images the damage is measured on, and how many there are."""

    sample: int
    training: int


class SlimmedScores(TypedDict):
    """The fine-tuned model beside the original one.

    Attributes:
        split: the name of the images that both were measured on.
        original, slimmed: their scores.
        cost: of the slimmed model.
    """

    split: str
    original: ScoreEntry
    slimmed: ScoreEntry
    cost: CostEntry


class SlimResult(TypedDict):
    """What `ulsam.slim` returns, and ``slim.json`` holds.

    Attributes:
        command: the command line of the process that began.
        versions: of the packages, and the machine.
        budget: what was asked, by name.
        model: the model that was slimmed.
        blocks: what could be replaced.
        images: how many the damage was measured on.
        measured: the sets of blocks that were measured.
        measured_reconstructed: those that were reconstructed too; absent where none was.
        reconstructed: the share of a block's output that its new layer explains, by the block's name; absent where
            layers were not reconstructed.
        timings: the model with each block replaced; ``timings`` and ``timed`` are absent unless latency is the budget.
        timed: the sets of blocks that were timed.
        chosen: the choice.
        result: absent with ``fine_tune=False``.
    """

    command: str
    versions: dict[str, str]
    budget: dict[str, Any]
    model: OriginalModel
    blocks: list[BlockEntry]
    images: SampleCounts
    measured: list[SetScore]
    measured_reconstructed: NotRequired[list[SetScore]]
    reconstructed: NotRequired[dict[str, float]]
    timings: NotRequired[list[SetTiming]]
    timed: NotRequired[list[SetTiming]]
    chosen: ChosenBlocks
    result: NotRequired[SlimmedScores]
