"""The table of ImageNet weights that were edited and reconstructed without labels, from `imagenet.py`."""

import json
from pathlib import Path
from typing import Any

from ulsam.study import compare_table as table

MODELS = {"mobilenetv2_100": "MobileNet-V2", "mobilenetv1_100": "MobileNet-V1"}


def imagenet_table(results: Path) -> str:
    """A line for each edit; a column for each way of reconstruction: top-1 minus the whole model's, agreement."""
    found = json.loads((results / "imagenet.json").read_text(encoding="utf-8"))["models"]
    bases = {entry["model"]: entry["top1"] for entry in found if entry["edit"] == "base"}
    edited = [entry for entry in found if entry["edit"] != "base"]
    ways = list(dict.fromkeys(entry["way"] for entry in edited))
    heads = ["model (its top-1)", "layers", "MACs", "edit", *ways]
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    places = list(dict.fromkeys((entry["model"], entry["places"]) for entry in edited))
    for model, layers in places:
        for edit in dict.fromkeys(entry["edit"] for entry in edited):
            mine = {
                entry["way"]: entry
                for entry in edited
                if (entry["model"], entry["places"], entry["edit"]) == (model, layers, edit)
            }
            title = f"{MODELS[model]} ({100 * bases[model]:.1f})"
            macs = f"{100 * next(iter(mine.values()))['macs'] - 100:+.1f}%"
            cells = [title, layers.replace(",", ", "), macs, edit, *(_cell(mine.get(way)) for way in ways)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(entry: dict[str, Any] | None) -> str:
    return "" if entry is None else f"{table.points(entry['minus_base'])}, {100 * entry['agreement']:.0f}"
