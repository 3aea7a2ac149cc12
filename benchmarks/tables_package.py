"""The tables on the cards of the package's models: their figures beside those of the base model."""

import json
from pathlib import Path
from typing import Any

from tables_compare import comparison

from ulsam.explanation.measures import INERT
from ulsam.study import compare_table as table


def card_table(results: Path, name: str, compared: str, control: str) -> str:
    """The packed model, its arm over all seeds, and the base model of its comparison.

    Args:
        name: of ``packed_NAME.json``.
        compared: the published comparison whose arm it is.
        control: the arm that differs in attention alone.
    """
    packed = json.loads((results / f"packed_{name}.json").read_text())
    found = comparison(results, compared)
    base = found["arms"][0]
    arm = next(arm for arm in found["arms"] if arm["name"] == packed["arm"])
    before = base["top1"][base["seeds"].index(packed["seed"])]
    over = next(pair for pair in found["differences"] if (pair["arm"], pair["minus"]) == (arm["name"], control))
    rows = [
        (f"top-1 on the {found['split']} images", f"{100 * packed['top1']:.2f} %", f"{100 * before:.2f} %"),
        ("the same in float32", f"{100 * packed['top1_float32']:.2f} %", f"{100 * before:.2f} %"),
        (
            f"the same with {len(arm['seeds'])} seeds, mean ± sd",
            *(f"{100 * model['top1_mean']:.2f} ± {100 * model['top1_sd']:.2f} %" for model in (arm, base)),
        ),
        *(
            (title, f"{arm['cost'][key] / 1e6:.2f} M", f"{base['cost'][key] / 1e6:.2f} M")
            for title, key in (("parameters", "params"), ("MACs", "macs"))
        ),
        ("time of one image", *(f"{1e3 * model['latency']['seconds']:.1f} ms" for model in (arm, base))),
    ]
    effects = packed["attention_effect"].values()
    notes = [
        f"Seed {packed['seed']}, the first one, not the best.",
        f"Learning rate {arm['lr']:g} and {arm['epochs']} epochs, chosen on the set's {found['chosen_on']} images.",
        f"Edit: `{'; '.join(arm['edits'])}`.",
        f"Size of the file: {packed['bytes'] / 1e6:.2f} MB.",
        f"Over all seeds, top-1 minus that of the base models: {_difference(arm['minus_base'])}.",
        f"Minus {control}: {_difference(over)}.",
        f"Uniform maps in the place of the attention maps would change the features by {100 * min(effects):.1f} to "
        f"{100 * max(effects):.1f} %.",
        *(["The attention does next to nothing."] if max(effects) < INERT else []),
    ]
    return "\n".join(
        [
            f"| {found['images']} {found['split']} images; {found['processor']} | this model | the base model |",
            "| --- | --- | --- |",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
            " ".join(notes),
        ]
    )


def _difference(minus: dict[str, Any]) -> str:
    """In points, with interval and verdict."""
    return f"{table.points(minus)} points, {', '.join(minus['verdict'])}"


def backbone_card(results: Path, name: str) -> str:
    """The model that `backbone.py` packed: its cost, and how far its features are from the whole model's."""
    packed = json.loads((results / f"packed_{name}.json").read_text())
    titles = {None: "as the edit leaves it", "block": "reconstructed block by block", "joint": "then jointly"}
    errors = [(titles[stage["scope"]], stage["error"]) for stage in packed["stages"]]
    params, macs = (
        " | ".join(f"{packed[key][which] / 1e6:.2f} M" for which in ("this", "base")) for key in ("params", "macs")
    )
    lines = [
        "| without a classifier | this model | all blocks |",
        "| --- | --- | --- |",
        f"| parameters | {params} |",
        f"| MACs | {macs} |",
        *(f"| error of the last feature map, {title} | {error:.2f} | 0 |" for title, error in errors),
        f"| the same in half precision | {packed['packed']:.2f} | 0 |",
    ]
    images = packed["images"]
    note = (
        f"Error: the sum of squared differences over the sum of squares, on {images['test']} images that it was not "
        f"reconstructed on. {packed['steps']} steps for each kept block, and as many jointly, on "
        f"{images['reconstruct']} images and {packed['views']} random crops of each. "
        f"Size of the file: {packed['bytes'] / 1e6:.2f} MB."
    )
    return "\n".join([*lines, "", note])
