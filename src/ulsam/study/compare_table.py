"""A comparison as text: for the terminal, as Markdown, as CSV."""

from collections.abc import Mapping, Sequence
from typing import Any

from ulsam.base.text_table import as_csv, text_table
from ulsam.study.compare_result import ArmResult, CompareResult, DifferenceEntry

HEADS = ("arm", "parameters", "MACs", "latency", "lr, epochs", "top-1 (seeds)", "minus base", "verdict")
NUMBERS = (1, 2, 3, 4, 5, 6)  # columns that are flush right


def rows(result: CompareResult) -> list[list[str]]:
    """The cells of the main table, a line an arm; a failed arm says so.

    Args:
        result: what `ulsam.study.compare.compare` returns.
    """
    return [_row(arm, number == 0) for number, arm in enumerate(result["arms"])]


def pairs(result: CompareResult) -> list[list[str]]:
    """The cells of the second table: the difference of every two arms of which neither is the base."""
    base = result["arms"][0]["name"]
    return [
        [f"{pair['arm']} minus {pair['minus']}", points(pair), ", ".join(pair["verdict"])]
        for pair in result["differences"]
        if pair["minus"] != base
    ]


def tries(result: CompareResult) -> list[list[str]]:
    """The cells of the table of tries, heads first: each arm's mean top-1 where rates are chosen, the best one in bold.

    Empty where nothing was tried.
    """
    columns = sorted({(entry["lr"], entry["epochs"]) for arm in result["arms"] for entry in arm["tries"]}, key=_order)
    if not columns:
        return []
    heads = [f"{result['chosen_on']} top-1 at lr, epochs", *(f"{lr:g}, {epochs}" for lr, epochs in columns)]
    return [heads, *([arm["name"], *(_tried(arm, *column) for column in columns)] for arm in result["arms"])]


def text(result: CompareResult) -> str:
    """For the terminal."""
    blocks = ["\n".join(text_table([list(HEADS), *rows(result)], right=NUMBERS))]
    if others := pairs(result):
        blocks.append("\n".join(text_table([["difference", "points", "verdict"], *others], right=(1,))))
    blocks.append("\n".join([legend(result), *(f"note: {note}" for note in result["notes"])]))
    return "\n\n".join(blocks)


def markdown(result: CompareResult) -> str:
    """As Markdown, with the command."""
    blocks = [_markdown_table([list(HEADS), *rows(result)])]
    if others := pairs(result):
        blocks.append(_markdown_table([["difference", "points", "verdict"], *others]))
    blocks.append(legend(result))
    if tried := tries(result):
        blocks.append(_markdown_table(tried))
    if result["notes"]:
        blocks.append("\n".join(f"- {note}" for note in result["notes"]))
    blocks.append(f"`{result['command']}`")
    return "\n\n".join(blocks) + "\n"


def csv_text(result: CompareResult) -> str:
    """As CSV, with plain numbers: shares 0..1, seconds; a cell is empty where nothing was measured."""
    names = [
        "arm",
        "params",
        "macs",
        "latency_seconds",
        "latency_ratio",
        "lr",
        "epochs",
        "seeds",
        "top1_mean",
        "top1_sd",
    ]
    lines: list[list[object]] = [[*names, "minus_base", "minus_base_low", "minus_base_high", "verdict", "failed_runs"]]
    for arm in result["arms"]:
        latency: Mapping[str, Any] = arm["latency"] or {}
        minus: Mapping[str, Any] = arm["minus_base"] or {}
        values = [arm["name"], arm["cost"].get("params"), arm["cost"].get("macs"), latency.get("seconds")]
        values += [latency.get("ratio"), arm["lr"], arm["epochs"], len(arm["seeds"]), arm["top1_mean"], arm["top1_sd"]]
        values += [minus.get("mean"), minus.get("low"), minus.get("high"), "; ".join(minus.get("verdict", ()))]
        lines.append([*values, len(arm["failed"])])
    return as_csv(lines)


