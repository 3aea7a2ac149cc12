"""Write the tables of measured results into the pages, from the files under results/.

python benchmarks/tables.py           # rewrite README.md and pages under docs/, and their figures
python benchmarks/tables.py --check   # exit 1 if a page and the results disagree; also make results

Each tables_*.py beside this one makes those of a topic.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import tables_compare as compare
import tables_deploy as deploy
import tables_explain as explain
import tables_headline as headline
import tables_imagenet as imagenet
import tables_package as package
import tables_performance as performance
import tables_slim as slim

from ulsam.base.errors import UlsamError

ROOT = Path(__file__).parents[1]
#: By page: what stands between the lines <!-- NAME --> and <!-- /NAME -->, made from the folder of the results.
TABLES: dict[str, dict[str, Callable[[Path], str]]] = {
    "README.md": {"headline": headline.readme_table},
    "docs/results.md": {
        "headline": headline.headline_table,
        "cub100": lambda results: compare.comparison_table(results, "compare_cub100"),
        "rates_cub100": lambda results: compare.comparison_table(results, "rates_cub100"),
        "more_cub100": lambda results: compare.comparison_table(results, "more_cub100"),
        "grocery81": lambda results: compare.comparison_table(results, "compare_grocery81"),
        "rates_grocery81": lambda results: compare.comparison_table(
            results,
            "rates_grocery81",
            against=(
                "remove 14,17",
                "remove 13,14,16,17",
                "remove + reconstruct 14,17",
                "remove + reconstruct 13,14,16,17",
            ),
        ),
        "imagenet": imagenet.imagenet_table,
        "v1_cub100": lambda results: compare.comparison_table(results, "compare_v1_cub100"),
        "slimmed_cub100": lambda results: slim.slimmed_table(results, "cub100_macs75"),
        "slimmed_cub100_16": lambda results: slim.slimmed_table(results, "cub100_macs75_16"),
        "slimmed_grocery81": lambda results: slim.slimmed_table(results, "grocery81_macs75"),
        "slimmed_grocery81_latency": lambda results: slim.slimmed_table(results, "grocery81_latency85"),
        "distillation": slim.distillation_table,
        "damage_cub100": lambda results: slim.damage_table(results, "cub100"),
        "forms_cub100": lambda results: compare.comparison_table(results, "forms_cub100"),
        "layer_cub100": lambda results: compare.comparison_table(
            results, "layer_cub100", against=("remove 14,17", "remove 4,7")
        ),
        "layer_cub100_lr02": lambda results: compare.comparison_table(
            results, "layer_cub100_lr02", against=("remove 14,17",)
        ),
    },
    "src/ulsam/model/weights/mobilenetv2_100.grocery81_slim75.md": {
        "card": lambda results: slim.card_table(results, "grocery81_macs75")
    },
    "src/ulsam/model/weights/mobilenetv2_100.grocery81_ulsam75.md": {
        "card": lambda results: package.card_table(
            results, "grocery81_ulsam75", "compare_grocery81", "remove + reconstruct 13,14,16,17"
        )
    },
    "src/ulsam/model/weights/mobilenetv2_100.imagenet_ulsam75.md": {
        "card": lambda results: package.backbone_card(results, "imagenet_ulsam75")
    },
    "docs/deploy.md": {
        "exported": deploy.exported_table,
        "deployed_cub100": lambda results: deploy.deployed_table(results, "cub100"),
        "deployed_grocery81": lambda results: deploy.deployed_table(results, "grocery81"),
        "quantized": deploy.quantized_table,
        "served_grocery81": lambda results: deploy.served_table(results, "grocery81"),
    },
    "docs/explain.md": {
        "cams": explain.cam_table,
        "subspaces": explain.subspace_table,
        "marks": explain.mark_table,
        "classes": explain.class_table,
        "waiting": explain.waiting_table,
    },
    "docs/performance.md": {
        "layer": performance.layer_table,
        "network": performance.network_table,
        "network_compile": lambda results: performance.network_table(results, "network_compile"),
        "inside": performance.inside_table,
        "training": performance.training_table,
        "allocation": performance.allocation_table,
        "precision": performance.precision_table,
        "reconstruction": performance.reconstruction_table,
        "pipeline": performance.pipeline_table,
        "steps": performance.steps_table,
    },
}
#: Figures under docs/images, and the comparisons that they show.
FIGURES = {"cub100": "compare_cub100", "grocery81": "compare_grocery81", "v1_cub100": "compare_v1_cub100"}


def main(root: Path = ROOT, *, check: bool) -> int:
    """Write the tables and figures, or with ``check`` compare the tables with the pages.

    Returns:
        0; 1 if a page and the results disagree.

    Raises:
        UlsamError: a page lacks a mark, or a result is missing or damaged.
    """
    wrong = 0
    for name, tables in TABLES.items():
        page = root / name
        old = new = page.read_text(encoding="utf-8")
        for mark, write in tables.items():
            before, found, rest = new.partition(f"<!-- {mark} -->\n")
            if not found:
                raise UlsamError(f"{name} lacks the line <!-- {mark} -->")
            after = rest.partition(f"<!-- /{mark} -->")[2]
            new = f"{before}<!-- {mark} -->\n{write(root / 'results')}\n<!-- /{mark} -->{after}"
        if not check:
            page.write_text(new, encoding="utf-8")
        elif new != old:
            print(f"{name} and results/ disagree: run python benchmarks/tables.py")
            wrong = 1
    if not check:
        for name, compared in FIGURES.items():
            compare.write_figures(root / "results", compared, root / "docs" / "images" / name)
    return wrong


if __name__ == "__main__":
    try:
        sys.exit(main(check="--check" in sys.argv))
    except UlsamError as error:
        sys.exit(str(error))
