"""The record of a slimming, ``slim.json``: all that it measured and chose, so that a second start resumes from it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from ulsam.base.errors import UlsamError
from ulsam.base.files import check_empty, clear_parts, make_folder, read_json, write_json
from ulsam.base.provenance import command_line, versions
from ulsam.study.slim_damage import SampleScore
from ulsam.study.slim_result import SlimResult

NAME = "slim.json"
RECONSTRUCTED = "measured_reconstructed"  # scores of sets after reconstruction
_KEYS = ("measured", RECONSTRUCTED)


class SlimRecord:
    """The record in ``out``, written after each figure; makes the folder at the first write.

    Args:
        out: the folder, a new one, or that of the same slimming.
        budget: what is asked, as JSON; the figures in the file are taken only if they are of the same. Until the choice
            is made the share may be another: no figure depends on it.

    Raises:
        UlsamError: the folder holds something else, or the slimming of something else.

    >>> import tempfile
    >>> out = Path(tempfile.mkdtemp()) / "new"
    >>> SlimRecord(out, {"share": 0.75}).add_score(["14"], SampleScore(loss=0.5, top1=0.9))
    >>> SlimRecord(out, {"share": 0.75}).score(["14"])
    SampleScore(loss=0.5, top1=0.9)
    """

    def __init__(self, out: Path, budget: Mapping[str, Any]) -> None:
        self.path = out / NAME
        self.data: dict[str, Any] = {"command": command_line(), "versions": versions(), "budget": dict(budget)}
        check_folder(out)
        if not self.path.exists():
            return
        before = _read(self.path)
        for name, value in budget.items():
            if name not in before["budget"]:
                raise UlsamError(
                    f"{self.path} is of another version of ulsam, which knew no {name}: choose another `out`"
                )
            free = name == "share" and "chosen" not in before
            if before["budget"][name] != value and not free:
                raise UlsamError(
                    f"{out} holds a slimming with other settings: {name} was {before['budget'][name]!r} and is "
                    f"{value!r} now; choose another `out`"
                )
        self.data = {**before, "budget": dict(budget)}
        clear_parts(out)

    @property
    def result(self) -> SlimResult:
        """All that is kept; to be read once the blocks are chosen, since it lacks required keys before."""
        return cast(SlimResult, self.data)

    def get(self, key: str) -> Any:
        """What is kept under this key; None if nothing."""
        return self.data.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keep a JSON value, on the disk too."""
        self.data[key] = value
        self.write()

    def score(self, blocks: list[str], *, reconstructed: bool = False) -> SampleScore | None:
        """The score with these blocks replaced, before or after reconstruction, if it was measured."""
        entries = self.data.get(_KEYS[reconstructed], [])
        found = next((entry for entry in entries if entry["blocks"] == blocks), None)
        return found and SampleScore(found["loss"], found["top1"])

    def add_score(self, blocks: list[str], score: SampleScore, *, reconstructed: bool = False) -> None:
        """Keep a score."""
        self.add_scores([(blocks, score)], reconstructed=reconstructed)

    def add_scores(self, scores: Iterable[tuple[list[str], SampleScore]], *, reconstructed: bool = False) -> None:
        """Keep scores, with one write."""
        self.data.setdefault(_KEYS[reconstructed], []).extend(
            {"blocks": blocks, "loss": score.loss, "top1": score.top1} for blocks, score in scores
        )
        self.write()

    def write(self) -> None:
        """Write the file."""
        make_folder(self.path.parent)
        write_json(self.path, self.data)


def check_folder(out: Path) -> None:
    """Raise unless it is a new folder, an empty one, or that of a slimming.

    Raises:
        UlsamError: it is something else.

    >>> check_folder(Path("a folder that is not there"))
    """
    if (out / NAME).exists():
        _read(out / NAME)
    else:
        check_empty(out, f"it holds no {NAME} to resume from; ")


def _read(path: Path) -> dict[str, Any]:
    data = read_json(path)
    if not isinstance(data.get("budget"), dict):
        raise UlsamError(f"{path} is not what slimming wrote: choose another `out`")
    return data
