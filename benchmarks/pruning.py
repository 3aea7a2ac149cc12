"""Channel pruning as a peer: Torch-Pruning takes a net to a share of its cost, and the same fine-tuning restores it.

The net, its weight file and every setting come from a comparison, where the pruned net joins as one more arm: `ulsam
compare --report-only` then has it in its tables. The procedure is that of the library's authors for MobileNet-V2 on
ImageNet, less its 150 epochs of sparse training (https://github.com/VainF/Torch-Pruning,
reproduce/scripts/prune/imagenet/mobilenetv2_group_sl.sh): importance is the L2 norm of a group of coupled weights,
channels of all layers compete, they go in small steps until the cost is met, no layer loses more than 70 %, and the
classifier's outputs stay. The classifier is new, so it has no say in what is important. --uniform takes the same share
of channels from every layer instead.

Runs are chosen and lie as `ulsam compare` does it, in OUT/arms/pruned-macs-0.868/choose-LR-EPOCHS and in
.../seed-N-LR-EPOCHS. Done ones are skipped; the exit status is 1 if one with a seed failed.

    pip install 'ulsam[peers]'
    python benchmarks/pruning.py compared --macs 0.868
    ulsam compare --report-only --out compared
"""

import argparse
import copy
import dataclasses
import importlib.metadata
import statistics
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from ulsam.comparison.arms import Arm
from ulsam.comparison.grid import Failed, at_the_edge
from ulsam.comparison.latency import measure as measure_latency
from ulsam.comparison.store import Store, make_folder
from ulsam.costs import Cost, cost
from ulsam.data import loading
from ulsam.errors import UlsamError
from ulsam.models import build
from ulsam.train import parts, report
from ulsam.train.config import TrainConfig
from ulsam.train.loop import resume, train

Measure = Literal["macs", "params"]
STEPS = 1000  # to take all channels, if nothing stopped it: small ones, to end near the target
MOST = 0.7  # of the channels of a layer
TOLERANCE = 0.01
HAS_WEIGHTS = {"weights": None, "pretrained": False, "drop_rate": 0.0, "drop_path": 0.0}  # a prepared net has its own


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="folder of the comparison, whose first arm is pruned")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--macs", type=float, metavar="SHARE", help="prune to this share of the MACs")
    target.add_argument("--params", type=float, metavar="SHARE", help="prune to this share of the parameters")
    parser.add_argument("--uniform", action="store_true", help="the same share of every layer's channels")
    args = parser.parse_args(argv)
    measure: Measure = "macs" if args.macs is not None else "params"
    share = args.macs if args.macs is not None else args.params
    name = f"pruned-{'uniform-' if args.uniform else ''}{measure}-{share:g}"

    store = Store(args.out)
    compared = store.read_grid()
    if compared is None:
        raise UlsamError(f"{args.out} is not the folder of a comparison: there is no grid.json in it")
    config = compared.arms[0].config(compared.shared)
    recipe = parts.recipe_of(config, parts.open_pictures(config)[0].classes)
    if recipe.edits:
        raise UlsamError(f"the first arm of {args.out} is an edited net: compare with the plain one first")
    loading.seed_all(0)
    whole, _ = build(recipe, weights=config.weights, pretrained=config.pretrained)
    pruned = prune(whole, recipe.input_size, share, measure, uniform=args.uniform)
    arm = Arm(name, (), {**compared.arms[0].settings, **HAS_WEIGHTS})
    size = recipe.input_size
    before, after = cost(whole, size), cost(pruned, size)
    make_folder(store.root / "arms" / arm.slug)
    if store.read(f"arms/{arm.slug}/guest.json") is None:
        times = measure_latency({"base": (whole, size), name: (pruned, size)})
        guest = {"name": name, "settings": arm.settings, "latency": times[name].to_json()}
        store.write(f"arms/{arm.slug}/guest.json", {**guest, **_entry(before, after, {measure: share})})
    print(f"{name}: {after.macs / before.macs:.4f} of the MACs, {after.params / before.params:.4f} of the parameters")

    grid = dataclasses.replace(compared, arms=(arm,))
    for run in grid.known(store.look):
        store.forgive(run)
    while due := grid.due(store.look):
        store.check(due[0])
        try:
            _train(pruned, due[0].config, store.folder(due[0]))
        except UlsamError as error:
            store.fail(due[0], str(error))
    tries = grid.tried(arm, store.look)
    for entry in tries:
        found = entry.failed or f"held-out top-1 {100 * (entry.top1 or 0.0):.2f}"
        print(f"{name}: lr {entry.rate:g}, epochs {entry.epochs}: {found}")
    if edge := at_the_edge(tries):
        print(f"note: the best rate is the {edge} of those tried: give more --rates")
    finals = [(run, store.look(run)) for run in grid.known(store.look) if not run.is_try]
    tested = [100 * found["scores"]["top1"] for _, found in finals if isinstance(found, Mapping)]
    if tested:
        print(f"{name}: top-1 {', '.join(f'{value:.2f}' for value in tested)}; mean {statistics.mean(tested):.2f}")
    for run, found in finals:
        if isinstance(found, Failed):
            print(f"{run} failed: {found.reason}")
    if not finals or len(tested) < len(finals):
        raise SystemExit(1)


