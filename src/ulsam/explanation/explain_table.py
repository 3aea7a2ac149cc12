"""The numbers of :mod:`ulsam.explanation.map_numbers` as text."""

from collections.abc import Mapping
from typing import Any

from ulsam.base.text_table import text_table
from ulsam.explanation.map_numbers import CAM

_CAM_COLUMNS = {
    "deletion": "deletion",
    "deletion_random": "(random)",
    "insertion": "insertion",
    "insertion_random": "(random)",
    "average_drop": "drop",
    "increase_in_confidence": "increase",
}
_CAM_LEGEND = (
    "deletion, insertion: area under the predicted class's probability while the image is taken away, or comes back,"
    " in ten parts, what the CAM marks most first; a good CAM has little deletion and much insertion; (random): in"
    " random order. drop, increase: confidence lost, and share of images that gain, when the CAM alone is left."
)
_LAYER_LEGEND = (
    "entropy: of a uniform map's; peak: times uniform; cycles: power-weighted mean spatial frequency of the subspace's"
    " features before and after attention, in cycles per width of the map. all: mean correlation (r) and Jensen-Shannon"
    " divergence (JS, bits) of two maps, and the share of random groups of channels whose frequencies lie at least"
    " as far apart as the subspaces' do before attention."
)
_MARK_LEGEND = (
    "share of a map's mass on each field mark, and in multiples of a uniform map's; mean over a layer's maps."
)


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Tables of the numbers of several models, with what their columns mean.

    Args:
        results: of :meth:`ulsam.explanation.map_numbers.MapNumbers.result`, by the models' names.
    """
    parts = []
    cams = {name: result for name, result in results.items() if len(result["cam"]) > 1}
    if cams:
        cells = [["CAM of", *_CAM_COLUMNS.values()]]
        cells += [[name, *(_value(result["cam"][key], 3) for key in _CAM_COLUMNS)] for name, result in cams.items()]
        parts += [*text_table(cells, right=range(1, 7)), _CAM_LEGEND, ""]
    for name, result in results.items():
        if result["layers"]:
            parts += [f"attention of {name}", *_layers(result["layers"]), ""]
    if any(result["layers"] for result in results.values()):
        parts[-1:] = [_LAYER_LEGEND, ""]
    for name, result in results.items():
        if result["marks"]:
            parts += [
                f"drawn field marks, {name}",
                *_marks(result["marks"], [layer["name"] for layer in result["layers"]]),
                "",
            ]
    if any(result["marks"] for result in results.values()):
        parts[-1:] = [_MARK_LEGEND, ""]
    return "\n".join(parts).rstrip()


def _layers(layers: list[dict[str, Any]]) -> list[str]:
    cells = [["layer", "name", "map", "", "entropy", "peak", "cycles", "after", "r", "JS", "random groups"]]
    for layer in layers:
        groups, height, width = layer["maps"]
        head = [layer["place"] or "", layer["name"], f"{height}x{width}"]
        before, after = (layer["frequency"][name]["cycles_per_width"] for name in ("before", "after"))
        for number in range(groups):
            entropy, peak = layer["entropy_share"][number]["mean"], layer["peak"][number]["mean"]
            figures = [f"{100 * entropy:.1f} %", f"{peak:.2f}", f"{before[number]:.3f}", f"{after[number]:.3f}"]
            cells.append([*head, str(number + 1), *figures, "", "", ""])
            head = ["", "", ""]
        if groups > 1:
            apart = f"{100 * layer['frequency']['before']['random_groups_as_far_apart']:.1f} %"
            agreement = [_value(layer["correlation"], 2), _value(layer["divergence_bits"], 4)]
            cells.append([*head, "all", "", "", "", "", *agreement, apart])
    return text_table(cells, right=range(3, len(cells[0])))


def _marks(marks: Mapping[str, Any], layers: list[str]) -> list[str]:
    areas = marks["area"]
    cells = [["", *areas], ["share of the area", *(f"{100 * area['mean']:.1f} %" for area in areas.values())]]
    for whose, shares in marks.items():
        if whose in (CAM, *layers):
            found = [f"{100 * shares[name]['mean']:.1f} % ({shares[name]['times_area']:.2f}x)" for name in areas]
            cells.append([CAM if whose == CAM else f"maps of {whose}", *found])
    return text_table(cells, right=range(1, len(cells[0])))


def _value(value: Mapping[str, float | None] | None, digits: int) -> str:
    if value is None:
        return ""
    error = value["standard_error"]
    return f"{value['mean']:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")
