"""Read runs, run their models again on what they were measured on, and write the page."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ulsam.base.errors import UlsamError, printable
from ulsam.base.extras import check_plots
from ulsam.base.files import check_writable, make_folder, write_atomic
from ulsam.base.provenance import command_line, versions
from ulsam.explanation.run_latency import time_runs
from ulsam.explanation.run_measured import Measured, measure_again
from ulsam.explanation.run_page import page
from ulsam.explanation.trained_runs import TrainedRun, read_runs


@dataclass(frozen=True)
class WrittenReport:
    """What was written."""

    page: Path
    runs: tuple[TrainedRun, ...]
    notes: tuple[str, ...]  # a line about each thing that is not on the page


def report_runs(
    folders: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    data: str | None = None,
    images: bool = True,
    time: bool = False,
    replace: bool = False,
) -> WrittenReport:
    """Write one HTML page about runs of `ulsam train`.

    Args:
        folders: of the runs; the first one is what the others are compared with.
        out: the file, ``NAME.html``.
        data: where the images of all runs lie now, if not where their settings say.
        images: whether to run the models again, for confusions and images.
        time: whether to time the models, too, which takes about 20 seconds and a machine without other work.
        replace: whether to replace a file that is there.

    Raises:
        UlsamError: ``out`` exists or cannot be written, not a run's folder, a damaged file in it, or runs of other
            classes.
    """
    check_plots("ulsam report")
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise UlsamError(f"the report is a page: name it {out.with_suffix('.html')}, not {out}")
    if out.exists() and not replace:
        raise UlsamError(f"{out} exists: name another `out`, or give `replace=True`")
    runs = read_runs(folders)
    make_folder(out.parent)
    check_writable(out)
    measured: list[Measured] = []
    lacking: dict[str, list[str]] = {}  # reasons -> keys of runs
    notes = []
    for run in runs:
        kept = run.result.summary.get("kept", {}) if run.result else {}
        if kept.get("chosen_on"):
            notes.append(
                f"run {run.key} keeps epoch {kept['epoch']}, chosen on the {kept['chosen_on']} images: its score on "
                "them is optimistic"
            )
    for run in runs if images else []:
        try:
            measured.append(measure_again(run, data))
        except UlsamError as error:
            lacking.setdefault(str(error), []).append(run.key)
        else:
            if changed := measured[-1].changed:
                whose = f"run {run.key}" if len(runs) > 1 else "the run"
                total = len(measured[-1].guesses)
                notes.append(f"here {changed} of {total} images come out otherwise than in {whose}")
    for reason, keys in lacking.items():
        whose = f" of {', '.join(keys)}" if len(runs) > 1 else ""
        notes.append(f"no confusions and no images{whose}: {reason}")
    if not images:
        notes.append("no confusions and no images: `images=False`")
    times = time_runs(runs) if time else None
    machine = ", ".join(f"{name} {value}" for name, value in versions().items())
    text = page(runs, measured, notes, times=times, command=printable(command_line()), versions=machine)
    write_atomic(out, text)
    return WrittenReport(out, tuple(runs), tuple(notes))