def points(difference: DifferenceEntry) -> str:
    """A difference in points of top-1, with its interval.

    >>> points({"mean": 0.012, "low": -0.001, "high": 0.025})
    '+1.20 [-0.10, +2.50]'
    """
    mean, low, high = f"{100 * difference['mean']:+.2f}", difference["low"], difference["high"]
    return mean if low is None or high is None else f"{mean} [{100 * low:+.2f}, {100 * high:+.2f}]"


def latency(arm: ArmResult, *, is_base: bool) -> str:
    """The time of an image: the base's own, of another arm its ratio to that; empty where it was not measured.

    Two models that were timed at different times have nothing in common but their ratios.

    >>> latency({"latency": {"seconds": 0.0061, "ratio": 0.89}}, is_base=False)
    'x 0.89'
    """
    found = arm["latency"]
    if not found:
        return ""
    return f"{1e3 * found['seconds']:.1f} ms" if is_base else f"x {found['ratio']:.2f}"


def legend(result: CompareResult) -> str:
    """What the columns are."""
    rows = [*result["differences"], *(arm["minus_base"] for arm in result["arms"] if arm["minus_base"])]
    over = {pair["over"] for pair in rows}
    interval = f"95 % interval over {' / '.join(sorted(over))}" if over else "no interval"
    paired = "seed" if "seeds" in over else "seed and image"
    margin = 100 * result["margin"]
    machine = f"{result['processor']}, threads: {result['threads']}" if result["processor"] else "CPU"
    return (
        f"Top-1 in %, mean ± standard deviation over seeds{_where(result)}. Minus base: points, paired by {paired}, "
        f"{interval}. Gain, loss: the interval excludes 0. Non-inferior: its lower end is above -{margin:g}. "
        f"Inconclusive: neither. Latency: the base's time of one image, folded model, {machine}; of other arms the "
        "ratio to it. MACs: multiply-adds."
    )


def _where(result: CompareResult) -> str:
    return f", on {result['images']} {result['split']} images" if result["images"] else ""


def _row(arm: ArmResult, is_base: bool) -> list[str]:
    cost, minus = arm["cost"], arm["minus_base"]
    spread = "" if arm["top1_sd"] is None else f" ± {100 * arm['top1_sd']:.2f}"
    words = [*(minus["verdict"] if minus and not is_base else ()), *_lacks(arm)]
    return [
        arm["name"],
        f"{cost['params'] / 1e6:.3f} M" if cost else "",
        f"{cost['macs'] / 1e6:.1f} M" if cost else "",
        latency(arm, is_base=is_base),
        "" if arm["lr"] is None else f"{arm['lr']:g}, {arm['epochs']}",
        "" if arm["top1_mean"] is None else f"{100 * arm['top1_mean']:.2f}{spread} ({len(arm['seeds'])})",
        points(minus) if minus and not is_base else "",
        ", ".join(words),
    ]


def _order(column: tuple[float, int]) -> tuple[int, float]:
    """Fewer epochs first, then smaller rates."""
    return column[1], column[0]


def _tried(arm: ArmResult, lr: float, epochs: int) -> str:
    """The cell of one try: empty where it was not tried or has not ended."""
    tried = next((entry for entry in arm["tries"] if (entry["lr"], entry["epochs"]) == (lr, epochs)), None)
    if tried is not None and tried["failed"]:
        return "failed"
    if tried is None or tried["top1"] is None:
        return ""
    top1 = f"{100 * tried['top1']:.1f}"
    return f"**{top1}**" if (arm["lr"], arm["epochs"]) == (lr, epochs) else top1


def _lacks(arm: ArmResult) -> list[str]:
    if not arm["seeds"] and arm["failed"]:
        return ["failed"]
    lacks = [f"{len(arm['failed'])} failed"] if arm["failed"] else []
    return lacks + ([f"{arm['missing']} not run"] if arm["missing"] else [])


def _markdown_table(cells: Sequence[Sequence[str]]) -> str:
    head, *rest = [[cell.replace("|", "\\|") for cell in line] for line in cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rest])
