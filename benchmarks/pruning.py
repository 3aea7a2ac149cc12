"""Channel pruning as a peer: Torch-Pruning takes a model to a share of its cost, and the same fine-tuning restores it.

The model, its weight file and every setting come from a comparison, where the pruned model joins as one more arm. The
procedure is that of the library's authors for MobileNet-V2 on ImageNet, less its 150 epochs of sparse training
(https://github.com/VainF/Torch-Pruning, reproduce/scripts/prune/imagenet/mobilenetv2_group_sl.sh): importance is the L2
norm of a group of coupled weights, channels of all layers compete, they go in small steps until the cost is met, no
layer loses more than 70 %, and the classifier's outputs stay. The classifier is new, so it has no say in what is
important. --uniform takes the same share of channels from every layer instead. With --reconstruct the pruned model is
then trained without labels, to output the features of the whole model in the channels that are left: all layers
jointly, on as many images as reconstruction takes and in as many steps as it takes for two places.

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
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ulsam.base.errors import UlsamError
from ulsam.base.files import make_folder, read_json, write_json
from ulsam.base.logs import progress
from ulsam.surgery.cost import cost
from ulsam.surgery.reconstruct import RATE
from ulsam.surgery.reconstruct import STEPS as STEPS_A_PLACE
from ulsam.training import parts
from ulsam.training.evaluate import ALONE
from ulsam.training.sample import draw_sample

Measure = Literal["macs", "params"]
STEPS = 1000  # to take all channels, if nothing stopped it: small ones, to end near the target
MOST = 0.7  # of the channels of a layer
TOLERANCE = 0.01
RECONSTRUCT_STEPS = 2 * STEPS_A_PLACE


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="folder of the comparison, whose first arm is pruned")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--macs", type=float, metavar="SHARE", help="prune to this share of the MACs")
    target.add_argument("--params", type=float, metavar="SHARE", help="prune to this share of the parameters")
    parser.add_argument("--uniform", action="store_true", help="the same share of every layer's channels")
    parser.add_argument("--reconstruct", action="store_true", help="train it to output the whole model's features")
    args = parser.parse_args(argv)
    measure: Measure = "macs" if args.macs is not None else "params"
    share = args.macs if args.macs is not None else args.params
    ways = [way for way in ("uniform", "reconstruct") if getattr(args, way)]
    name = "-".join(["pruned", *ways, measure, f"{share:g}"])

    place = external_arm.host(args.out)
    pruned = prune(place.model, place.spec.input_size, share, measure, uniform=args.uniform)
    entry: dict[str, Any] = {
        "what": "channels pruned by Torch-Pruning before fine-tuning; latency beside the unpruned model's",
        "wanted": {measure: share},
        "torch_pruning": importlib.metadata.version("torch-pruning"),
    }
    if args.reconstruct:
        entry["error"] = _reconstructed(place, name, pruned)
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


def reconstruct(
    pruned: nn.Module,
    model: nn.Module,
    batches: Sequence[Tensor],
    steps: int = RECONSTRUCT_STEPS,
    rate: float = RATE,
) -> tuple[float, float]:
    """Train ``pruned`` in place to output the features of ``model`` in its channels; the relative errors around it.

    Args:
        pruned: a timm classifier from :func:`prune`; its classifier stays as it is.
        model: the one that was pruned, in eval mode.
        batches: images [B, C, H, W].
        steps: of Adam, with a batch each; BatchNorm statistics follow.
        rate: falls to 0 as a cosine.

    Returns:
        The sum of squared differences over the sum of squares, before and after.

    Raises:
        UlsamError: the channels that are left cannot be told.
    """
    left = features_left(pruned, model)
    with torch.no_grad():
        wanted = [_features(model, images)[:, left] for images in batches]
    power = sum(float(features.square().sum()) for features in wanted)
    scale = sum(features.numel() for features in wanted) / power

    @torch.no_grad()
    def error() -> float:
        pairs = zip(batches, wanted, strict=True)
        return sum(float((_features(pruned, images) - features).square().sum()) for images, features in pairs) / power

    pruned.eval()
    before = error()
    for module in pruned.modules():
        module.training = isinstance(module, _BatchNorm)  # nothing random, such as dropout
    head = set(cast(Any, pruned).get_classifier().parameters())
    optimizer = torch.optim.Adam([parameter for parameter in pruned.parameters() if parameter not in head], rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in progress(range(steps), desc="reconstruct", unit="step"):
        images, features = batches[step % len(batches)], wanted[step % len(batches)]
        loss = scale * F.mse_loss(_features(pruned, images), features)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    pruned.eval()
    after = error()
    pruned.train()
    return before, after


def features_left(pruned: nn.Module, model: nn.Module) -> list[int]:
    """Which channels of the model's last BatchNorm the pruned model has, by what the layer holds of each."""
    ours, whole = (
        torch.stack([value for value in _last_batchnorm(network).state_dict().values() if value.ndim]).T
        for network in (pruned, model)
    )
    same = (ours[:, None] == whole[None]).all(2)
    if not bool((same.sum(1) == 1).all()):
        raise UlsamError("which channels pruning left is not known: the last BatchNorm has equal ones, or was trained")
    return same.int().argmax(1).tolist()


def _last_batchnorm(model: nn.Module) -> _BatchNorm:
    return [layer for layer in model.modules() if isinstance(layer, _BatchNorm)][-1]


def _features(model: nn.Module, images: Tensor) -> Tensor:
    features: Tensor = cast(Any, model).forward_features(images)
    return features


def _reconstructed(place: external_arm.Host, name: str, pruned: nn.Module) -> list[float]:
    """Reconstruct the model on training images, or take what an earlier call made; the error before and after."""
    folder = place.comparison.root / "arms" / name
    make_folder(folder)
    file, about = folder / "reconstructed.safetensors", folder / "reconstructed.json"
    if not about.exists():
        config = place.grid.arms[0].config(place.grid.shared)
        images, _, _ = parts.open_images(config)
        sample = draw_sample(images, place.spec, config.reconstruct_images, ALONE).images
        errors = reconstruct(pruned, place.model.eval(), sample)
        save_file(pruned.state_dict(), file)
        write_json(about, {"error": errors})
    pruned.load_state_dict(load_file(file))
    found: list[float] = read_json(about)["error"]
    return found


if __name__ == "__main__":
    external_arm.run_script(main)
