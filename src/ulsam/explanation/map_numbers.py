"""Numbers about what a model looks at, over a set of images: do its CAMs and its subspaces mean something?"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ulsam.base.errors import UlsamError
from ulsam.base.eval_mode import eval_mode
from ulsam.explanation import measures, perturb
from ulsam.explanation.cam import upsampled
from ulsam.explanation.explainer import Explainer
from ulsam.explanation.explanation import Explanation, LayerMaps
from ulsam.explanation.regions import at_size
from ulsam.model.spec import ModelSpec

Areas = Mapping[str, NDArray[np.float32]]
CAM = "Grad-CAM++"


class MapNumbers:
    """Sums up what one model looks at, a batch of images at a time.

    Args:
        model, spec: of :class:`~ulsam.explanation.Explainer`, which is made of them: ``explainer``.
        curves: whether deletion, insertion and drop are measured, which takes about 40 forward passes an image.

    >>> from ulsam.model.build import build
    >>> from ulsam.model.spec import Edit
    >>> spec = ModelSpec("mobilenetv2_035", ("cat", "dog"), (Edit("replace", "17", 2),), input_size=(3, 64, 64))
    >>> numbers = MapNumbers(build(spec)[0], spec)
    >>> pixels = [torch.zeros(64, 64, 3, dtype=torch.uint8)]
    >>> numbers.add(numbers.explainer(pixels), ["cat"], [None])
    >>> result = numbers.result()
    >>> sorted(result), result["layers"][0]["place"], sorted(result["layers"][0]["entropy_of_class"])
    (['cam', 'images', 'layers', 'marks'], '17', ['cat'])
    """

    def __init__(self, model: nn.Module, spec: ModelSpec, *, curves: bool = True) -> None:
        self.explainer = Explainer(model, spec, watch=self._watch)
        self.curves = curves
        self.images = 0
        self.cam: dict[str, list[float]] = defaultdict(list)
        self.layers: dict[str, _Layer] = {}
        self.inside: dict[tuple[str, str], list[float]] = defaultdict(list)  # by whose map, and area
        self.area: dict[str, list[float]] = defaultdict(list)

    def add(
        self, explanations: Sequence[Explanation], truths: Sequence[str | None], areas: Sequence[Areas | None]
    ) -> None:
        """Take in what ``explainer`` found on a batch.

        Args:
            explanations: by ``explainer``, its last call.
            truths: the true class of each image; where it is None the predicted one counts as the class of its maps.
            areas: of each image, by :func:`ulsam.explanation.regions.mark_areas`.
        """
        self.images += len(explanations)
        if self.curves:
            self._measure_cams(explanations)
        for one, truth, marked in zip(explanations, truths, areas, strict=True):
            label = one.top(1)[0][0] if truth is None else truth
            for layer in one.layers:
                self.layers[layer.name].add(layer, label)
            for name, area in (marked or {}).items():
                self.area[name].append(float(area.mean()))
                maps = {CAM: one.cam[None], **{layer.name: layer.maps for layer in one.layers}}
                for whose, each in maps.items():
                    shares = measures.share_within(each, at_size(area, *each.shape[1:]))
                    self.inside[whose, name].append(float(shares.mean()))
                    for number, share in enumerate(shares, start=1) if whose != CAM else ():
                        self.inside[f"{whose}, map {number}", name].append(float(share))

    def result(self) -> dict[str, Any]:
        """All numbers, as JSON: means over images with their standard errors.

        Raises:
            UlsamError: no image was added.
        """
        if not self.images:
            raise UlsamError("no image to take numbers from")
        marks: dict[str, Any] = {"area": {name: _mean(values) for name, values in self.area.items()}}
        for (whose, name), shares in self.inside.items():
            entry = {**_mean(shares), "times_area": float(np.mean(shares) / np.mean(self.area[name]))}
            marks.setdefault(whose, {})[name] = entry
        return {
            "images": self.images,
            "cam": {
                "layer": self.explainer.cam_layer,
                **{name: _mean(values) for name, values in self.cam.items()},
            },
            "layers": [layer.result() for layer in self.layers.values()],
            "marks": marks if self.area else None,
        }

    def _watch(self, name: str, x: Tensor, maps: Tensor) -> None:
        if name not in self.layers:
            self.layers[name] = _Layer(maps.shape[1])
        self.layers[name].watch(x, maps)

    def _measure_cams(self, explanations: Sequence[Explanation]) -> None:
        explainer = self.explainer
        images = explainer.images([torch.from_numpy(each.pixels) for each in explanations])
        size = (images.shape[2], images.shape[3])
        targets = torch.tensor([each.target for each in explanations], device=images.device)
        cams = torch.from_numpy(np.stack([each.cam for each in explanations])).to(images)
        seed = torch.Generator().manual_seed(self.images)
        chance = torch.rand(cams.shape, generator=seed).to(images)  # as coarse as the CAM is

        def model(batch: Tensor) -> Tensor:
            return explainer.model(batch).float().softmax(1)

        before = np.array([each.probabilities[each.target] for each in explanations], np.float64)
        with eval_mode(explainer.model):
            for kind, curves in (("deletion", perturb.deletion_curves), ("insertion", perturb.insertion_curves)):
                for name, maps in (("", cams), ("_random", chance)):
                    areas = perturb.area_under(curves(model, images, upsampled(maps, size), targets))
                    self.cam[kind + name] += areas.tolist()
            after = perturb.kept_confidence(model, images, upsampled(cams, size), targets).double().cpu().numpy()
        for kind in ("deletion", "insertion"):
            pairs = zip(
                self.cam[kind][-len(explanations) :], self.cam[f"{kind}_random"][-len(explanations) :], strict=True
            )
            self.cam[f"{kind}_minus_random"] += [own - other for own, other in pairs]
        self.cam["average_drop"] += perturb.average_drop(before, after).tolist()
        self.cam["increase_in_confidence"] += (after > before).astype(float).tolist()


class _Layer:
    """What one ULSAM layer's maps and features add up to."""

    def __init__(self, groups: int) -> None:
        self.groups = groups
        self.about: dict[str, Any] = {}
        self.entropy: list[list[float]] = []
        self.peak: list[list[float]] = []
        self.of_class: dict[str, list[float]] = defaultdict(list)
        self.correlation: list[float] = []
        self.divergence: list[float] = []
        zero = torch.zeros((), dtype=torch.float64)
        self.content = {"before": (zero, zero), "after": (zero, zero)}  # power, and power times frequency, [C]

    def watch(self, x: Tensor, maps: Tensor) -> None:
        """The input of the layer and its maps: its output is x + maps * x."""
        x = x.float()
        after = x + (x.unflatten(1, (self.groups, -1)) * maps[:, :, None]).flatten(1, 2)
        for name, features in (("before", x), ("after", after)):
            power, weighted = measures.radial_content(features)
            old = self.content[name]
            self.content[name] = (old[0] + power, old[1] + weighted)

    def add(self, layer: LayerMaps, label: str) -> None:
        """The maps of one image of a class."""
        groups, height, width = layer.maps.shape
        shape = [groups, height, width]
        self.about = {"name": layer.name, "place": layer.place, "form": layer.form, "maps": shape}
        self.entropy.append(layer.entropy_share)
        self.peak.append(layer.peak)
        self.of_class[label].append(float(np.mean(layer.entropy_share)))
        if (found := measures.correlations(layer.maps)).size:
            self.correlation.append(float(found.mean()))
        if (bits := measures.divergence(layer.maps)) is not None:
            self.divergence.append(bits)

    def result(self) -> dict[str, Any]:
        return {
            **self.about,
            "entropy_share": [_mean(values) for values in zip(*self.entropy, strict=True)],
            "peak": [_mean(values) for values in zip(*self.peak, strict=True)],
            "entropy_of_class": {name: _mean(values) for name, values in sorted(self.of_class.items())},
            "correlation": _mean(self.correlation) if self.correlation else None,
            "divergence_bits": _mean(self.divergence) if self.divergence else None,
            "frequency": {name: self._frequency(name) for name in self.content},
        }

    def _frequency(self, name: str) -> dict[str, Any]:
        """The subspaces' mean frequencies, and how far they lie apart, against random groups of channels."""
        power, weighted = self.content[name]
        sums = [values.unflatten(0, (self.groups, -1)).sum(1).numpy() for values in (power, weighted)]
        spread, chance = measures.spread_by_chance(power, weighted, self.groups)
        return {
            "cycles_per_width": measures.ratio(sums[1], sums[0]).tolist(),
            "spread": spread,
            "spread_of_random_groups": float(chance.mean()),
            "random_groups_as_far_apart": float((chance >= spread).mean()),
        }


def _mean(values: Sequence[float]) -> dict[str, float | None]:
    """The mean of images and its standard error, which one image alone does not have."""
    error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "standard_error": error}
