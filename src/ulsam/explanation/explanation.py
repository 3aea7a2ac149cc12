"""What one model sees in one image: its answer, its CAM and its attention maps, in words and as a figure.

The figure is matplotlib's, to change and to print. `ulsam.explanation.panel` draws the panels of whole folders with
Pillow, which needs no extra package. Both draw the same :class:`MapRow`, with the same words.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ulsam.base.extras import check_plots
from ulsam.data.image_channels import shown
from ulsam.data.images import Pixels
from ulsam.explanation.captions import percent, verdict
from ulsam.explanation.drawing import COLORS, STRENGTH
from ulsam.explanation.measures import INERT, entropy_share, max_effect, peak
from ulsam.layer.ulsam import Form

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = NDArray[np.float32]

NO_LAYER = "This model has no ULSAM layer: there are no attention maps to show."
MAX_COLUMNS = 8


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

    pixels: Pixels  # what the model was given, before normalization: [H, W, 3], of gray [H, W, 1]
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


@dataclass(frozen=True)
class MapRow:
    """Maps on one color scale, as panels, pages and figures all show them."""

    heading: str
    maps: tuple[NDArray[np.floating], ...]  # [h, w] each, from 0 to 1, the top of the scale
    captions: tuple[tuple[str, str], ...]  # of each map, two lines
    marks: tuple[tuple[float, str], ...]  # on the scale, the highest first: its place from 0 to 1, and its label
    note: str = ""  # what to beware of; it ends the heading, too


def attention_row(layer: LayerMaps) -> MapRow:
    """The maps of a layer; the scale ends at their largest value, and at twice a uniform map's at least.

    >>> row = attention_row(LayerMaps("blocks.5.2", "17", "equations", np.full((1, 2, 2), 0.25)))
    >>> row.heading, row.captions[0], row.marks
    ('layer 17, blocks.5.2: 1 map of 2 × 2; nearly uniform: this layer does little', ('1: entropy 100.0 %', \
'peak 1.00×'), ((1.0, '2.00×'), (0.5, 'uniform'), (0.0, '0')))
    """
    groups, height, width = layer.maps.shape
    place = f"layer {layer.place}, " if layer.place else ""
    top = max(2.0, *layer.peak)
    pairs, note = zip(layer.entropy_share, layer.peak, strict=True), _little(layer)
    return MapRow(
        f"{place}{layer.name}: {groups} map{'s' if groups > 1 else ''} of {height} × {width}{'; ' * bool(note)}{note}",
        tuple(layer.maps * (height * width / top)),
        tuple(
            (f"{number}: entropy {_entropy(share)}", f"peak {_times(peak)}")
            for number, (share, peak) in enumerate(pairs, start=1)
        ),
        ((1.0, _times(top)), (1 / top, "uniform"), (0.0, "0")),
        note,
    )


def _little(layer: LayerMaps) -> str:
    """That the maps change the features by less than `INERT`, whatever these are, if it is so."""
    if max_effect(layer.maps) >= INERT:
        return ""
    return f"{'nearly uniform' if max(layer.peak) < 2 else 'weak'}: this layer does little"


def cam_row(models: Mapping[str, Explanation]) -> MapRow:
    """The CAM of each model, by what it is called; each has its own scale, up to its maximum."""
    first = next(iter(models.values()))
    height, width = first.cam.shape
    captions = [
        (f"{name}, {percent(float(one.probabilities[one.target]))}", f"for {one.classes[one.target]}")
        for name, one in models.items()
    ]
    return MapRow(
        f"Grad-CAM++ of {first.cam_layer}, {height} × {width}",
        tuple(one.cam for one in models.values()),
        tuple(captions),
        ((1.0, "max"), (0.0, "0")),
    )


def headline(truth: str | None, explanation: Explanation, base: Explanation | None, whose: str = "base") -> str:
    """One sentence on what was predicted; ``whose`` is what the base model is called."""
    (named, share), *_ = explanation.top(1)
    texts = {"wrong": f"✗ wrong: {truth}, predicted as {named}", "right": f"✓ right: {named}"}
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


def _figure(explanation: Explanation) -> "Figure":
    """The image, its most probable classes, the CAM and all attention maps, with their color scales."""
    from matplotlib.figure import Figure

    columns = min(MAX_COLUMNS, max([4, *(len(layer.maps) for layer in explanation.layers)]))
    lines = [-(-len(layer.maps) // columns) for layer in explanation.layers]
    figure = Figure(figsize=(2.1 * columns + 0.8, 2.6 * (1 + sum(lines))), layout="constrained")
    parts: Any = figure.subfigures(1 + len(lines), 1, squeeze=False, height_ratios=[1, *lines])
    head, *rest = parts[:, 0]
    image, classes, cam = head.subplots(1, 3, width_ratios=[1, columns - 2, 1])
    image.imshow(shown(explanation.pixels))
    image.set_axis_off()
    names, shares = zip(*reversed(explanation.top()), strict=True)
    bars = classes.barh(range(len(names)), shares, height=0.5, color="#3f5a8c")
    classes.bar_label(bars, [percent(share) for share in shares], padding=3, fontsize=8)
    classes.set_yticks(range(len(names)), names, fontsize=8)
    classes.set(xlim=(0, 1.15), xticks=[])
    classes.spines[["top", "right", "bottom"]].set_visible(False)
    row = cam_row({"this model": explanation})
    cam.set_title("\n".join(["Grad-CAM++", *row.captions[0]]), fontsize=8)
    _scale(head, _lay(cam, explanation, explanation.cam), [cam], row)
    for part, row in zip(rest, map(attention_row, explanation.layers), strict=True):
        part.suptitle(row.heading, fontsize=9, fontweight="bold", x=0.01, ha="left")
        grid = part.subplots(-(-len(row.maps) // columns), columns, squeeze=False)
        for axes, one, caption in zip(grid.flat, row.maps, row.captions, strict=False):
            drawn = _lay(axes, explanation, one)
            axes.set_title("\n".join(caption), fontsize=8)
        for axes in grid.flat[len(row.maps) :]:
            axes.set_axis_off()
        _scale(part, drawn, list(grid.flat), row)
    if not explanation.layers:
        figure.text(0.5, 0, NO_LAYER, ha="center", va="bottom", fontsize=8)
    return figure


def _lay(axes: Any, explanation: Explanation, values: Any) -> Any:
    """Draw a map of values from 0 to 1 on the image in gray."""
    height, width = explanation.pixels.shape[:2]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    axes.imshow(explanation.pixels.mean(2), cmap="gray", vmin=0, vmax=255)
    axes.set_axis_off()
    look = {"cmap": COLORS, "vmin": 0, "vmax": 1, "interpolation": "bilinear"}
    return axes.imshow(values, alpha=STRENGTH, extent=extent, **look)


def _scale(figure: Any, drawn: Any, axes: list[Any], row: MapRow) -> None:
    ticks, labels = zip(*row.marks, strict=True)
    bar = figure.colorbar(drawn, ax=axes, fraction=0.03, pad=0.01)
    bar.solids.set_alpha(1)
    bar.set_ticks(ticks, labels=labels, fontsize=7)
