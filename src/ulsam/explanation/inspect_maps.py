"""What a model's ULSAM layers do on images: how peaked their maps are, and how much they change the features."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ulsam.base.errors import NotFinite, UlsamError
from ulsam.base.eval_mode import eval_mode
from ulsam.base.text_table import text_table
from ulsam.explanation.measures import INERT, correlations, deviations, entropy_share, peak, ratio
from ulsam.layer.ulsam import ULSAM, Form
from ulsam.surgery.places import paper_places

#: What the columns of :func:`table` mean.
LEGEND = (
    "entropy in nats; maximum of a map, and times H * W (1: uniform); varies: share of the maps' variance that differs "
    "between images; change: |y - x| / |x|, the layer's; effect: the same, of its maps against uniform ones; "
    "agreement: mean correlation of two maps."
)


@dataclass(frozen=True)
class MapStats:
    """One subspace's maps A [H, W] (each sums to 1) and features x [C / g, H, W], over all images.

    ``change`` and ``effect`` are ratios of root mean squares over all images; 0 where all features are 0.
    """

    entropy: float  # nats, mean over the images
    entropy_share: float  # of log(H * W), that of a uniform map
    maximum: float  # of the map, mean over the images
    peak: float  # H * W * maximum; 1 is a uniform map
    variation: float  # share of the maps' variance over positions that their mean lacks; 0: every image's map is equal
    change: float  # ||y - x|| / ||x||, what the layer does
    effect: float  # ||y - u|| / ||x||, what its map does: u = x + x / (H * W) has a uniform map in its place

    @property
    def inert(self) -> bool:
        """The map's effect is below `INERT`."""
        return self.effect < INERT


@dataclass(frozen=True)
class LayerStats:
    """One ULSAM layer; ``change`` and ``effect`` are those of :class:`MapStats` over all its subspaces."""

    name: str
    place: str | None  # in the paper's layer numbers: "17" replaced, "17:1" inserted behind it
    form: Form
    shape: tuple[int, int, int]  # C, H, W
    images: int
    agreement: float | None  # mean correlation over positions of two of its maps; None: no two that are not flat
    change: float
    effect: float
    subspaces: tuple[MapStats, ...]

    @property
    def inert(self) -> bool:
        """The maps' effect is below `INERT`."""
        return self.effect < INERT


