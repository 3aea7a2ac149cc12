"""Write the tables of measured results into README.md, from the JSON files under results/.

python benchmarks/tables.py           # rewrite README.md
python benchmarks/tables.py --check   # exit 1 if README.md and the results disagree
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SETS = {"cub100": "CUB-200-2011, 100 of its classes", "grocery81": "Grocery Store, 81 classes"}
ARMS = {
    "base": "MobileNet-V2",
    "removed": "layers 14, 17 simply removed",
    "ulsam": "layers 14, 17 replaced by ULSAM, g = 4",
}


def finetune_table() -> str:
    """One row an arm for each data set that was measured."""
    lines = [
        "| data set (train / test pictures) | net | parameters | MACs | lr, epochs chosen "
        "| test top-1, mean ± sd (seeds) | minus base |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, title in SETS.items():
        path = ROOT / "results" / f"finetune_{name}.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        for arm, net in ARMS.items():
            if arm in result["arms"]:
                lines.append(_row(title if arm == "base" else "", net, result["arms"][arm], result["pictures"]))
    return "\n".join(lines)


def _row(title: str, net: str, arm: dict[str, Any], pictures: dict[str, int]) -> str:
    first = f"{title} ({pictures['train']} / {pictures['val']})" if title else ""
    tops = arm["test_top1"]
    spread = f" ± {100 * arm['test_top1_sd']:.2f}" if arm["test_top1_sd"] is not None else ""
    minus = f"{100 * arm['minus_base_mean']:+.2f}" if title == "" else ""
    if minus and arm["minus_base_sd"] is not None:
        minus += f" ± {100 * arm['minus_base_sd']:.2f}"
    return (
        f"| {first} | {net} | {arm['params'] / 1e6:.2f} M | {arm['macs'] / 1e6:.1f} M | {arm['lr']:g}, {arm['epochs']} "
        f"| {100 * arm['test_top1_mean']:.2f}{spread} ({len(tops)}) | {minus} |"
    )


def main() -> int:
    page = ROOT / "README.md"
    old = page.read_text()
    new = re.sub(
        r"(<!-- finetune -->\n).*?(\n<!-- /finetune -->)",
        lambda found: found[1] + finetune_table() + found[2],
        old,
        flags=re.DOTALL,
    )
    if "--check" in sys.argv:
        if new != old:
            print("README.md and results/ disagree: run python benchmarks/tables.py")
        return int(new != old)
    page.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
