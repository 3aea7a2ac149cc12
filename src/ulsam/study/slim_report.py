"""What slimming reports, from what ``slim.json`` holds."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from ulsam.base.text_table import text_table
from ulsam.study.slim_budget import WORDS
from ulsam.study.slim_result import OriginalModel, SampleCounts, SetScore, SlimResult

SHOWN = 10  # sets of the search in the table; all are in slim.json


def start_lines(model: OriginalModel, images: SampleCounts) -> list[str]:
    """What is slimmed, and on what its damage is measured."""
    return [
        f"model   {model['spec']}; edits: {'; '.join(model['edits']) or 'none'}; "
        f"{model['params'] / 1e6:.3f} M parameters, {model['macs'] / 1e6:.1f} M MACs",
        f"data    damage on {images['sample']} of {images['training']} training images",
    ]


def choice_lines(slimming: SlimResult) -> list[str]:
    """The blocks with what each saves and its damage, the sets that were tried, the chosen one, and why."""
    base, chosen = _base_score(slimming), slimming["chosen"]
    lines = [
        f"base    loss {base['loss']:.4f}, top-1 {100 * base['top1']:.2f} % on these images",
        "",
        *_block_table(slimming),
        "",
        *_set_table(slimming),
        "",
        f"chosen  {', '.join(chosen['blocks'])}: {_reason(slimming)}",
    ]
    return lines


def result_lines(slimming: SlimResult, out: Path) -> list[str]:
    """The slimmed model beside the original one; without a result, how to train it."""
    if "result" not in slimming:
        command = ["ulsam", "train", "--config", str(out / "train.yaml"), "--out", str(out / "run")]
        return [f"next    {shlex.join(command)}"]
    result, model = slimming["result"], slimming["model"]
    original, slimmed, cost = result["original"], result["slimmed"], result["cost"]
    changes = ", ".join(
        f"{model[key] / 1e6:.3f} -> {cost[key] / 1e6:.3f} M {WORDS[key]} ({cost[key] / model[key] - 1:+.1%})"
        for key in ("params", "macs")
    )
    return [
        f"cost    {changes}",
        f"result  top-1 {100 * original['top1']:.2f} % before, {100 * slimmed['top1']:.2f} % slimmed, on "
        f"{slimmed['images']} {result['split']} images; {out / 'run' / 'model.safetensors'}",
    ]


def _block_table(slimming: SlimResult) -> list[str]:
    model, base = slimming["model"], _base_score(slimming)
    timings = {tuple(entry["blocks"]): entry for entry in slimming.get("timings", [])}
    cells = [["layer", "name", "type", "output", "params saved", "MACs saved", "loss change", "top-1 change"]]
    reconstructed = slimming.get("reconstructed", {})
    if timings:
        cells[0].insert(6, "time saved")
    if reconstructed:
        cells[0].insert(-2, "explained")
    for block in slimming["blocks"]:
        row = [
            "" if block["number"] is None else str(block["number"]),
            block["name"],
            block["type"],
            "x".join(map(str, block["shape"])),
            f"{block['params'] / model['params']:.2%}",
            f"{block['macs'] / model['macs']:.2%}",
        ]
        if timings:
            row.append(f"{1 - timings[(block['place'],)]['ratio']:.2%}")
        if reconstructed:
            row.append(f"{reconstructed[block['name']]:.0%}" if block["name"] in reconstructed else "")
        cells.append([*row, *_damage(_score(slimming, [block["place"]]), base, "not tried")])
    return text_table(cells, right=(0, *range(3, len(cells[0]))))


def _set_table(slimming: SlimResult) -> list[str]:
    model, chosen = slimming["model"], slimming["chosen"]
    blocks, base = {block["place"]: block for block in slimming["blocks"]}, _base_score(slimming)
    timed = {tuple(entry["blocks"]): entry for entry in slimming.get("timed", [])}
    by_time = chosen["how"] in ("timed", "all")
    title = "sets of blocks that were timed" if by_time else "sets of blocks that reach the budget"
    reconstructed = bool(slimming.get("measured_reconstructed"))
    cells = [
        [
            *(title, "params left", "MACs left", *["time left"] * by_time, "loss change", "top-1 change"),
            *["reconstructed: loss", "top-1"] * reconstructed,
        ]
    ]
    rivals = chosen["rivals"]
    shown = [places for number, places in enumerate(rivals) if number < SHOWN or places == chosen["blocks"]]
    for places in shown:
        left = [f"{1 - sum(blocks[place][key] for place in places) / model[key]:.2%}" for key in ("params", "macs")]
        time = [f"{timed[tuple(places)]['ratio']:.2%}"] if by_time else []
        restored = _damage(_score(slimming, places, reconstructed=True), base)
        cells.append(
            [", ".join(places), *left, *time, *_damage(_score(slimming, places), base), *restored * reconstructed]
        )
    lines = text_table(cells, right=range(1, len(cells[0])))
    return lines + [f"and {len(rivals) - len(shown)} more, in slim.json"] * (len(rivals) > len(shown))


def _reason(slimming: SlimResult) -> str:
    asked, chosen = slimming["budget"], slimming["chosen"]
    budget = f"{asked['share']:g} of the {WORDS[asked['measure']]}"
    number = len(chosen["rivals"])
    if chosen["how"] == "exact":
        which = "the only set" if number == 1 else f"the least damage of all {number} sets"
        why = (
            f"{which} that reach{'es' if number == 1 else ''} {budget} and need{'s' if number == 1 else ''} every block"
        )
    elif chosen["how"] == "timed":
        why = (
            f"the least damage of the sets whose blocks promise {budget}, and timed it reaches that"
            if number == 1
            else f"of {number} sets that were timed, by damage, the first that reaches {budget}; {_others(slimming)}, "
            "and one that was not timed may be better"
        )
    elif chosen["how"] == "all":
        why = f"all blocks that save time reach {budget}; no smaller set was found"
    elif number == 1:
        why = f"the set that the greedy search ends with to reach {budget}"
    else:
        why = (
            f"the least damage of {number} sets that reach {budget}: the greedy one and exchanges of its blocks; "
            "there are too many for all to be measured, and a better one may exist"
        )
    if (measured := sum(_score(slimming, places, reconstructed=True) is not None for places in chosen["rivals"])) > 1:
        first = chosen["rivals"][0]
        if chosen["blocks"] == first:
            why += f"; of {measured} sets it is the best after reconstruction too"
        else:
            before = f"before it {', '.join(first)} was first: {why}"
            why = f"the least loss after reconstruction of {measured} sets; {before}"
    if chosen["how"] in ("exact", "greedy") and chosen["greedy"] != chosen["blocks"]:
        why += f"; greedy: {', '.join(chosen['greedy'])}"
    return why


def _others(slimming: SlimResult) -> str:
    """Which of the other timed sets reach the budget too."""
    share, rivals = slimming["budget"]["share"], slimming["chosen"]["rivals"]
    ratios = {tuple(entry["blocks"]): entry["ratio"] for entry in slimming["timed"]}
    fast = sum(ratios[tuple(places)] <= share for places in rivals) - 1
    slow = len(rivals) - 1 - fast
    return " and ".join(
        [
            *[f"{fast} more reach{'es' if fast == 1 else ''} it"] * (fast > 0),
            *[f"{slow} {'is' if slow == 1 else 'are'} too slow"] * (slow > 0),
        ]
    )


def _score(slimming: SlimResult, places: Sequence[str], *, reconstructed: bool = False) -> SetScore | None:
    """The score of this set; None if it was not measured."""
    scores = slimming.get("measured_reconstructed", []) if reconstructed else slimming["measured"]
    return next((score for score in scores if score["blocks"] == list(places)), None)


def _base_score(slimming: SlimResult) -> SetScore:
    """The score of the model as it is, which is measured first."""
    return next(score for score in slimming["measured"] if not score["blocks"])


def _damage(score: SetScore | None, base: SetScore, missing: str = "") -> tuple[str, str]:
    if score is None:
        return missing, ""
    return f"{score['loss'] - base['loss']:+.4f}", f"{100 * (score['top1'] - base['top1']):+.2f}"
