"""What one model sees in one image: its answer, its CAM and its attention maps, in words and as a figure.

The figure is matplotlib's, to change and to print; panels of whole folders are drawn by Pillow.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ulsam.base.extras import check_plots
from ulsam.data.images import Pixels
from ulsam.explanation.captions import percent, verdict
from ulsam.explanation.drawing import COLOURS, STRENGTH
from ulsam.explanation.measures import entropy_share, peak
from ulsam.layer.ulsam import Form

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = NDArray[np.float32]

NO_LAYER = "This model has no ULSAM layer: there are no attention maps to show."
MOST_COLUMNS = 8


@dataclass(frozen=True)
class LayerMaps:
    """The attention maps of one ULSAM layer on one image."""

    name: str
    place: str | None  # in the paper's layer numbers: "17" replaced, "17:1" inserted behind it
    form: Form
    maps: Floats  # [g, H, W], each sums to 1

    @property
    def entropy_share(self) -> list[float]:
        """Of each map, as a share of a uniform map's."""
        return [float(share) for share in entropy_share(self.maps)]

    @property
    def peak(self) -> list[float]:
        """The largest value of each map, as a multiple of a uniform map's."""
        return [float(largest) for largest in peak(self.maps)]


@dataclass(frozen=True)
class Explanation:
    """One image as one model sees it."""

    pixels: Pixels  # what the model was given, before normalisation: [H, W, 3]
    classes: tuple[str, ...]
    probabilities: Floats  # [classes]
    target: int  # the class that the CAM is of
    layers: tuple[LayerMaps, ...]  # in the order of the model's modules; empty for a model without ULSAM
    cam: Floats  # Grad-CAM++, [h, w], 0..1
    cam_layer: str  # the module whose features it is of

    def top(self, number: int = 5) -> list[tuple[str, float]]:
        """The most probable classes and their probabilities, best first."""
        order = np.argsort(-self.probabilities, kind="stable")[:number]
        return [(self.classes[index], float(self.probabilities[index])) for index in order]

    def figure(self) -> "Figure":
        """The image, its most probable classes, the CAM and all attention maps, as a new matplotlib figure."""
        check_plots("Explanation.figure")
        return _figure(self)


def layer_heading(layer: LayerMaps) -> str:
    """Which layer, and the size of its maps."""
    groups, height, width = layer.maps.shape
    place = f"layer {layer.place}, " if layer.place else ""
    return f"{place}{layer.name}: {groups} map{'s' if groups > 1 else ''} of {height} × {width}"


def map_captions(layer: LayerMaps) -> list[tuple[str, str]]:
    """The number of each map, its entropy and its peak."""
    pairs = zip(layer.entropy_share, layer.peak, strict=True)
    return [
        (f"{number}: entropy {_entropy(share)}", f"peak {_times(peak)}")
        for number, (share, peak) in enumerate(pairs, start=1)
    ]


def layer_scale(layer: LayerMaps) -> float:
    """The value at the top of the colour scale of all maps of a layer, in multiples of a uniform map's: 2 or more."""
    return max(2.0, *layer.peak)


def scale_text(top: float) -> str:
    """The top of a colour scale, as :func:`layer_scale` gives it."""
    return _times(top)


def cam_caption(whose: str, found: Explanation) -> tuple[str, str]:
    """Whose CAM it is, and of what."""
    share = float(found.probabilities[found.target])
    return f"{whose}, {percent(share)}", f"for {found.classes[found.target]}"


def headline(truth: str | None, found: Explanation, base: Explanation | None, whose: str = "base") -> str:
    """One sentence on what was predicted; ``whose`` is what the base model is called."""
    (named, share), *_ = found.top(1)
    texts = {"wrong": f"✗ wrong: {truth}, taken for {named}", "right": f"✓ right: {named}"}
    text = f"{texts.get(verdict(truth, named), named)} ({percent(share)})"
    if base is None:
        return text
    (other, share), *_ = base.top(1)
    return f"{text}; {whose}: {other} ({percent(share)})"


def _entropy(share: float) -> str:
    if 0.9995 <= share < 1 - 1e-6:  # beyond what float32 makes of a uniform map
        return "> 99.9 %"
    return f"{100 * share:.0f} %" if share < 0.985 else f"{100 * share:.1f} %"


def _times(value: float) -> str:
    return f"{value:.2f}×" if value < 10 else f"{value:.0f}×"


def _figure(found: Explanation) -> "Figure":
    """The image, its most probable classes, the CAM and all attention maps, with their colour scales."""
    from matplotlib.figure import Figure

    columns = min(MOST_COLUMNS, max([4, *(len(layer.maps) for layer in found.layers)]))
    lines = [-(-len(layer.maps) // columns) for layer in found.layers]
    figure = Figure(figsize=(2.1 * columns + 0.8, 2.6 * (1 + sum(lines))), layout="constrained")
    parts: Any = figure.subfigures(1 + len(lines), 1, squeeze=False, height_ratios=[1, *lines])
    head, *rows = parts[:, 0]
    image, classes, cam = head.subplots(1, 3, width_ratios=[1, columns - 2, 1])
    image.imshow(found.pixels)
    image.set_axis_off()
    names, shares = zip(*reversed(found.top()), strict=True)
    bars = classes.barh(range(len(names)), shares, height=0.5, color="#3f5a8c")
    classes.bar_label(bars, [percent(share) for share in shares], padding=3, fontsize=8)
    classes.set_yticks(range(len(names)), names, fontsize=8)
    classes.set(xlim=(0, 1.15), xticks=[])
    classes.spines[["top", "right", "bottom"]].set_visible(False)
    cam.set_title("\n".join(["Grad-CAM++", *cam_caption("this model", found)]), fontsize=8)
    _scale(head, _lay(cam, found, found.cam, 1.0), [cam], [0, 1], ["0", "max"])
    for layer, row in zip(found.layers, rows, strict=True):
        row.suptitle(layer_heading(layer), fontsize=9, fontweight="bold", x=0.01, ha="left")
        grid = row.subplots(-(-len(layer.maps) // columns), columns, squeeze=False)
        top, values = layer_scale(layer), layer.maps * layer.maps[0].size
        for axes, one, caption in zip(grid.flat, values, map_captions(layer), strict=False):
            drawn = _lay(axes, found, one, top)
            axes.set_title("\n".join(caption), fontsize=8)
        for axes in grid.flat[len(values) :]:
            axes.set_axis_off()
        _scale(row, drawn, list(grid.flat), [0, 1, top], ["0", "uniform", scale_text(top)])
    if not found.layers:
        figure.text(0.5, 0, NO_LAYER, ha="center", va="bottom", fontsize=8)
    return figure


def _lay(axes: Any, found: Explanation, values: Any, top: float) -> Any:
    """Draw a map of values from 0 to ``top`` on the image in grey."""
    height, width = found.pixels.shape[:2]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    axes.imshow(found.pixels.mean(2), cmap="gray", vmin=0, vmax=255)
    axes.set_axis_off()
    look = {"cmap": COLOURS, "vmin": 0, "vmax": top, "interpolation": "bilinear"}
    return axes.imshow(values, alpha=STRENGTH, extent=extent, **look)


def _scale(figure: Any, drawn: Any, axes: list[Any], ticks: list[float], labels: list[str]) -> None:
    bar = figure.colorbar(drawn, ax=axes, fraction=0.03, pad=0.01)
    bar.solids.set_alpha(1)
    bar.set_ticks(ticks, labels=labels, fontsize=7)
