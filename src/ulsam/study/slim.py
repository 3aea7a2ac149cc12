"""Slimming from a trained model to a smaller one: choose the blocks, then restore the accuracy by fine-tuning."""

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch import nn

from ulsam.base.class_names import class_numbers
from ulsam.base.distributed import start
from ulsam.base.errors import Interrupted, UlsamError
from ulsam.base.files import write_atomic
from ulsam.base.logs import say
from ulsam.base.threads import cpu_threads
from ulsam.data.labelled import check_no_class
from ulsam.data.loading import eval_loader
from ulsam.data.sources import AnyImages, check_one_class
from ulsam.model.build import file_content
from ulsam.model.given import model_and_spec
from ulsam.model.pretrained import is_pretrained_name
from ulsam.model.spec import ModelSpec
from ulsam.model.trained import locate
from ulsam.study import slim_report as report
from ulsam.study.slim_blocks import Block, find_blocks
from ulsam.study.slim_budget import Budget, budget, edit_of
from ulsam.study.slim_choose import BlockSearch
from ulsam.study.slim_latency import LatencyEngine, check_engine
from ulsam.study.slim_measure import SetMeasurer
from ulsam.study.slim_record import SlimRecord, check_folder
from ulsam.study.slim_result import OriginalModel, SampleCounts, SlimmedScores, SlimResult
from ulsam.surgery.cost import Cost, cost
from ulsam.surgery.places import match
from ulsam.training import parts, restore
from ulsam.training.config import TrainConfig
from ulsam.training.evaluate import evaluate_batches, spec_transform
from ulsam.training.from_model_file import settings_of
from ulsam.training.sample import ImageSample, draw_sample
from ulsam.training.settings import TrainSettings
from ulsam.training.step import AMP_DTYPES, LAYOUTS
from ulsam.training.summary import cost_entry, score_entry
from ulsam.training.train import train_or_resume
from ulsam.training.train_summary import TrainSummary
from ulsam.training.trained_on import held_out_settings

#: The file in ``out`` that keeps a model that no model file was named for.
ORIGINAL = "original.safetensors"
#: Settings of training that slimming decides.
RESERVED_SETTINGS = (
    *("data", "model", "model_args", "edits", "pretrained", "weights", "teacher"),
    *("in_chans", "keep", "patience"),
)


