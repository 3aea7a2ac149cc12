"""Explain a folder of images: a panel of each, one report over all, and the numbers."""

import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from ulsam.base.errors import printable
from ulsam.base.extras import check_plots
from ulsam.base.files import check_empty, make_folder, write_atomic, write_json
from ulsam.base.provenance import command_line, versions
from ulsam.explanation.captions import model_name, other_classes
from ulsam.explanation.explain_page import Card, card, page
from ulsam.explanation.explain_table import table
from ulsam.explanation.explainer import Explainer
from ulsam.explanation.image_list import list_images, reading_order
from ulsam.explanation.map_numbers import MapNumbers
from ulsam.explanation.measured_batches import add, check_any, explained
from ulsam.explanation.panel import panel
from ulsam.model.given import model_and_spec
from ulsam.model.spec import ModelSpec
from ulsam.training.summary import spec_entry
from ulsam.training.trained_on import note_trained_on


@dataclass(frozen=True)
class Report:
    """What was written."""

    page: Path
    images: int
    known: int  # images whose true class is known
    wrong: int  # of these
    unreadable: tuple[str, ...]  # a line each
    numbers: str  # a text table; empty if no numbers were asked for
    note: str  # why the two models do not compare; empty if they do


def explain_images(
    model: nn.Module | str | os.PathLike[str],
    images: Sequence[str],
    out: str | os.PathLike[str],
    *,
    spec: ModelSpec | None = None,
    against: str | os.PathLike[str] | None = None,
    numbers: bool = False,
) -> Report:
    """Write ``panels/NUMBER-NAME.png`` of each image, ``report.html``, and if asked for ``numbers.json``, into ``out``.

    Every file is whole or not there; the report comes last.

    Args:
        model: a model file, or a model in memory.
        images: files, and folders of them; see :func:`ulsam.explanation.image_list.list_images` for true classes.
        out: a folder that does not exist yet, or is empty.
        spec: of a model in memory, as of `ulsam.load`.
        against: the model file of a model to compare with.
        numbers: whether to measure, too, what :class:`ulsam.explanation.map_numbers.MapNumbers` does.

    Raises:
        UlsamError: not a model file, a folder without an image, no image that can be read, a model without a feature
            map to explain, or ``out`` holds something or cannot be written.
    """
    check_plots("ulsam explain")
    out = Path(out)
    check_empty(out)
    models = {"this model": model_and_spec(model, spec)}
    if against is not None:
        models["base"] = model_and_spec(against)
    listed = list_images(images, models["this model"][1].classes)
    tallies = {name: MapNumbers(*pair) for name, pair in models.items()} if numbers else {}
    if numbers:
        note_trained_on(model, [one.path for one in listed], images)
    explainers = [tallies[name].explainer if numbers else Explainer(*pair) for name, pair in models.items()]
    cards: list[Card] = []
    unreadable: list[str] = []
    for seen in explained(listed, explainers, unreadable):
        add(list(tallies.values()), seen)
        for folder in (out, out / "panels"):
            make_folder(folder)
        for number, image, explanations in seen:
            name = panel_name(number, len(listed), image.name)
            _write_panel(out / "panels" / name, panel(*explanations, title=image.name, truth=image.truth))
            cards.append(card(image.name, image.truth, *explanations, panel=name))
    check_any(len(cards), unreadable)
    results = {name: tally.result() for name, tally in tallies.items()}
    written = table(results) if results else ""
    if results:
        _write_numbers(out / "numbers.json", results, {name: spec for name, (_, spec) in models.items()})
    cards.sort(key=lambda one: reading_order(one.truth, one.named, one.share))
    labels = {name: model_name(spec) for name, (_, spec) in models.items()}
    note = other_classes(*(spec for _, spec in models.values()))
    look: dict[str, Any] = {"model": labels["this model"], "base": labels.get("base"), "numbers": written, "note": note}
    machine = ", ".join(f"{name} {value}" for name, value in versions().items())
    text = page(cards, **look, unreadable=unreadable, command=printable(command_line()), versions=machine)
    write_atomic(out / "report.html", text)
    known = [one for one in cards if one.truth is not None]
    wrong = sum(one.verdict == "wrong" for one in known)
    return Report(out / "report.html", len(cards), len(known), wrong, tuple(unreadable), written, note)


def panel_name(number: int, total: int, name: str) -> str:
    """The file name of a panel: the image's place among all makes it a name of its own.

    >>> panel_name(7, 500, "birds/wren/my wren.jpg")
    '007-my_wren.png'
    """
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", Path(name).stem)[:60]
    return f"{number:0{len(str(total))}}-{stem}.png"


def _write_panel(path: Path, image: Image.Image) -> None:
    buffer = io.BytesIO()
    image.save(buffer, "png", compress_level=4)
    write_atomic(path, buffer.getvalue())


def _write_numbers(path: Path, results: dict[str, dict[str, Any]], specs: dict[str, ModelSpec]) -> None:
    entry = {
        "command": command_line(),
        "models": {name: {"spec": spec_entry(specs[name]), **result} for name, result in results.items()},
        "versions": versions(),
    }
    write_json(path, entry)
