"""The headline: each arm of the two main comparisons in a row, and the few rows that README.md shows of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tables_compare import alike, comparison, is_pruned

from ulsam.study import compare_table as table

BIRDS = "rates_cub100"
#: the comparisons, and what they compare
HEADLINES = {
    BIRDS: "CUB-200-2011, 100 of its classes",
    "compare_grocery81": "Grocery Store, 81 classes",
}


#: the rows of README.md: the larger budget, on the birds
README_ARMS = (
    "base",
    "remove 13,14,16,17",
    "ULSAM 13,14,16,17",
    "remove + reconstruct 13,14,16,17",
    "ULSAM + reconstruct 13,14,16,17",
    "base at 130 px",
    "base at 128 px",
)
HEADER = [
    "| model | parameters | MACs | time of an image | test top-1, mean ± sd (seeds) | minus base | minus removal "
    "| minus pruning |",
    "|---|---|---|---|---|---|---|---|",
]


def readme_table(results: Path) -> str:
    """A few rows of :func:`headline_table`, without its last column."""
    lines = [*HEADER, *rows(comparison(results, BIRDS), README_ARMS)]
    return "\n".join(f"{line.rsplit('|', 2)[0]}|" for line in lines)


def headline_table(results: Path) -> str:
    """One row an arm that has results; the arms of a comparison are called as in :func:`comparison_table`."""
    lines = list(HEADER)
    for name, title in HEADLINES.items():
        found = comparison(results, name)
        lines.append(f"| **{title}, {found['images']} {found['split']} images** | | | | | | | |")
        lines += rows(found, [arm["name"] for arm in found["arms"]])
    return "\n".join(lines)


def rows(found: dict[str, Any], names: Sequence[str]) -> list[str]:
    """The rows of the arms of these names that have results."""
    arms = [arm for arm in found["arms"] if arm["seeds"] or arm["failed"]]
    pairs = _both_ways(found["differences"])
    return [_headline(arm, arms[0], arms, pairs) for arm in arms if arm["name"] in names]


def _headline(
    arm: dict[str, Any],
    base: dict[str, Any],
    arms: list[dict[str, Any]],
    pairs: dict[tuple[str, str], dict[str, Any]],
) -> str:
    name = arm["name"]
    if not arm["seeds"]:
        return f"| {called(name)} | | | | failed | | | |"
    shares = [f"{arm['cost'][key] / base['cost'][key] - 1:+.1%}" for key in ("params", "macs")]
    time = arm["latency"] and f"{arm['latency']['ratio'] - 1:+.0%}"
    if arm is base:
        shares = [f"{base['cost'][key] / 1e6:.2f} M" for key in ("params", "macs")]
        time = base["latency"] and f"{1e3 * base['latency']['seconds']:.1f} ms"
    spread = "" if arm["top1_sd"] is None else f" ± {100 * arm['top1_sd']:.2f}"
    trained = [other for other in arms if is_pruned(other["name"]) and other["seeds"]]
    pruned = [other["name"] for other in trained if alike(arm, other, "macs")]
    pruned.sort(key=lambda other: ("reconstruct" in other) != ("+ reconstruct" in name))
    removal = f"remove {'+ reconstruct ' if '+ reconstruct' in name else ''}{name.split()[-1]}"
    rivals = [base["name"], removal, *([] if is_pruned(name) else pruned[:1])]
    minus = [table.points(pairs[name, rival]) if (name, rival) in pairs else "" for rival in rivals]
    cells = [
        called(name),
        *shares,
        time or "",
        f"{100 * arm['top1_mean']:.2f}{spread} ({len(arm['seeds'])})",
        *minus,
        *[""] * (3 - len(minus)),
    ]
    return f"| {' | '.join(cells)} |"


def called(name: str) -> str:
    """An arm's name for a reader: "remove 14,17" as "remove 14, 17", a pruned model by who pruned it, and to what.

    >>> called("pruned-uniform-params-0.82")
    'Torch-Pruning, 82.0 % of the parameters'
    >>> called("pruned-uniform-reconstruct-macs-0.758")
    'Torch-Pruning + reconstruct, 75.8 % of the MACs'
    """
    if not is_pruned(name):
        return name.replace(",", ", ")
    measure, share = name.split("-")[-2:]
    who = "Torch-Pruning + reconstruct" if "-reconstruct-" in name else "Torch-Pruning"
    return f"{who}, {100 * float(share):.1f} % of the {({'macs': 'MACs', 'params': 'parameters'})[measure]}"


def _both_ways(differences: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """Each difference by its two arms, and the same the other way round."""
    found = {}
    for pair in differences:
        found[pair["arm"], pair["minus"]] = pair
        low, high = (None if end is None else -end for end in (pair["high"], pair["low"]))
        found[pair["minus"], pair["arm"]] = {**pair, "mean": -pair["mean"], "low": low, "high": high}
    return found
