"""The card of a model on a hub: what it is, how good it is on which images, and how to use it."""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from ulsam.base.markdown import escaped
from ulsam.model.spec import ModelSpec
from ulsam.training.summary import percent

SHOWN = 200  # classes that the card lists


def model_card(name: str, spec: ModelSpec, summary: Mapping[str, Any] | None = None) -> str:
    """A card in Markdown, with the metadata that hubs read.

    Args:
        name: of the model there, as ``USER/NAME``.
        spec: of the model.
        summary: what ``summary.json`` of its run holds. Of paths on this machine only the data set's name is taken.

    >>> print(model_card("me/birds", ModelSpec("mobilenetv2_100", ("wren", "robin"))).splitlines()[7])
    # birds
    """
    tags = ["image-classification", "timm", *["ulsam"] * bool(spec.edits)]
    lines = ["---", f"library_name: {'ulsam' if spec.edits else 'timm'}", "tags:", *(f"- {tag}" for tag in tags)]
    lines += ["pipeline_tag: image-classification"] * bool(spec.edits) + ["---", "", f"# {name.rpartition('/')[2]}", ""]
    edits = "; ".join(map(str, spec.edits))
    size = "×".join(map(str, spec.input_size[1:]))
    lines += [
        f"An image classifier with {len(spec.classes)} classes: timm's `{spec.base}`"
        + (f", edited by ulsam: `{edits}`." if edits else ".")
        + f" Images of {size} pixels.",
        "",
    ]
    if spec.several:
        lines += [
            "An image may have several labels: a sigmoid of each output is its probability, and `thresholds` in "
            "`config.json` says from which on the image has it.",
            "",
        ]
    if summary:
        lines += _results(summary)
    lines += ["## Use", "", "```python", *_usage(name, spec), "```", "", "## Classes", ""]
    lines += [", ".join(map(escaped, spec.classes[:SHOWN])) + (", ..." if len(spec.classes) > SHOWN else "")]
    return "\n".join(lines) + "\n"


def _results(summary: Mapping[str, Any]) -> list[str]:
    scores, cost, base = summary["scores"], summary["cost"], summary["base_cost"]
    config = summary["config"]
    kept = summary.get("kept", {"chosen_on": None})
    chosen = f", of which the weights of epoch {kept['epoch']} are kept" if kept["chosen_on"] else ""
    data = PurePath(config["data"].replace("\\", "/")).name
    on = f"On {scores['images']} {summary['split']} images of {escaped(data)}"
    on += ", which also chose the epoch (the scores are optimistic)" if kept["chosen_on"] else ""
    if "map" in scores:
        shown = [
            f"| mAP | {percent(scores['map'])} |",
            f"| mean F1 at the thresholds, which these images chose | {percent(scores['f1'])} |",
        ]
    else:
        low, high = scores["top1_interval_95"]
        interval = f"95 % interval {100 * low:.1f} to {100 * high:.1f}, over images"
        shown = [
            f"| top-1 | {100 * scores['top1']:.2f} % ({interval}) |",
            f"| top-5 | {100 * scores['top5']:.2f} % |",
        ]
    lines = [
        "## Results",
        "",
        f"{on}; trained on {summary['images']['train']}.",
        "",
        "| | |",
        "|---|---|",
        *shown,
        f"| loss | {scores['loss']:.4f} |",
        f"| parameters | {cost['params'] / 1e6:.3f} M{_change(cost['params'], base['params'])} |",
        f"| MACs | {cost['macs'] / 1e6:.1f} M{_change(cost['macs'], base['macs'])} |",
        "",
        "## Training",
        "",
        f"{config['epochs']} epochs of {config['opt']}{chosen}, with learning rate {config['lr']:g}, batches of "
        f"{config['batch_size']}, seed {config['seed']}"
        + (f", distilled from `{summary['teacher']['spec']['base']}`." if summary["teacher"] else "."),
        "",
    ]
    return lines


def _change(now: int, before: int) -> str:
    return "" if now == before else f" ({100 * (now / before - 1):+.1f} % against the base model)"


def _usage(name: str, spec: ModelSpec) -> list[str]:
    if not spec.edits:
        return ["import timm", "", f'model = timm.create_model("hf-hub:{name}", pretrained=True).eval()']
    return [
        "import ulsam",
        "",
        f'model, spec = ulsam.load("hf-hub:{name}")',
        f'for found in ulsam.predict("hf-hub:{name}", ["image.jpg"]):',
        "    print(found.classes)",
    ]
