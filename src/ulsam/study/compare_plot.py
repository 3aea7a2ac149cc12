"""A comparison as images: accuracy against cost, and how each arm's learning rate was chosen."""

import io
import math
from collections.abc import Mapping
from typing import Any

from ulsam.base.plot_style import style
from ulsam.study import compare_table as table


def draw(result: Mapping[str, Any]) -> bytes:
    """A PNG: top-1 against MACs and, where it was measured, against latency as a share of the base's.

    Error bars of the base are its standard deviation over seeds; those of the others are the 95 % interval of their
    difference to the base, around the base's mean plus that difference. So an arm whose bar does not reach the dashed
    line differs from the base.

    Args:
        result: what `ulsam.study.compare.compare` returns.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    arms = [(number, arm) for number, arm in enumerate(result["arms"]) if arm["top1_mean"] is not None]
    timed = [(number, arm) for number, arm in arms if arm["latency"]]
    figure = Figure(figsize=(11 if timed else 6.5, 4.6), layout="constrained")
    axes = figure.subplots(1, 2 if timed else 1, squeeze=False, sharey=True)[0]
    costs = [("MACs of one image (millions)", [(*pair, pair[1]["cost"]["macs"] / 1e6) for pair in arms])]
    if timed:
        label = f"latency of one image / that of {arms[0][1]['name']}, {table.latency(arms[0][1], is_base=True)}"
        costs.append((label, [(*pair, pair[1]["latency"]["ratio"]) for pair in timed]))
    for panel, (label, shown) in zip(axes, costs, strict=False):
        for number, arm, cost in shown:
            middle = center(arm, arms[0][1])
            bar: Any = _bar(arm, number == 0)
            panel.errorbar(cost, middle, yerr=bar, capsize=4, label=arm["name"], **style(number))
            if number == 0:
                panel.axhline(middle, ls="--", lw=0.8, color="gray")
        panel.set(xlabel=label)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    low, high = axes[0].get_ylim()
    axes[0].set(ylabel=f"{result['split'] or ''} top-1 (%)", ylim=(max(low, 0), min(high, 100)))
    bars = "error bars of the base: standard deviation over seeds; of others: 95 % interval of minus base"
    figure.suptitle(bars, fontsize=8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def draw_rates(result: Mapping[str, Any]) -> bytes:
    """A PNG: each arm's top-1 where rates are chosen, by learning rate; a line for each number of epochs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tried = sorted({entry["epochs"] for arm in result["arms"] for entry in arm["tries"]})
    arms = [(number, arm) for number, arm in enumerate(result["arms"]) if arm["tries"]]
    names = len(arms) + len(tried)
    figure = Figure(figsize=(6.5, 3.6 + 0.19 * math.ceil(names / 2)), layout="constrained")  # the legend's rows
    axes = figure.subplots()
    for number, arm in arms:
        axes.plot([], [], label=arm["name"], **style(number))
        for turn, epochs in enumerate(tried):
            found = sorted(
                (entry["lr"], 100 * entry["top1"])
                for entry in arm["tries"]
                if entry["epochs"] == epochs and entry["top1"] is not None
            )
            if not found:
                continue
            axes.plot([lr for lr, _ in found], [top for _, top in found], **style(number) | _turn(turn))
    for turn, epochs in enumerate(tried):
        axes.plot([], [], label=f"{epochs} epochs", **{**style(0), "color": "gray"} | _turn(turn))
    axes.set(xscale="log", xlabel="learning rate", ylabel=f"top-1 on {result['chosen_on']} images (%)")
    rates = sorted({entry["lr"] for arm in result["arms"] for entry in arm["tries"]})
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def center(arm: Mapping[str, Any], base: Mapping[str, Any]) -> float:
    """Where an arm is drawn, in points: its difference, which is over common seeds, above the base's mean.

    >>> base = {"top1_mean": 0.5}
    >>> center({"top1_mean": 0.9, "minus_base": {"mean": 0.25}}, base), center({**base, "minus_base": None}, base)
    (75.0, 50.0)
    """
    minus = arm["minus_base"]
    return 100 * (base["top1_mean"] + minus["mean"] if minus else arm["top1_mean"])


def _turn(number: int) -> dict[str, Any]:
    """How a number of epochs is drawn, by its place among those that were tried."""
    return {"ls": ("-", "--", ":", "-.")[number % 4], "fillstyle": "none" if number else "full"}


def _bar(arm: Mapping[str, Any], is_base: bool) -> list[list[float]] | None:
    """The lengths of an error bar downwards and upwards, in points."""
    minus = arm["minus_base"]
    if is_base:
        return None if arm["top1_sd"] is None else [[100 * arm["top1_sd"]]] * 2
    if not minus or minus["low"] is None:
        return None
    return [[100 * (minus["mean"] - minus["low"])], [100 * (minus["high"] - minus["mean"])]]
