"""The folder of a comparison, and the packed file to publish, which holds a part of it (`ulsam.base.packed`).

grid.json                     what is compared
arms/ARM/RUN/summary.json     of each finished run, with all that training leaves
arms/ARM/RUN.log, RUN.failed  what a run printed; why it failed
arms/ARM/external_arm.json    of an arm that another program trains in here, with the grid's seeds, rates and epochs
latency.json                  measured when all runs were finished
compare.json, .md, .csv, .png, rates.png

A packed file holds all but the last line, and of a run its summary or failure alone.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from ulsam.base.errors import UlsamError
from ulsam.base.files import make_folder, read_json, write_atomic, write_json
from ulsam.base.packed import read_packed, unpack, write_packed
from ulsam.study.arms import Arm
from ulsam.study.grid import Failed, Grid, Run
from ulsam.study.paths import without_paths
from ulsam.training.config import read_config
from ulsam.training.restore import check_begun


class ComparisonFolder:
    """A comparison's folder."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self._read: dict[Path, dict[str, Any]] = {}

    def folder(self, run: Run) -> Path:
        """The folder of a run, which `ulsam.training.train.train` makes."""
        return self.root / "arms" / run.arm.slug / run.name

    def outcome(self, run: Run) -> Mapping[str, Any] | Failed | None:
        """The summary of a run, its failure, or None if it has not ended.

        Raises:
            UlsamError: the run in this folder had other settings: results of two recipes are never mixed.
        """
        folder = self.folder(run)
        if folder not in self._read:
            if not (folder / "summary.json").is_file():
                return self._failure(run)
            summary = read_json(folder / "summary.json")
            check_begun(summary.get("config", {}), dataclasses.asdict(run.config), folder)
            self._read[folder] = summary
        return self._read[folder]

    def check(self, run: Run) -> None:
        """Raise unless what lies in the run's folder, finished or not, is that run.

        Raises:
            UlsamError: it had other settings.
        """
        self.outcome(run)
        if (self.folder(run) / "config.yaml").is_file():
            check_begun(read_config(self.folder(run) / "config.yaml"), dataclasses.asdict(run.config), self.folder(run))

    def fail(self, run: Run, reason: str) -> None:
        """Note why a run failed."""
        write_atomic(self.folder(run).with_name(f"{run.name}.failed"), reason + "\n")

    def begin(self, grid: Grid, command: str, data: str | None, files: Mapping[str, str]) -> None:
        """Write down what is compared, and let failed runs be done again; but a try that diverged is a result.

        Args:
            grid: with nothing left at "auto".
            command: that compares it.
            data: the digest of its images, `ulsam.study.identity.data_digest`.
            files: the digests of its weight files and teachers, `ulsam.study.identity.file_digests`.

        Raises:
            UlsamError: a folder holds a run of other settings, or the images or a weight file are not those of the
                runs in it.
        """
        before = self.read_grid()
        if before is not None and before.choosing and grid.choosing and before.choose_split != grid.choose_split:
            on = before.choose_split or "held-out training images"
            raise UlsamError(f"{self.root} chooses rates on {on}: continue with that, or name another `out`")
        known = self.check_identity(grid.shared.data, data, files)
        for run in grid.known(self.outcome):
            self.allow_retry(run)
            self.check(run)
        origin = {"command": command, "data_sha256": data, "files_sha256": sorted({**known, **files}.items())}
        self.write("grid.json", {**grid.to_json(), **origin})

    def check_identity(self, source: str, data: str | None, files: Mapping[str, str]) -> dict[str, str]:
        """Raise unless images and weight files are those of the runs in here; the known digests of files.

        Args:
            source: of the images, for the message.
            data, files: as for :meth:`begin`.

        Raises:
            UlsamError: they are not.
        """
        before = self.read("grid.json") or {}
        if None not in (before.get("data_sha256"), data) and before["data_sha256"] != data:
            raise UlsamError(f"{self.root} compares models on other images than {source} holds now: name another `out`")
        known = dict(before.get("files_sha256", []))
        for name in known.keys() & files:
            if known[name] != files[name]:
                raise UlsamError(
                    f"{name} is not the file that {self.root} began with: put it back, or name another `out`"
                )
        return known

    def allow_retry(self, run: Run) -> None:
        """Let a run that failed be done again; not a try that diverged: that its rate is too high is a result."""
        found = self.outcome(run)
        if isinstance(found, Failed) and not (run.is_try and found.diverged):
            self.clear_failure(run)

    def clear_failure(self, run: Run) -> None:
        """Forget why a run failed."""
        self.folder(run).with_name(f"{run.name}.failed").unlink(missing_ok=True)

    def read_grid(self) -> Grid | None:
        """What was compared in this folder; None if it is new.

        Raises:
            UlsamError: the file is damaged.
        """
        found = self.read("grid.json")
        return None if found is None else Grid.from_json(found)

    def grid(self) -> Grid:
        """What is compared in this folder.

        Raises:
            UlsamError: it is not the folder of a comparison, or the file is damaged.
        """
        found = self.read_grid()
        if found is None:
            raise UlsamError(f"{self.root} is not the folder of a comparison: there is no grid.json in it")
        return found

    def external_arms(self) -> tuple[Arm, ...]:
        """The arms that another program trains in here: each folder's ``external_arm.json`` holds its name and
        settings.

        Raises:
            UlsamError: such a file is damaged.
        """
        found = map(read_json, sorted(self.root.glob("arms/*/external_arm.json")))
        return tuple(Arm(one["name"], (), one["settings"]) for one in found)

    def write(self, name: str, value: Any) -> None:
        """Write JSON into the folder."""
        write_json(self.root / name, value)

    def read(self, name: str) -> Any:
        """JSON from the folder, None if there is no such file."""
        path = self.root / name
        return read_json(path) if path.is_file() else None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Within it no other process is in here: one waits for the other."""
        make_folder(self.root)
        with FileLock(self.root / ".lock"):
            yield

    def publish(self, target: str | Path, grid: Grid) -> None:
        """Pack what reports are made of: summaries, plan and latencies, without paths of this machine, and no weights.

        Runs of an earlier choice are packed too: what was measured stays on record.

        Args:
            target: the packed file, which ends in ``.jsonl.gz``.
            grid: with the arms that another program trains in here.

        Raises:
            UlsamError: the file cannot be written, or it holds runs that are not in this folder.
        """
        names = ["grid.json", "latency.json", *(f"arms/{arm.slug}/external_arm.json" for arm in self.external_arms())]
        names += [path.relative_to(self.root).as_posix() for path in sorted(self.root.glob("arms/*/*/summary.json"))]
        files = {name: value for name in names if (value := self.read(name)) is not None}
        for run in grid.known(self.outcome):
            if isinstance(found := self.outcome(run), Failed):
                files[f"arms/{run.arm.slug}/{run.name}.failed"] = found.reason + "\n"
        if Path(target).exists():
            lost = [name for name in read_packed(target) if name.endswith("summary.json") and name not in files]
            if lost:
                raise UlsamError(
                    f"{target} holds {len(lost)} runs that {self.root} lacks, such as {lost[0]}: start from it, or "
                    "publish under another name"
                )
        write_packed(target, without_paths(files))

    def start_from(self, packed: str | Path) -> None:
        """Take over the runs of a published comparison, and its plan and latencies where this folder has none yet.

        Raises:
            UlsamError: the file is missing or damaged, or its images or weight files are not those of this folder.
        """
        files = read_packed(packed)
        plan = files.get("grid.json")
        if plan is None:
            raise UlsamError(f"{packed} is no published comparison: it lacks grid.json")
        self.check_identity(str(packed), plan.get("data_sha256"), dict(plan.get("files_sha256", [])))
        unpack(files, self.root)

    def _failure(self, run: Run) -> Failed | None:
        try:
            return Failed(self.folder(run).with_name(f"{run.name}.failed").read_text(encoding="utf-8").strip())
        except FileNotFoundError:
            return None
