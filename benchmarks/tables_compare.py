"""The tables and figures of comparisons in docs/results.md, computed from every run's summary."""

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ulsam.base.packed import SUFFIX, read_packed, unpack
from ulsam.study import compare_plot as plot
from ulsam.study import compare_table as table
from ulsam.study.compare import MARGIN
from ulsam.study.compare_report import summarize
from ulsam.study.comparison_folder import ComparisonFolder


@functools.cache
def comparison(results: Path, name: str) -> dict[str, Any]:
    """What a published comparison found, computed from its runs.

    Raises:
        UlsamError: it is missing or damaged.
    """
    with tempfile.TemporaryDirectory() as folder:
        unpack(read_packed(results / f"{name}{SUFFIX}"), folder)
        unpacked = ComparisonFolder(folder)
        return summarize(unpacked.grid(), unpacked, MARGIN, unpacked.read("grid.json")["command"])


def comparison_table(results: Path, name: str, against: Sequence[str] = ()) -> str:
    """The tables of a comparison, with its notes and command; of the differences those at equal cost.

    Equal: MACs or parameters differ by 2 % at most, as those of a block replaced in several ways. Not every
    edit's MACs are those of a size of the input, so what was reconstructed is compared with the base at each smaller
    input. Where arms are many, only the differences to the arms named in ``against``. Pruned arms with a rate of
    their own were trained in another comparison, where their command stands.
    """
    found = comparison(results, name)
    arms = {arm["name"]: arm for arm in found["arms"]}
    matched = []
    for pair in found["differences"]:
        ours, other = arms[pair["arm"]], arms[pair["minus"]]
        if against and other["name"] not in against:
            continue
        if alike(ours, other, "macs") or alike(ours, other, "params") or _rivals(pair["arm"], pair["minus"]):
            matched.append(pair)
    out = found["command"].rpartition("--out ")[2]
    packed = read_packed(results / f"{name}{SUFFIX}")
    external = [content for file, content in packed.items() if file.endswith("/external_arm.json")]
    commands = [f"`{external_command(arm, out)}`" for arm in external if "lr" not in arm["settings"]]
    return "\n\n".join([table.markdown({**found, "differences": matched}).strip(), *commands])


def external_command(arm: dict[str, Any], out: str) -> str:
    """The command that trained an arm which joined a comparison.

    >>> external_command({"name": "pruned-uniform-macs-0.758", "wanted": {"macs": 0.758}}, "runs/cub100")
    'python benchmarks/pruning.py runs/cub100 --uniform --macs 0.758'
    >>> external_command({"name": "pruned-uniform-reconstruct-macs-0.758", "wanted": {"macs": 0.758}}, "runs/cub100")
    'python benchmarks/pruning.py runs/cub100 --uniform --macs 0.758 --reconstruct'
    >>> external_command({"name": "gated 14,17", "kind": "gated", "at": "14,17", "groups": 4}, "runs/cub100")
    'python benchmarks/variants.py runs/cub100 gated 14,17'
    """
    if is_pruned(arm["name"]):
        ((measure, share),) = arm["wanted"].items()
        uniform = "--uniform " if "-uniform-" in arm["name"] else ""
        reconstruct = " --reconstruct" if "-reconstruct-" in arm["name"] else ""
        return f"python benchmarks/pruning.py {out} {uniform}--{measure} {share:g}{reconstruct}"
    groups = f" --groups {arm['groups']}" if arm["groups"] != 4 else ""
    return f"python benchmarks/variants.py {out} {arm['kind']} {arm['at']}{groups}"


def write_figures(results: Path, name: str, target: Path) -> None:
    """Draw a comparison for its page: accuracy against cost in TARGET.png, the tried rates in TARGET_rates.png."""
    found = comparison(results, name)
    target.parent.mkdir(exist_ok=True)
    target.with_name(f"{target.name}.png").write_bytes(plot.draw(found))
    target.with_name(f"{target.name}_rates.png").write_bytes(plot.draw_rates(found))


def is_pruned(name: str) -> bool:
    """Whether the arm is one of benchmarks/pruning.py."""
    return name.startswith("pruned-")


def _rivals(*names: str) -> bool:
    """Whether one of two arms is the base at a smaller input and the other was reconstructed.

    >>> _rivals("remove + reconstruct 14,17", "base at 128 px"), _rivals("base", "remove + reconstruct 14,17")
    (True, False)
    """
    return any(name.startswith("base at ") for name in names) and any("+ reconstruct " in name for name in names)


def alike(arm: dict[str, Any], other: dict[str, Any], measure: str) -> bool:
    """Whether two arms cost the same, to 2 %: as a block does that is replaced in several ways."""
    return bool(abs(arm["cost"][measure] / other["cost"][measure] - 1) <= 0.02)