@torch.no_grad()
def inspect(model: nn.Module, batches: Iterable[Tensor]) -> list[LayerStats]:
    """Statistics of every ULSAM layer of a model over images, in the order of ``model.named_modules()``.

    Args:
        model: any `nn.Module` with ULSAM layers; in eval mode for the time being, and left as it was.
        batches: its inputs, [B, C, H, W] each, all of one size.

    Raises:
        UlsamError: the model holds no ULSAM layer, there is no image, a layer is not called or gets maps of several
            sizes.
        NotFinite: a layer's features are not finite.

    >>> import ulsam
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    >>> layers = inspect(ulsam.insert(model, "1", groups=2, input_size=(3, 9, 9)), [torch.randn(4, 3, 9, 9)])
    >>> [(layer.name, layer.shape, layer.images, len(layer.subspaces)) for layer in layers]
    [('1.ulsam', (8, 7, 7), 4, 2)]
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, ULSAM)}
    if not layers:
        raise UlsamError(
            f"this {type(model).__name__} holds no ULSAM layer to inspect: put one in, by replace or insert, and train"
        )
    sums = {name: _Sums(name, layer.groups) for name, layer in layers.items()}
    hooks = [layer.register_forward_pre_hook(sums[name].add) for name, layer in layers.items()]
    device, images = next(model.parameters()).device, 0
    try:
        with eval_mode(model):
            for batch in batches:
                images += len(batch)
                model(batch.to(device))
    finally:
        for hook in hooks:
            hook.remove()
    if not images:
        raise UlsamError("no image to inspect the layers on")
    places = paper_places(model)
    return [sums[name].stats(places.get(name), layer.form) for name, layer in layers.items()]


def warnings(layers: Sequence[LayerStats]) -> list[str]:
    """One line about each layer of which all, or some, attention is inert.

    >>> flat = MapStats(3.9, 1.0, 1 / 49, 1.0, 0.0, 0.02, 0.0)
    >>> warnings([LayerStats("blocks.5.2", "17", "equations", (160, 7, 7), 8, None, 0.02, 0.0, (flat,))])
    ['blocks.5.2 is inert: uniform maps instead of its own would change its features by 0.00 % (under 1 %); \
it does little more than multiply them by 1.0204']
    """
    lines = []
    for layer in layers:
        _, height, width = layer.shape
        inert = [str(number) for number, one in enumerate(layer.subspaces, start=1) if one.inert]
        if layer.inert:
            lines.append(
                f"{layer.name} is inert: uniform maps instead of its own would change its features by "
                f"{_percent(layer.effect)} (under {100 * INERT:.0f} %); "
                f"it does little more than multiply them by {1 + 1 / (height * width):.4f}"
            )
        elif inert:
            lines.append(
                f"{layer.name} has inert maps among its {len(layer.subspaces)} (number {', '.join(inert)}): uniform "
                f"ones instead would change their subspaces' features by under {100 * INERT:.0f} %"
            )
    return lines


def table(layers: Sequence[LayerStats]) -> str:
    """The statistics as text: a line a map, and one for each layer of several maps."""
    heading = ["layer", "name", "map", "", "entropy", "of log(HW)", "maximum", "x HW", "varies", "change", "effect"]
    cells = [[*heading, "agreement"]]
    for layer in layers:
        head = [layer.place or "", layer.name, "x".join(map(str, layer.shape[1:]))]
        for number, one in enumerate(layer.subspaces, start=1):
            entropy = [f"{one.entropy:.3f}", _percent(one.entropy_share)]
            peak = [f"{one.maximum:.4f}", f"{one.peak:.2f}", f"{one.variation:.2f}"]
            cells.append([*head, str(number), *entropy, *peak, _percent(one.change), _percent(one.effect), ""])
            head = ["", "", ""]
        if len(layer.subspaces) > 1:
            agreement = "" if layer.agreement is None else f"{layer.agreement:.2f}"
            cells.append([*head, "all", *[""] * 5, _percent(layer.change), _percent(layer.effect), agreement])
    return "\n".join(text_table(cells, right=range(3, len(cells[0]))))


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


class _Sums:
    """What the images that one layer has seen add up to; most are a value a subspace, [g]."""

    def __init__(self, name: str, groups: int) -> None:
        self.name = name
        self.shape: tuple[int, ...] = ()  # C, H, W
        self.images = self.pairs = 0
        self.correlations = 0.0
        self.entropy, self.peak, self.scatter = np.zeros((3, groups))  # entropies as shares of a uniform map's
        self.before, self.change, self.effect = np.zeros((3, groups))  # squared norms
        self.deviation: NDArray[np.floating] = np.zeros((groups, 1))  # of the maps, [g, H * W]

    def add(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Forward pre-hook of the layer: its input x [B, C, H, W] before anything else comes behind it."""
        x, groups = args[0], len(self.entropy)
        self.shape = self.shape or tuple(x.shape[1:])
        if tuple(x.shape[1:]) != self.shape:
            raise UlsamError(
                f"{self.name} gets maps {list(self.shape)} and {list(x.shape[1:])}: inspect images of one size"
            )
        maps = cast(ULSAM, layer).attention(x).cpu().double().numpy()  # [B, g, H, W]
        energy = x.float().square().unflatten(1, (groups, -1)).sum(2)  # over a subspace's channels
        power = energy.flatten(2).cpu().double().numpy()
        if not (np.isfinite(maps).all() and np.isfinite(power).all()):
            raise NotFinite(f"the features or maps of {self.name} are not finite (NaN or infinity)")
        deviation, alike = deviations(maps), correlations(maps)
        self.images += len(x)
        self.pairs += alike.size
        self.correlations += float(alike.sum())
        self.entropy += entropy_share(maps).sum(0)
        self.peak += peak(maps).sum(0)
        self.scatter += np.square(deviation).sum((0, 2))
        self.deviation = self.deviation + deviation.sum(0)
        self.before += power.sum((0, 2))
        self.change += (np.square(maps).reshape(power.shape) * power).sum((0, 2))  # y - x = A * x
        self.effect += (np.square(deviation) * power).sum((0, 2))

    def stats(self, place: str | None, form: Form) -> LayerStats:
        if not self.images:
            raise UlsamError(f"{self.name} is not called in a forward pass: there is nothing to inspect")
        channels, height, width = self.shape
        n, places = self.images, height * width
        common = np.square(self.deviation).sum(1) / n  # of the mean map, to compare with the scatter
        rows = zip(
            (self.entropy / n).tolist(),
            (self.peak / n).tolist(),
            ratio((self.scatter - common).clip(0), self.scatter).tolist(),
            np.sqrt(ratio(self.change, self.before)).tolist(),
            np.sqrt(ratio(self.effect, self.before)).tolist(),
            strict=True,
        )
        return LayerStats(
            name=self.name,
            place=place,
            form=form,
            shape=(channels, height, width),
            images=n,
            agreement=self.correlations / self.pairs if self.pairs else None,
            change=float(np.sqrt(ratio(self.change.sum(), self.before.sum()))),
            effect=float(np.sqrt(ratio(self.effect.sum(), self.before.sum()))),
            subspaces=tuple(
                MapStats(math.log(places) * share, share, highest / places, highest, *rest)
                for share, highest, *rest in rows
            ),
        )
