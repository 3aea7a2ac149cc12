"""Channel pruning as a peer: Torch-Pruning takes a model to a share of its cost, and the same fine-tuning restores it.

The model, its weight file and every setting come from a comparison, where the pruned model joins as one more arm. The
procedure is that of the library's authors for MobileNet-V2 on ImageNet, less its 150 epochs of sparse training
(https://github.com/VainF/Torch-Pruning, reproduce/scripts/prune/imagenet/mobilenetv2_group_sl.sh): importance is the L2
norm of a group of coupled weights, channels of all layers compete, they go in small steps until the cost is met, no
layer loses more than 70 %, and the classifier's outputs stay. The classifier is new, so it has no say in what is
important. --uniform takes the same share of channels from every layer instead.

How it joins: benchmarks/external_arm.py. The exit status is 1 if a run with a seed failed.

    pip install 'ulsam[peers]'
    python benchmarks/pruning.py compared --macs 0.879
    ulsam compare --report-only --out compared
"""

import argparse
import copy
import importlib.metadata
import warnings
from collections.abc import Sequence
from typing import Any, Literal, cast

import external_arm
import torch
from torch import nn

from ulsam.base.errors import UlsamError
from ulsam.surgery.cost import cost

Measure = Literal["macs", "params"]
STEPS = 1000  # to take all channels, if nothing stopped it: small ones, to end near the target
MOST = 0.7  # of the channels of a layer
TOLERANCE = 0.01


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

    place = external_arm.host(args.out)
    pruned = prune(place.model, place.spec.input_size, share, measure, uniform=args.uniform)
    entry = {
        "what": "channels pruned by Torch-Pruning before fine-tuning; latency beside the unpruned model's",
        "wanted": {measure: share},
        "torch_pruning": importlib.metadata.version("torch-pruning"),
    }
    if not external_arm.join(place, name, pruned, **entry):
        raise SystemExit(1)


def prune(
    model: nn.Module,
    input_size: Sequence[int],
    share: float,
    measure: Measure = "macs",
    *,
    uniform: bool = False,
    steps: int = STEPS,
    tolerance: float = TOLERANCE,
) -> nn.Module:
    """A copy of ``model`` with fewer channels, that costs about ``share`` of what it did; its classifier is all zeros.

    Args:
        model: a timm classifier; stays as it is.
        input_size: C, H, W.
        share: of the MACs or of the parameters that stay, above 0 and below 1.
        measure: which of the two.
        uniform: the same share of every layer's channels, instead of the least important ones of all.
        steps: in which all channels would go, if nothing stopped it.
        tolerance: how far from ``share`` it may end, as a share of it.

    Raises:
        UlsamError: the share is none, or pruning does not come near it.
    """
    import torch_pruning

    if not 0 < share < 1:
        raise UlsamError(f"the share that stays lies between 0 and 1, not {share}")
    pruned = copy.deepcopy(model).eval()
    head = cast(nn.Linear, cast(Any, pruned).get_classifier())
    with torch.no_grad():
        head.weight.zero_()
    wanted = share * getattr(cost(model, input_size), measure)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a graph holds besides layers
        pruner = torch_pruning.pruner.BasePruner(
            pruned,
            torch.zeros(1, *input_size),
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            global_pruning=not uniform,
            pruning_ratio=1.0,
            max_pruning_ratio=MOST,
            iterative_steps=steps,
            ignored_layers=[head],
        )
        now = before = wanted / share
        above = pruned
        for _ in range(steps):
            if now <= wanted:
                break
            above, before = copy.deepcopy(pruned), now
            pruner.step()
            now = getattr(cost(pruned, input_size), measure)
        if before - wanted < wanted - now:  # a step of the same share of all layers takes up to 2 % of the MACs
            pruned, now = above, before
    if abs(now / wanted - 1) > tolerance:
        raise UlsamError(
            f"pruning ends at {now / wanted * share:.4f} of the {measure}, not within {100 * tolerance:g} % of {share}"
        )
    return pruned.train()


if __name__ == "__main__":
    external_arm.run_script(main)
