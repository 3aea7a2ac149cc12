"""The table on the card of a trained model of the package: its figures beside those of the base model."""

import json
from pathlib import Path

from tables_compare import comparison


def card_table(results: Path, name: str, compared: str) -> str:
    """The packed model, its arm over all seeds, and the base model of its comparison.

    Args:
        name: of ``packed_NAME.json``.
        compared: the published comparison whose arm it is.
    """
    packed = json.loads((results / f"packed_{name}.json").read_text())
    found = comparison(results, compared)
    base = found["arms"][0]
    arm = next(arm for arm in found["arms"] if arm["name"] == packed["arm"])
    before = base["top1"][base["seeds"].index(packed["seed"])]
    minus = arm["minus_base"]
    rows = [
        (f"top-1 on the {found['split']} images", f"{100 * packed['top1']:.2f} %", f"{100 * before:.2f} %"),
        (
            f"the same with {len(arm['seeds'])} seeds, mean ± sd",
            *(f"{100 * model['top1_mean']:.2f} ± {100 * model['top1_sd']:.2f} %" for model in (arm, base)),
        ),
        *(
            (title, f"{arm['cost'][key] / 1e6:.2f} M", f"{base['cost'][key] / 1e6:.2f} M")
            for title, key in (("parameters", "params"), ("multiply-adds", "macs"))
        ),
        ("time of one image", *(f"{1e3 * model['latency']['seconds']:.1f} ms" for model in (arm, base))),
    ]
    return "\n".join(
        [
            f"| {found['images']} {found['split']} images; {found['processor']} | this model | the base model |",
            "| --- | --- | --- |",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
            f"Seed {packed['seed']}, the first one, not the best; learning rate {arm['lr']:g} and {arm['epochs']} "
            f"epochs, chosen on the set's {found['chosen_on']} images. Edit: `{'; '.join(arm['edits'])}`. Over all "
            f"seeds the models are {100 * minus['mean']:+.2f} points [{100 * minus['low']:+.2f}, "
            f"{100 * minus['high']:+.2f}] from the base models. Size of the file: {packed['bytes'] / 1e6:.2f} MB.",
        ]
    )


def backbone_card(results: Path, name: str) -> str:
    """The model that `backbone.py` packed, at each stage, beside the one with all blocks."""
    packed = json.loads((results / f"packed_{name}.json").read_text())
    titles = {"block": "reconstructed block by block", "joint": "then jointly"}
    models = [
        ("all blocks, ImageNet weights", packed["base"]),
        *((titles[stage["scope"]], stage) for stage in packed["stages"]),
        ("this model, in half precision", packed["packed"]),
    ]
    lines = [
        f"| {packed['images']} images, each of another class | top-1 | same first class as with all blocks |",
        "| --- | --- | --- |",
        *(f"| {title} | {100 * model['top1']:.1f} % | {100 * model['agreement']:.0f} % |" for title, model in models),
    ]
    note = (
        f"{packed['steps']} steps for each place, and as many jointly, on one image of each of 500 other classes and "
        f"{packed['views']} random crops of each. Size of the file: {packed['bytes'] / 1e6:.2f} MB."
    )
    return "\n".join([*lines, "", note])