def slim(
    model: nn.Module | str | os.PathLike[str],
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    spec: ModelSpec | None = None,
    macs: float | None = None,
    params: float | None = None,
    latency: float | None = None,
    layer: Mapping[str, Any] | None = None,
    at: str | None = None,
    images: int = 400,
    max_sets: int = 200,
    reconstruct_sets: int = 4,
    engine: LatencyEngine = "eager",
    latency_batch: int = 1,
    latency_threads: int | None = None,
    latency_seconds: float = 20.0,
    fine_tune: bool = True,
    settings: TrainSettings | Mapping[str, Any] | None = None,
) -> SlimResult:
    """Replace blocks of a trained model so that it fits a budget, with the least damage, and restore its accuracy.

    The damage of a set of blocks is the increase of the mean cross-entropy on a sample of the training images when
    they are replaced, without any training but that of new inverted residuals. The sets of least damage are
    reconstructed (`ulsam.reconstruct`) and measured again: the best of them is chosen. The slimmed model is then
    reconstructed with 500 steps a place, and fine-tuned with the original one as its teacher.

    ``out/slim.json`` holds all figures and the choice, ``out/train.yaml`` the settings of the fine-tuning, ``out/run``
    its run with the slimmed model, ``model.safetensors``. A second start with the same ``out`` resumes where it
    stopped.

    Args:
        model: a trained model: its model file, the name of a pretrained one, or a model in memory. Of the last two
            ``out/original.safetensors`` keeps a copy.
        data: an image folder, or timm's name of a data set; with the model's classes.
        out: a new folder, or that of the same slimming.
        spec: of a model in memory, as of `ulsam.load`.
        macs: the share of the model's own MACs to keep, such as 0.75. Give exactly one of ``macs``, ``params`` and
            ``latency``.
        params: the share of its parameters to keep.
        latency: the share of its latency on this machine to keep.
        layer: the new layers, as keyword arguments of :class:`ulsam.Edit`: ``layer``, ``width``, ``groups``, ``form``;
            ULSAM by default; the layer "none" removes the blocks.
        at: names, globs or layer numbers of the blocks to choose from; None: all that can be replaced.
        images: how many training images to measure the damage on.
        max_sets: how many sets of blocks to measure after the greedy search.
        reconstruct_sets: how many of the sets of least damage to reconstruct.
        engine: what runs the model where latency is measured, ``eager`` or ``onnxruntime``.
        latency_batch: images at a time, where latency is measured.
        latency_threads: CPU threads, where latency is measured; None: PyTorch's own number.
        latency_seconds: how long latency is measured, of all blocks in turn, and of each set.
        fine_tune: whether to continue after the choice.
        settings: of `ulsam.training.config.TrainConfig`, for the fine-tuning, but for `RESERVED_SETTINGS`; how images
            are read (``size``, ``mean``, ...) is by default as in the model file.

    Returns:
        What ``slim.json`` holds: `ulsam.SlimResult` names its keys.

    Raises:
        UlsamError: no model file, other classes, no block to replace, a budget that all blocks together do not reach,
            a folder with something else in it, and what `ulsam.training.train.train` raises.
        Interrupted: Ctrl-C, or SIGTERM in training; everything that was done is kept.

    >>> import tempfile
    >>> import ulsam
    >>> from ulsam.data.birds import draw_birds
    >>> folder = tempfile.mkdtemp()
    >>> birds = draw_birds(f"{folder}/birds", classes=2, train=8, val=4, size=32)
    >>> spec = ulsam.make_spec("mobilenetv2_035", sorted(path.name for path in (birds / "val").iterdir()), size=32)
    >>> quick = {"batch_size": 8, "epochs": 1, "workers": 0, "reconstruct_images": 0}
    >>> found = slim(ulsam.build(spec)[0], birds, f"{folder}/out", spec=spec, macs=0.95, at="16,17", settings=quick)
    >>> found["chosen"]["blocks"], found["result"]["slimmed"]["images"]
    (['16', '17'], 8)
    """
    asked = budget(
        macs,
        params,
        latency,
        layer=layer or {},
        at=at,
        images=images,
        max_sets=max_sets,
        reconstruct_sets=reconstruct_sets,
        engine=engine,
        latency_batch=latency_batch,
        latency_threads=latency_threads,
        latency_seconds=latency_seconds,
    )
    out = Path(out)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UlsamError("slimming chooses in one process: use `fine_tune=False`, then train by torchrun")
    check_engine(asked.engine)
    original, spec = model_and_spec(model, spec)
    spec.check_one_class("slimming")
    file = out / ORIGINAL if isinstance(model, nn.Module) or is_pretrained_name(model) else model
    config = fine_tuning(file, spec, os.fspath(data), cast(Mapping[str, Any], settings or {}))
    own = edit_of(["*"], asked.layer).width is not None  # an inverted residual is reconstructed in any case
    if config.images_for_reconstruction and not (config.reconstruct_images and (config.reconstruct or own)):
        raise UlsamError("`images_for_reconstruction` has nothing to reconstruct, as the other settings switch it off")
    check_no_class(out, data)
    with _resumable(out):
        record = _choose(asked, out, original, spec, config, locate(file))
        chosen = [*config.edits, asked.edit(record.data["chosen"]["blocks"])]
        config = dataclasses.replace(config, edits=chosen)
        restore.check_run(config, out / "run")
        write_atomic(out / "train.yaml", config.to_yaml())
        if fine_tune:
            summary = train_or_resume(config, out / "run")
            if record.get("result") is None:
                record.put("result", _result(original, config, summary))
    return record.result


def fine_tuning(model: str | os.PathLike[str], spec: ModelSpec, data: str, settings: Mapping[str, Any]) -> TrainConfig:
    """The settings with which the slimmed model is trained, its new edit aside.

    Where the model file lies in the folder of its run, the same images are held out as in that run, unless
    ``val_fraction``, ``val_split`` or ``split_seed`` say otherwise: the model was trained on the others.

    Raises:
        UlsamError: a setting that slimming decides, an unknown one, or a model for images that are not square.

    >>> fine_tuning("model.safetensors", ModelSpec("resnet18", ("a", "b")), "birds", {"epochs": 3}).teacher
    'model.safetensors'
    """
    for name in RESERVED_SETTINGS:
        if name in settings:
            raise UlsamError(f"slimming decides {name}: leave it out of the settings")
    own = {**settings_of(model, spec, size=settings.get("size")), "data": data, "teacher": os.fspath(model)}
    return TrainConfig.from_mapping({**own, **held_out_settings(model, data, settings), **settings})


