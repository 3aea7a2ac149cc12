"""What might make subspace attention do more than the paper's equations do: variants of the layer, in plain PyTorch.

A variant joins a comparison as one more arm (benchmarks/external_arm.py): the model of its first arm, with the variant
in the place of some blocks. Several may run at a time, each a process of its own; each is timed behind its last run.

    python benchmarks/variants.py compared gated 14,17
    ulsam compare --report-only --out compared
"""

import argparse
import copy
from collections.abc import Sequence
from typing import Literal, get_args

import external_arm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ulsam

Kind = Literal["still", "sharp", "scaled", "gated", "depthwise", "mixed"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="folder of the comparison")
    parser.add_argument("kind", choices=get_args(Kind))
    parser.add_argument("at", help="layer numbers, as 14,17")
    parser.add_argument("--groups", type=int, default=4)
    args = parser.parse_args(argv)
    place = external_arm.host(args.out)
    edited = ulsam.replace(copy.deepcopy(place.model), args.at, args.groups, input_size=place.spec.input_size)
    torch.manual_seed(0)
    for name, module in list(edited.named_modules()):
        if isinstance(module, ulsam.ULSAM):
            edited.set_submodule(name, Variant(module.channels, args.groups, args.kind))
    name = f"{args.kind} {args.at}" + (f" g={args.groups}" if args.groups != 4 else "")
    entry = {"what": "a variant of benchmarks/variants.py", "kind": args.kind, "at": args.at, "groups": args.groups}
    if not external_arm.join(place, name, edited, **entry):
        raise SystemExit(1)


class Variant(nn.Module):
    """Subspace attention with another gate, or a depthwise convolution in its place; nearly all start as the identity.

    With z the paper's logits (a scale a channel, 3x3 max-pool, a weighted sum a subspace), A their softmax over the
    map, one a subspace:

    - ``"still"``: the paper's y = x * (1 + A), started with z = 0 everywhere, where the paper starts at random.
    - ``"sharp"``: y = x * H * W * A, A the softmax of 4 * z: the gate averages 1, whatever the map's size.
    - ``"scaled"``: y = x * (1 + gain * (H * W * A - 1)), with a learned gain a subspace, 1 at the start.
    - ``"gated"``: y = x * 2 * sigmoid(z).
    - ``"depthwise"``: y = x + a depthwise 3x3 convolution of x; no attention: what cheap spatial mixing alone brings.
    - ``"mixed"``: the depthwise convolution, then the scaled gate.

    Args:
        channels: C of the input [B, C, H, W]; H and W are free.
        groups: number of subspaces; divides ``channels``.
        kind: see above.
    """

    def __init__(self, channels: int, groups: int, kind: Kind) -> None:
        super().__init__()
        self.channels, self.groups, self.kind = channels, groups, kind
        if kind in ("depthwise", "mixed"):
            self.mixing = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
            nn.init.zeros_(self.mixing.weight)
            nn.init.zeros_(self.mixing.bias)  # type: ignore[arg-type]
        if kind != "depthwise":
            self.depthwise = nn.Conv2d(channels, channels, 1, groups=channels, bias=False)
            nn.init.ones_(self.depthwise.weight)
            self.pointwise = nn.Conv2d(channels, groups, 1, groups=groups, bias=False)
            if kind != "sharp":
                nn.init.zeros_(self.pointwise.weight)
        if kind in ("scaled", "mixed"):
            self.gain = nn.Parameter(torch.ones(groups))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        if self.kind in ("depthwise", "mixed"):
            x = x + self.mixing(x)
        if self.kind == "depthwise":
            return x
        z = self.pointwise(F.max_pool2d(self.depthwise(x), 3, stride=1, padding=1))
        return x * self.gate(z).repeat_interleave(self.channels // self.groups, dim=1)

    def gate(self, z: Tensor) -> Tensor:
        """What a subspace is multiplied by: [B, groups, H, W] from logits of that shape."""
        if self.kind == "gated":
            return 2 * z.sigmoid()
        share = (4 * z if self.kind == "sharp" else z).flatten(2).softmax(2).view(z.shape)
        if self.kind == "still":
            return 1 + share
        share = share * z.shape[2] * z.shape[3]
        return share if self.kind == "sharp" else 1 + self.gain.view(1, -1, 1, 1) * (share - 1)


if __name__ == "__main__":
    external_arm.run_script(main)