def prune(
    net: nn.Module, input_size: Sequence[int], share: float, measure: Measure = "macs", *, uniform: bool = False
) -> nn.Module:
    """A copy of ``net`` with fewer channels, that costs ``share`` of what it did, to 1 %; its classifier is all zeros.

    Args:
        net: a timm classifier; stays as it is.
        input_size: C, H, W.
        share: of the MACs or of the parameters that stay, above 0 and below 1.
        measure: which of the two.
        uniform: the same share of every layer's channels, instead of the least important ones of all.

    Raises:
        UlsamError: the share is none, or pruning does not come near it.
    """
    import torch_pruning

    if not 0 < share < 1:
        raise UlsamError(f"the share that stays lies between 0 and 1, not {share}")
    pruned = copy.deepcopy(net).eval()
    head = cast(nn.Linear, cast(Any, pruned).get_classifier())
    with torch.no_grad():
        head.weight.zero_()
    wanted = share * getattr(cost(net, input_size), measure)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a graph holds besides layers
        pruner = torch_pruning.pruner.BasePruner(
            pruned,
            torch.zeros(1, *input_size),
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            global_pruning=not uniform,
            pruning_ratio=1.0,
            max_pruning_ratio=MOST,
            iterative_steps=STEPS,
            ignored_layers=[head],
        )
        now = wanted / share
        for _ in range(STEPS):
            if now <= wanted:
                break
            pruner.step()
            now = getattr(cost(pruned, input_size), measure)
    if abs(now / wanted - 1) > TOLERANCE:
        raise UlsamError(f"pruning ends at {now / wanted * share:.4f} of the {measure}, not within 1 % of {share}")
    return pruned.train()


def _train(pruned: nn.Module, config: TrainConfig, folder: Path) -> None:
    """Train a copy of the net, with a new classifier, in this folder, or go on with it."""
    net = copy.deepcopy(pruned)
    head = cast(nn.Linear, cast(Any, net).get_classifier())
    loading.seed_all(config.seed)
    nn.init.normal_(head.weight, std=0.01)  # as the new classifiers of the other arms start
    nn.init.zeros_(head.bias)
    if (folder / "config.yaml").exists():
        resume(folder, net=net)
    else:
        train(config, folder, net=net)


def _entry(before: Cost, after: Cost, wanted: dict[str, Any]) -> dict[str, Any]:
    """What was pruned, as JSON."""
    return {
        "what": "channels pruned by Torch-Pruning before fine-tuning; latency beside the unpruned net's",
        "wanted": wanted,
        "macs_share": after.macs / before.macs,
        "params_share": after.params / before.params,
        "cost": report.cost_entry(after),
        "versions": {**report.versions(), "torch_pruning": importlib.metadata.version("torch-pruning")},
    }


if __name__ == "__main__":
    try:
        main()
    except UlsamError as error:
        print(f"pruning.py: error: {error}", file=sys.stderr)
        sys.exit(2)
