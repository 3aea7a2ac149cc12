"""The table of docs/zoo.md, from what benchmarks/zoo.py measured.

python benchmarks/zoo_table.py > docs/zoo.md
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
STEPS = ("candidates", "replace", "insert", "forward", "backward", "fold", "undo", "export")
INTRODUCTION = """\
# Models of other libraries

You can edit most models of timm, torchvision and Ultralytics. This table shows what works on one small model of each \
family, with random weights, on a CPU.
Versions: {versions}. A ✓ means that the checks of that step in `benchmarks/zoo.py` passed. \
`ulsam candidates` lists the places in one model:

```sh
ulsam candidates mobilenetv2_100
```

| step | what is checked |
|---|---|
| candidates | The search leaves the model as it was. The number counts the blocks that `replace` accepts. |
| replace, insert | The outputs change, and change again with the layer's weights. All other keys keep their names. |
| forward | The outputs equal, bit by bit, those of the base model with hooks that compute the layer. |
| backward | Every parameter of the layer gets a finite gradient in training mode. |
| fold | The outputs agree to 1e-4, and the layers are there. |
| undo | Outputs, classes and weights equal those of the base model, bit by bit. |
| export | The program of `torch.export` agrees to 1e-4 and holds no operator of ulsam. |

r: ulsam refuses the step and says why. m: the cause is the unedited model. ✗: the check failed. \
–: no edit to check.

"""


def main() -> None:
    result = json.loads((ROOT / "results" / "zoo.json").read_text())
    reasons: list[str] = []
    rows = [row(name, model, reasons) for name, model in result["models"].items()]
    names = ("torch", "timm", "torchvision", "ultralytics")
    print(INTRODUCTION.format(versions=", ".join(f"{name} {result['versions'][name]}" for name in names)), end="")
    head = ["family", "model", "parameters", *STEPS]
    print("\n".join(line(cells) for cells in [head, ["---"] * len(head), *rows]))
    print("\n" + "\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, 1)))


def row(name: str, model: dict[str, Any], reasons: list[str]) -> list[str]:
    marks = [mark(model["steps"][step], reasons) for step in STEPS]
    if marks[0] == "✓":
        marks[0] = str(model["candidates"])
    return [name, model.get("model", ""), f"{model.get('parameters', 0) / 1e6:.1f} M", *marks]


def mark(said: str, reasons: list[str]) -> str:
    """✓, –, or a letter with the number of its reason."""
    if said == "works":
        return "✓"
    if said in ("refused: no edit was accepted", "not reached"):
        return "–"
    kind, _, reason = said.partition(": ")
    # by its kind, not its place and shapes
    reason = re.sub(r"^\S+ (?=outputs|changes|lies|does)| = \[[\d, ]+\]|; (valid|this model).*", "", reason)
    reason = re.sub(
        r"(data-dependent expression) .*", r"\1", re.sub(r"\[1, [\d, ]+\](, channels)", r"[B, H, W, C]\1", reason)
    )
    reason = reason.replace("|", "\\|").replace("<", "&lt;")
    if reason not in reasons:
        reasons.append(reason)
    letter = {"refused": "r", "the model itself": "m", "FAILED": "✗"}[kind]
    return f"{letter} {reasons.index(reason) + 1}"


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