def _choose(
    asked: Budget, out: Path, original: nn.Module, spec: ModelSpec, config: TrainConfig, model: Path
) -> SlimRecord:
    """Choose the blocks, or take the choice that ``out`` holds, and report it."""
    with start(config.device) as world, cpu_threads(config.threads):
        images, measured, _ = parts.open_images(config)
        check_one_class(images, "slimming")
        kept = model == out / ORIGINAL
        spec = _with_names_of(images, spec) if kept else spec
        if images.classes != spec.classes:
            raise UlsamError(f"{config.data} has other classes than {model} was trained on: {_other(images, spec)}")
        seen = parts.spec_of_run(config, spec.classes)
        # what cannot be trained or kept shows before anything is measured
        check_folder(out)
        if config.freeze:
            match(original, config.freeze)
        blocks, switched, notes = find_blocks(original, seen.input_size, dict(asked.layer), asked.at)
        sample = draw_sample(images, seen, asked.images, world, workers=config.workers)
        content = file_content(original, spec) if kept else model.read_bytes()
        base_cost = cost(original, seen.input_size)
        record = SlimRecord(out, _identity(asked, config, seen, sample, content))
        entry: OriginalModel = {"spec": str(spec.base), "edits": list(map(str, spec.edits)), **cost_entry(base_cost)}
        counts: SampleCounts = {"sample": sample.count, "training": len(images)}
        record.data["model"] = entry
        record.data["blocks"] = [block.entry() for block in blocks]
        record.data["images"] = counts
        if kept:
            record.write()
            write_atomic(model, content)
        if measured.split == "held-out" and config.split_seed is None:
            notes.append(
                f"the held-out images may be ones that {model} was trained on: there is no config.yaml of its run "
                "beside it; give that run's seed as `split_seed`, and its `val_fraction`"
            )
        for line in [*report.start_lines(entry, counts), *(f"note    {note}" for note in notes)]:
            say(line)
        for _, reason in sample.unreadable:
            say(f"unreadable {reason}")
        if record.get("chosen") is None:
            original.to(world.device)
            measurer = SetMeasurer(switched, sample, images, seen, config, world)
            _search(asked, blocks, base_cost, measurer, record).choose()
        for line in report.choice_lines(record.result):
            say(line)
    return record


def _with_names_of(images: AnyImages, spec: ModelSpec) -> ModelSpec:
    """The spec with the images' names of its classes, if they are the same ones, by their WordNet ids say."""
    if list(class_numbers(images.classes, spec.classes).values()) == [*range(len(spec.classes))]:
        return dataclasses.replace(spec, classes=images.classes)
    return spec


def _identity(
    asked: Budget, config: TrainConfig, seen: ModelSpec, sample: ImageSample, content: bytes
) -> dict[str, Any]:
    """What a record must be of for its figures to be taken."""
    return {
        **asked.entry(),
        "reconstruct_images": config.reconstruct_images,
        "reconstruct": config.reconstruct,
        "images_for_reconstruction": config.images_for_reconstruction,
        **({"freeze": config.freeze} if config.freeze else {}),
        "model_sha256": hashlib.sha256(content).hexdigest(),
        "sample_sha256": sample.names,
        "input": [list(seen.input_size), seen.interpolation, seen.crop_pct, list(seen.mean), list(seen.std)],
    }


def _search(
    asked: Budget, blocks: Sequence[Block], base_cost: Cost, measurer: SetMeasurer, record: SlimRecord
) -> BlockSearch:
    """The search; new layers are reconstructed where the training that follows does."""
    reconstructs = bool(measurer.config.reconstruct_images)

    def prepare() -> None:
        if reconstructs:
            record.put("reconstructed", measurer.explained())

    return BlockSearch(
        asked,
        blocks,
        measurer.switched,
        base_cost,
        measurer.scores,
        record,
        prepare,
        measurer.reconstructed_score if measurer.config.reconstruct and reconstructs else None,
    )


def _result(model: nn.Module, config: TrainConfig, summary: TrainSummary) -> SlimmedScores:
    """The slimmed model beside the original one, both on the run's own images, in its precision and layout."""
    ran = TrainConfig.from_mapping(summary["config"])
    with start(config.device) as world, cpu_threads(config.threads):
        _, images, _ = parts.open_images(config)
        seen = parts.spec_of_run(config, summary["spec"]["classes"])
        batches = eval_loader(
            images,
            spec_transform(seen),
            batch_size=config.batch_size,
            workers=config.workers,
            device=world.device,
        )
        scores = evaluate_batches(
            model.to(world.device).to(memory_format=LAYOUTS[ran.layout]),
            batches,
            len(seen.classes),
            world=world,
            amp=AMP_DTYPES[ran.amp],
            channels_last=ran.layout == "channels_last",
            progress="original model",
        )
    return {
        "split": summary["split"],
        "original": score_entry(scores, seen.classes),
        "slimmed": summary["scores"],
        "cost": summary["cost"],
    }


def _other(images: AnyImages, spec: ModelSpec) -> str:
    """How the classes differ."""
    if len(images.classes) != len(spec.classes):
        return f"{len(images.classes)}, not {len(spec.classes)}"
    wrong, right = next(pair for pair in zip(images.classes, spec.classes, strict=True) if pair[0] != pair[1])
    return f"{wrong!r} where the model has {right!r}"


@contextmanager
def _resumable(out: Path) -> Iterator[None]:
    """Turn an interruption into one that says how to resume."""
    try:
        yield
    except KeyboardInterrupt as stop:
        event = stop.event if isinstance(stop, Interrupted) else "stopped"
        raise Interrupted(event, f"what was done is kept: resume with the same arguments and `out={out}`") from None
