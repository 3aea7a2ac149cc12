"""Matched comparisons: many models with the same settings, several seeds, one table; see :func:`compare`."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ulsam.base.errors import UlsamError
from ulsam.base.extras import check_plots
from ulsam.base.logs import say
from ulsam.base.packed import check_packed_name
from ulsam.base.provenance import command_line
from ulsam.data.labelled import check_no_class
from ulsam.study.arms import check_arms, check_choosing, check_shared, parse_arms
from ulsam.study.compare_report import measure_latency, summarize, write_reports
from ulsam.study.compare_result import CompareResult
from ulsam.study.comparison_folder import ComparisonFolder
from ulsam.study.grid import TRIED_WITHIN, Grid
from ulsam.study.identity import data_digest, file_digests
from ulsam.study.launch import Launcher, LocalLauncher, refuse_torchrun, run_all, threads_of
from ulsam.study.ray_launcher import RayLauncher, require_ray
from ulsam.training.config import TrainConfig
from ulsam.training.probe import SETTINGS, resolve_auto, undecided
from ulsam.training.settings import TrainSettings
from ulsam.training.trained_on import seen_before

__all__ = ["compare", "report"]

MARGIN = 0.005  # half a point of top-1


def compare(
    data: str | Path,
    arms: Sequence[str],
    out: str | Path,
    *,
    seeds: int = 5,
    rates: Sequence[float] = (),
    tried_epochs: Sequence[int] = (),
    tried_seeds: int = 1,
    tried_within: float | None = None,
    choose_split: str | None = None,
    settings: TrainSettings | Mapping[str, Any] | None = None,
    jobs: int | None = None,
    launcher: Literal["local", "ray"] = "local",
    ray_address: str | None = None,
    margin: float = MARGIN,
    start_from: str | Path | None = None,
    publish: str | Path | None = None,
) -> CompareResult:
    """Train every arm with the same settings with the same seeds, and compare their top-1, paired by seed and image.

    With several ``rates`` or ``tried_epochs`` each arm first gets its own learning rate and epochs: those with the best
    top-1 on a fifth of the training images that is held out, the same for all, or on ``choose_split``. Then each arm
    is trained on all training images with each seed, and measured once. Runs that are finished are not repeated, and
    those that were stopped are resumed: call it again with the same arguments.

    Args:
        data: an image folder, or a data-set name of timm's factory.
        arms: texts such as ``"base"``, ``"replace 14,17 g=4"`` or ``"small: remove 14,17; size=96"``; see
            `ulsam.study.arms.Arm`. Differences are to the first one.
        out: folder of the comparison; see `ulsam.study.comparison_folder`.
        seeds: how many, from the settings' ``seed`` on.
        rates: learning rates to try; one or none is no choice.
        tried_epochs: numbers of epochs to try, likewise.
        tried_seeds: how many seeds of each try, which hold out other images each; the best mean is chosen.
        tried_within: share of top-1: rates that are this near to the best one at the first of ``tried_epochs`` are
            tried at the others too; None: 0.01.
        choose_split: the split of ``data`` to choose on, instead of held-out training images; the final runs are
            measured on another one.
        settings: of `ulsam.training.config.TrainConfig`, shared by all arms.
        jobs: runs at a time; by default 1 on this machine, and what a Ray cluster has room for.
        launcher: ``local`` processes, or ``ray`` tasks (`ulsam.study.ray_launcher`).
        ray_address: of the Ray cluster.
        margin: share of top-1 that an arm may lose and still be non-inferior.
        start_from: a published comparison whose runs are put into ``out`` first, where they are not trained again.
        publish: as for :func:`report`.

    Returns:
        What ``compare.json`` holds: `ulsam.CompareResult` names its keys. A run that failed is in it with its reason.

    Raises:
        UlsamError: an arm that cannot be built, settings or data that do not fit, a margin below 0, before any
            training; or a folder with runs of other settings, on other images, or from another weight file or teacher
            of the same name.
        Interrupted: Ctrl-C or SIGTERM, after every run has saved (`ulsam.Interrupted`).

    >>> compare("birds", ["base"], "runs/x")
    Traceback (most recent call last):
    ulsam.base.errors.UlsamError: a comparison needs two arms or more, such as base and 'replace 14,17 g=4': see `arms`
    """
    refuse_torchrun()
    _check_margin(margin)
    _check_packed(publish)
    check_plots("ulsam compare")
    if launcher == "ray":
        require_ray()
    elif ray_address is not None:
        raise UlsamError("`ray_address` is for the launcher ray")
    if jobs is not None and jobs < 1:
        raise UlsamError(f"`jobs` must be 1 or more, not {jobs}")
    parsed = parse_arms(arms)
    shared = TrainConfig.from_mapping({**(settings or {}), "data": str(data)})
    check_shared(shared)
    parsed = tuple(arm.with_model_file(shared) for arm in parsed)
    shared = (
        threads_of(shared, jobs or 1)
        if launcher == "local"
        else dataclasses.replace(shared, threads=shared.threads or 1)
    )
    tried = (tuple(map(float, rates)), tuple(tried_epochs))
    if tried_within is not None and min(map(len, tried)) < 2:
        raise UlsamError("`tried_within` needs several learning rates and several numbers of epochs to try")
    near = TRIED_WITHIN if tried_within is None else tried_within
    grid = Grid(parsed, shared, *tried, seeds, tried_seeds, choose_split, near)
    if grid.choosing:
        check_choosing(shared, choose_split)
    check_arms(parsed, shared)
    check_no_class(out, shared.data)
    comparison, digest = ComparisonFolder(out), data_digest(shared, choose_split)
    files = file_digests(arm.config(shared) for arm in parsed)
    with comparison.locked():
        if start_from is not None:
            comparison.start_from(start_from)
        grid = dataclasses.replace(grid, shared=_resolved(grid, comparison, launcher == "ray"))
        comparison.begin(grid, command_line(), digest, files)
    for note in seen_before(run.config for run in grid.known(lambda run: None)):
        say(f"note    {note}")
    say(f"runs    {grid.size}: {len(grid.arms)} arms, {seeds} seeds; {comparison.root}")
    place: Launcher = LocalLauncher(comparison, jobs or 1)
    if launcher == "ray":
        gpus = int(shared.device.startswith("cuda"))
        place = RayLauncher(comparison, threads=shared.threads or 1, gpus=gpus, jobs=jobs or 0, address=ray_address)
    run_all(grid, comparison, place, command_line())
    measure_latency(grid, comparison)
    result = _reported(grid, comparison, margin, command_line())
    if publish is not None:
        _publish(grid, comparison, publish)
    return result


def report(
    out: str | Path,
    *,
    margin: float = MARGIN,
    start_from: str | Path | None = None,
    publish: str | Path | None = None,
) -> CompareResult:
    """Make the reports of a comparison again from the runs that are there, without training or timing anything.

    Args:
        out: the folder of a comparison.
        margin, start_from: as for :func:`compare`.
        publish: also pack plan, summaries and latencies into this file, ``NAME.jsonl.gz``, without paths of this
            machine: what a repository should hold.

    Raises:
        UlsamError: no comparison in this folder, or one that is damaged, or a margin below 0; or runs in the file
            ``publish`` that are not in this folder.
    """
    _check_margin(margin)
    _check_packed(publish)
    check_plots("ulsam compare")
    comparison = ComparisonFolder(out)
    if start_from is not None:
        with comparison.locked():
            comparison.start_from(start_from)
    grid = comparison.grid()
    result = _reported(grid, comparison, margin, comparison.read("grid.json").get("command"))
    if publish is not None:
        _publish(grid, comparison, publish)
    return result


def _check_margin(margin: float) -> None:
    if not 0 <= margin < math.inf:
        raise UlsamError(f"the margin is what a non-inferior arm may lose, 0 points or more: not {100 * margin:g}")


def _check_packed(publish: str | Path | None) -> None:
    if publish is not None:
        check_packed_name(publish)


def _publish(grid: Grid, comparison: ComparisonFolder, file: str | Path) -> None:
    comparison.publish(file, dataclasses.replace(grid, arms=(*grid.arms, *comparison.external_arms())))


def _reported(grid: Grid, comparison: ComparisonFolder, margin: float, command: str | None) -> CompareResult:
    result = summarize(grid, comparison, margin, command)
    write_reports(comparison, result)
    return result


def _resolved(grid: Grid, comparison: ComparisonFolder, elsewhere: bool) -> TrainConfig:
    """The shared settings with nothing left at "auto": as they were resolved here before, or by a probe of the base."""
    shared = grid.shared
    before = comparison.read_grid()
    if before:
        known = {name: getattr(before.shared, name) for name in SETTINGS if getattr(shared, name) == "auto"}
        shared = dataclasses.replace(shared, **known)
    if elsewhere and not undecided(shared):
        return shared  # what this machine lacks, a GPU say, others may have
    longest = grid.arms[0].config(shared, epochs=max([shared.epochs, *grid.epochs]))
    resolved = resolve_auto(longest)
    return dataclasses.replace(shared, **{name: getattr(resolved, name) for name in SETTINGS})
