"""Explain a folder of pictures: a panel of each, one report over all, and the numbers."""

import io
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ulsam.errors import printable
from ulsam.explanation.batches import add, check_any, explained
from ulsam.explanation.explainer import Explainer
from ulsam.explanation.index import list_pictures, urgency
from ulsam.explanation.numbers import Numbers
from ulsam.explanation.page import Card, card, page
from ulsam.explanation.panel import panel
from ulsam.explanation.table import table
from ulsam.explanation.words import net_name, other_classes
from ulsam.extras import check_plots
from ulsam.files import check_empty, make_folder, write_atomic
from ulsam.models import load
from ulsam.recipe import Recipe
from ulsam.train.report import command_line, recipe_entry, versions


@dataclass(frozen=True)
class Report:
    """What was written."""

    page: Path
    pictures: int
    known: int  # pictures whose true class is known
    wrong: int  # of these
    unreadable: tuple[str, ...]  # a line each
    numbers: str  # a text table; empty if no numbers were asked for
    note: str  # why the two nets do not compare; empty if they do


def explain_pictures(
    model: str | os.PathLike[str],
    pictures: Sequence[str],
    out: str | os.PathLike[str],
    *,
    against: str | os.PathLike[str] | None = None,
    numbers: bool = False,
) -> Report:
    """Write ``panels/NUMBER-NAME.png`` of each picture, ``report.html``, and on wish ``numbers.json``, into ``out``.

    Every file is whole or not there; the report comes last.

    Args:
        model: a model file.
        pictures: files, and folders of them; see :func:`ulsam.explanation.index.list_pictures` for true classes.
        out: a folder that does not exist yet, or is empty.
        against: the model file of a net to compare with.
        numbers: whether to measure, too, what :class:`ulsam.explanation.numbers.Numbers` does.

    Raises:
        UlsamError: not a model file, a folder without a picture, no picture that can be read, a net without a feature
            map to explain, or ``out`` holds something or cannot be written.
    """
    check_plots("ulsam explain")
    out = Path(out)
    check_empty(out)
    nets = {name: load(file) for name, file in (("this net", model), ("base", against)) if file is not None}
    found = list_pictures(pictures, nets["this net"][1].classes)
    tallies = {name: Numbers(*net) for name, net in nets.items()} if numbers else {}
    explainers = [tallies[name].explainer if numbers else Explainer(*net) for name, net in nets.items()]
    cards: list[Card] = []
    unreadable: list[str] = []
    for seen in explained(found, explainers, unreadable):
        add(list(tallies.values()), seen)
        for folder in (out, out / "panels"):
            make_folder(folder)
        for number, one, each in seen:
            name = panel_name(number, len(found), one.name)
            _write_panel(out / "panels" / name, panel(*each, title=one.name, truth=one.truth))
            cards.append(card(one.name, one.truth, *each, panel=name))
    check_any(len(cards), unreadable)
    results = {name: tally.result() for name, tally in tallies.items()}
    written = table(results) if results else ""
    if results:
        _write_numbers(out / "numbers.json", results, {name: recipe for name, (_, recipe) in nets.items()})
    cards.sort(key=lambda one: urgency(one.truth, one.named, one.share))
    told = {name: net_name(recipe) for name, (_, recipe) in nets.items()}
    note = other_classes(*(recipe for _, recipe in nets.values()))
    look: dict[str, Any] = {"net": told["this net"], "base": told.get("base"), "numbers": written, "note": note}
    machine = ", ".join(f"{name} {value}" for name, value in versions().items())
    text = page(cards, **look, unreadable=unreadable, command=printable(command_line()), versions=machine)
    write_atomic(out / "report.html", text)
    known = [one for one in cards if one.truth is not None]
    wrong = sum(one.verdict == "wrong" for one in known)
    return Report(out / "report.html", len(cards), len(known), wrong, tuple(unreadable), written, note)


def panel_name(number: int, total: int, name: str) -> str:
    """The file name of a panel: the picture's place among all makes it a name of its own.

    >>> panel_name(7, 500, "birds/wren/my wren.jpg")
    '007-my_wren.png'
    """
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", Path(name).stem)[:60]
    return f"{number:0{len(str(total))}}-{stem}.png"


def _write_panel(path: Path, picture: Image.Image) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, "png", compress_level=4)
    write_atomic(path, buffer.getvalue())


def _write_numbers(path: Path, results: dict[str, dict[str, Any]], recipes: dict[str, Recipe]) -> None:
    entry = {
        "command": command_line(),
        "nets": {name: {"recipe": recipe_entry(recipes[name]), **result} for name, result in results.items()},
        "versions": versions(),
    }
    write_atomic(path, json.dumps(entry, indent=1, ensure_ascii=False) + "\n")
