"""Put results and runs that were written before 0.1.0 into today's words: keys, edits, flags and folders of arms.

    python scripts/migrate_results.py results/compare_cub100 ...

JSON, CSV, YAML and Markdown files, given or below a given folder, are rewritten in place; what is in today's words
stays as it is. Names of images and classes are not touched.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

KEYS = {
    "fit_pictures": "reconstruct_images",
    "fit_images": "reconstruct_images",
    "fitted": "reconstructed",
    "wish": "budget",
    "recipe": "spec",
    "close": "tried_within",
    "most_sets": "max_sets",
    "whole net": "whole model",
    "this net": "this model",
    "in the net": "in the model",
}
#: Keys that mean something else outside the budget of a slimming.
BUDGET_KEYS = {"batch": "latency_batch", "threads": "latency_threads", "seconds": "latency_seconds"}
#: Values that are names from elsewhere.
NAMES = {"classes", "names", "unreadable", "data", "weights", "teacher"}
FOLDERS = [
    ("removed", "remove"),
    ("ulsam-thin", "ulsam-inverted-residual"),
    ("unfitted-thin", "not-reconstructed-inverted-residual"),
    ("unfitted-inverted-residual", "not-reconstructed-inverted-residual"),
    ("thin", "inverted-residual"),
]


def words(text: str) -> str:
    """Today's words for what a text says."""
    text = re.sub(r"(^|[\"'`:; ])drop (?=[\d{*a-z])", r"\1remove ", text)
    text = re.sub(r"--drop\b", "--remove", text)
    text = text.replace("layer=thin", "layer=inverted_residual").replace("--layer thin", "--layer inverted_residual")
    text = re.sub(r"\bunfitted (?=thin \d|inverted residual \d)", "not reconstructed ", text)
    text = re.sub(r"\bULSAM thin (?=\d)", "ULSAM + inverted residual ", text)
    text = re.sub(r"\bthin (?=\d)", "inverted residual ", text)
    text = re.sub(r"\bthin block", "narrow inverted residual", text)
    text = re.sub(r"^removed(?= |$)|(?<=minus )removed\b|(?<=--arm ')removed\b", "remove", text)
    text = (
        text.replace("--most-sets", "--max-sets")
        .replace("--fit-pictures", "--reconstruct-images")
        .replace("guest.json", "external_arm.json")
    )
    text = re.sub(r"\bfit_(pictures|images)\b", "reconstruct_images", text)
    for old, new in (("picture", "image"), ("Picture", "Image"), ("PICTURE", "IMAGE")):
        text = text.replace(old, new)
    text = re.sub(r"(?<![A-Za-z0-9])([Nn]et|NET)(s?)(?![A-Za-z0-9])", lambda found: _cased(found[1]) + found[2], text)
    text = re.sub(r"\b([Aa]) (?=[Ii]mage)", r"\1n ", text)
    for old, new in FOLDERS:
        text = re.sub(rf"(?<=arms/){old}(?=[-/]|$)", new, text)
    return text


def _cased(word: str) -> str:
    return {"net": "model", "Net": "Model", "NET": "MODEL"}[word]


def renamed(value: Any, key: str = "") -> Any:
    """A JSON value in today's words."""
    if key == "per_class" and isinstance(value, dict):
        return {name: renamed(item) for name, item in value.items()}
    if isinstance(value, dict):
        keys = {**KEYS, **BUDGET_KEYS} if key in ("budget", "wish") else KEYS
        return {
            keys.get(name, name if key in NAMES else words(name)): renamed(item, name) for name, item in value.items()
        }
    if key in NAMES:
        return value
    if isinstance(value, list):
        return [renamed(item, key) for item in value]
    if key == "folder" and isinstance(value, str):
        return folder(value)
    if key == "layer" and value == "thin":
        return "inverted_residual"
    if isinstance(value, str) and value.startswith(("{", "[")):  # a spec as text
        return json.dumps(renamed(json.loads(value)), ensure_ascii=False)
    return words(value) if isinstance(value, str) else value


def folder(name: str) -> str:
    """An arm's folder."""
    for old, new in FOLDERS:
        name = re.sub(rf"^{old}(?=[-\d]|$)", new, name)
    return name


def migrate(path: Path) -> None:
    """Rewrite a file, or all below a folder, and rename the folders of arms."""
    if path.is_dir():
        for child in sorted(path.iterdir()):
            migrate(child)
        if path.parent.name == "arms" and folder(path.name) != path.name:
            path.rename(path.with_name(folder(path.name)))
        return
    if path.name == "guest.json":
        path = path.rename(path.with_name("external_arm.json"))
    if path.suffix == ".json":
        before = path.read_text(encoding="utf-8")
        after = renamed(json.loads(before))
        indent = re.match(r"[{\[]\n( *)", before)
        text = json.dumps(after, indent=len(indent[1]) if indent else None, ensure_ascii="\\u" in before)
        if after != json.loads(before):
            path.write_text(text + "\n" * before.endswith("\n"), encoding="utf-8")
    elif path.suffix in (".csv", ".md", ".yaml"):
        path.write_text(words(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for name in sys.argv[1:]:
        migrate(Path(name))
