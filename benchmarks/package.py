"""Put a trained model of a comparison into the package: that of an arm's first seed, whichever seed is the best.

Convolutions and the classifier are stored in half precision, and the model is measured once more. It is known by its
name once there is a card, NAME.md, beside it; benchmarks/tables.py writes the table on the card.

results/packed_NAME.json says what the model is.

    python benchmarks/package.py runs/grocery81 'ULSAM + reconstruct 13,14,16,17' grocery81_ulsam75
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import external_arm
from torch import nn

from ulsam.base.errors import UlsamError
from ulsam.base.files import read_json, write_json
from ulsam.base.provenance import command_line, versions
from ulsam.data.loading import Loader, eval_loader
from ulsam.explanation.inspect_maps import inspect
from ulsam.layer.ulsam import ULSAM
from ulsam.model.build import load, save
from ulsam.model.spec import ModelSpec
from ulsam.study.comparison_folder import ComparisonFolder
from ulsam.study.grid import Run
from ulsam.study.paths import without_paths
from ulsam.training import parts
from ulsam.training.evaluate import ALONE, evaluate_batches, spec_transform

ROOT = Path(__file__).parents[1]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compared", help="folder of the comparison")
    parser.add_argument("arm", help="its name")
    parser.add_argument("name", help="of the model, DATA_WHAT; the architecture comes before it")
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout to write to (default: this one)")
    args = parser.parse_args(argv)
    comparison = ComparisonFolder(args.compared)
    run = first_run(comparison, args.arm)
    model, spec = load(comparison.folder(run) / "model.safetensors")
    file = args.root / "src" / "ulsam" / "model" / "weights" / f"{spec.base}.{args.name}.safetensors"
    pack(model, spec, file)
    result = {
        "what": "a model of a comparison, stored in half precision and measured once more",
        "command": command_line(),
        "arm": args.arm,
        "seed": run.config.seed,
        "top1": measured(load(file)[0], run),
        "top1_float32": read_json(comparison.folder(run) / "summary.json")["scores"]["top1"],
        "attention_effect": attention_effect(load(file)[0], run),
        "bytes": file.stat().st_size,
        "versions": versions(),
    }
    write_json(args.root / "results" / f"packed_{args.name}.json", without_paths(result))


def first_run(comparison: ComparisonFolder, name: str) -> Run:
    """The final run of an arm with the first seed.

    Raises:
        UlsamError: there is no such arm, or its run is not finished.
    """
    grid = comparison.grid()
    arms = {arm.name: arm for arm in grid.arms}
    if name not in arms:
        raise UlsamError(f"{comparison.root} has no arm {name!r}; it has {', '.join(arms)}")
    run = next(iter(grid.finals(arms[name], comparison.outcome)), None)
    if run is None or not (comparison.folder(run) / "model.safetensors").exists():
        raise UlsamError(f"the first run of {name!r} is not finished: continue with ulsam compare")
    return run


def pack(model: nn.Module, spec: ModelSpec, target: Path) -> None:
    """Write the model to ``target``, the weights of convolutions and linear layers in half precision."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.half()
    save(model, spec, target)


def measured(model: nn.Module, run: Run) -> float:
    """Top-1 of the model, as a share, on the images on which ``run`` was measured."""
    batches, classes = _batches(run)
    return evaluate_batches(model, batches, classes, world=ALONE).top1


def attention_effect(model: nn.Module, run: Run) -> dict[str, float]:
    """By what share uniform maps in the place of each ULSAM layer's would change its features on these images."""
    if not any(isinstance(module, ULSAM) for module in model.modules()):
        return {}
    found = inspect(model, (batch.images for batch in _batches(run)[0]))
    return {layer.name: layer.effect for layer in found}


def _batches(run: Run) -> tuple[Loader, int]:
    """The images on which ``run`` was measured, and the number of their classes."""
    _, images, _ = parts.open_images(run.config)
    spec = parts.spec_of_run(run.config, images.classes)
    transform = spec_transform(spec)
    return eval_loader(images, transform, batch_size=32, workers=0, device=ALONE.device), len(images.classes)


if __name__ == "__main__":
    external_arm.run_script(main)
