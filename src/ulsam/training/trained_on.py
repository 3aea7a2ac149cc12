"""Whether a model is measured on images that it was trained on."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ulsam.base.errors import UlsamError
from ulsam.base.logs import WARNING, say
from ulsam.data.label_table import is_table
from ulsam.data.labelled import is_local, splits_of
from ulsam.data.sources import FolderImages, LabelSetImages
from ulsam.data.splits import find_splits, split_of
from ulsam.model.trained import locate
from ulsam.training import parts
from ulsam.training.config import TrainConfig, config_beside


def run_of(model: object) -> TrainConfig | None:
    """The settings of the run in whose folder a model file, or what was exported from it, lies; None for others.

    >>> run_of("elsewhere/model.onnx")
    """
    if not isinstance(model, str | os.PathLike):
        return None
    file = locate(model)
    return config_beside(file.with_name("model.safetensors")) if file.exists() else None


def held_out_settings(model: object, data: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings by which the run of this model chose its held-out images; empty without such a run.

    Args:
        model: as of :func:`run_of`.
        data: an image folder, a table, or the name of a data set, which has splits of its own.
        settings: that were given; a ``val_split`` among them needs no share.
    """
    before = run_of(model)
    if before is None or not is_local(data):
        return {}
    same = os.path.realpath(data) == os.path.realpath(before.data)
    if splits_of(data) and not same:
        return {}  # another data set, with splits of its own
    place = {"data_dir": before.data_dir} if same and before.data_dir is not None else {}
    found = {**place, "split_seed": before.seed if before.split_seed is None else before.split_seed}
    own = {"val_split", "val_fraction", "fold"} & settings.keys()
    return found if own else {"val_fraction": before.val_fraction, "fold": before.fold, **found}


def note_trained_on(
    model: object, paths: Sequence[str], roots: Sequence[str | os.PathLike[str]], *, held_out: bool = False
) -> None:
    """Log a warning if the model was trained on some of these images, or if nothing says that it was not.

    Args:
        model: a model file or an exported one; of a model in memory nothing is known.
        paths: of the images that it is measured on.
        roots: the folders, or the files, that were named to find them in.
        held_out: whether a table says that they are for validation or testing.
    """
    before = run_of(model)
    chosen, images = _chosen_on(before) if before else ("", frozenset())
    if both := images & set(_real(paths)):
        say(
            f"note    {chosen} chosen by the score on {len(both)} of these {len(paths)} images: their score is "
            "optimistic",
            level=WARNING,
        )
    known = _training_images(before) if before else None
    if known is not None:
        ours = _real(paths)
        seen = sum(map(known, ours))
        if seen:
            say(
                f"note    the model was trained on {seen} of these {len(ours)} images: they are no fair test",
                level=WARNING,
            )
        if seen or (before and (_lie_in(ours, before.data) or _is_one_of(before.data, roots))):
            return
    if not held_out and not all(_is_held_out(path, roots) for path in paths):
        say(
            "note    nothing says that the model was not trained on these images: to be sure, measure on a folder val "
            "or test, or on a model file in the folder of its run",
            level=WARNING,
        )


def _training_images(run: TrainConfig) -> Callable[[str], bool] | None:
    """Whether a run was trained on a file; None where its data is no folder or table, or is gone.

    Only where the run held out images of the folder that it was trained on, all its files are listed.
    """
    try:
        splits = find_splits(run.data) if os.path.isdir(run.data) else {}
        if run.train_split in splits and run.val_fraction is None and run.fold is None and len(splits) > 1:
            train = splits[run.train_split]
            below = (os.path.join(folder, name) for folder, names, _ in os.walk(train) for name in names)
            folders = (str(train), *filter(os.path.islink, below))
            roots = tuple(os.path.join(os.path.realpath(one), "") for one in folders)
            return lambda path: path.startswith(roots)
    except (UlsamError, OSError):
        return None
    images = _images(run, 0)
    return set(_real(path for path, _ in images.samples)).__contains__ if images is not None else None


def _chosen_on(run: TrainConfig) -> tuple[str, frozenset[str]]:
    """What a run chose by its score on its validation images, and these; none without a folder of them."""
    epoch = (run.keep == "best" or bool(run.patience)) and run.val_every < run.epochs
    if not epoch and not is_table(run.data):  # only a table may have several labels an image, and so thresholds
        return "", frozenset()
    images = _images(run, 1)
    labels = isinstance(images, LabelSetImages)
    if images is None or not (epoch or labels):
        return "", frozenset()
    chosen = " and ".join(["the epoch"] * epoch + ["the thresholds"] * labels)
    return f"{chosen} {'were' if labels else 'was'}", frozenset(_real(path for path, _ in images.samples))


def _images(run: TrainConfig, part: int) -> FolderImages | None:
    """The training images (0) or the validation images (1) of a run; None where they are in no folder, or gone."""
    try:
        images = parts.open_images(run)[part] if is_local(run.data) else None
    except (UlsamError, OSError):
        return None
    return images if isinstance(images, FolderImages) else None


def _real(paths: Iterable[str]) -> list[str]:
    """Without links in the folders: looked up once a folder, of which there are far fewer than images."""
    folder = cache(os.path.realpath)
    return [os.path.join(folder(os.path.dirname(path)), os.path.basename(path)) for path in paths]


def _lie_in(paths: Sequence[str], folder: str) -> bool:
    whole = os.path.realpath(folder) + os.sep
    return all(path.startswith(whole) for path in paths)


def _is_one_of(path: str, others: Sequence[str | os.PathLike[str]]) -> bool:
    return os.path.realpath(path) in map(os.path.realpath, others)


def _is_held_out(path: str, roots: Sequence[str | os.PathLike[str]]) -> bool:
    """Whether a folder around the image, from the root on that it lies in, is called like one to measure on."""
    whole = Path(os.path.abspath(path))
    root = next((one for one in map(os.path.abspath, roots) if whole.is_relative_to(one)), str(whole.parent))
    return any(split_of(part) in ("val", "test") for part in whole.relative_to(Path(root).parent).parts[:-1])


def seen_before(configs: Iterable[TrainConfig]) -> list[str]:
    """A line about each weight file and teacher that was trained on images which a run holds out.

    That is known of the model file in the folder of its run on the same split of the same image folder.

    Args:
        configs: the settings of runs.

    Raises:
        UlsamError: the data is not usable.

    >>> seen_before([TrainConfig("birds")])
    []
    """
    notes = []
    for config in configs:
        for name in dict.fromkeys((config.weights, config.teacher)):
            before = config_beside(locate(name)) if name else None
            if before is None or before.train_split != config.train_split or not is_local(config.data):
                continue
            if Path(before.data).resolve() != Path(config.data).resolve():
                continue
            _, measured, _ = parts.open_images(config)
            if measured.split != "held-out":
                continue
            try:
                trained_on, _, _ = parts.open_images(before)
            except UlsamError:  # what that run was measured on is gone since
                continue
            if seen := len(set(trained_on.names) & set(measured.names)):
                notes.append(
                    f"{name} was trained on {seen} of the {len(measured)} images that are held out here: start from "
                    "weights of before that, or measure on another split"
                )
    return list(dict.fromkeys(notes))
