"""What panels, the report and figures say, in the same words."""

from ulsam.explanation.explainer import Explanation, LayerMaps
from ulsam.model.spec import ModelSpec

NO_LAYER = "This model has no ULSAM layer: there are no attention maps to show."


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


def percent(share: float) -> str:
    """A probability, in words that never round to certainty.

    >>> percent(0.5), percent(0.99999), percent(0.00001), percent(1.0)
    ('50 %', '> 99.9 %', '< 0.1 %', '100 %')
    """
    if 0.999 < share < 1:
        return "> 99.9 %"
    if 0 < share < 0.001:
        return "< 0.1 %"
    return f"{100 * share:.0f} %" if 0.0995 <= share < 0.99 or share in (0, 1) else f"{100 * share:.1f} %"


def model_name(spec: ModelSpec) -> str:
    """The base model and what was done to it."""
    return "; ".join([spec.base, *map(str, spec.edits)])


def other_classes(model: ModelSpec, *others: ModelSpec) -> str:
    """A line if models know different classes; empty if they do not.

    >>> other_classes(ModelSpec("resnet18", ("cat", "dog")), ModelSpec("resnet18", ("dog", "cow")))
    "the models know different classes: only one has 'cat'; their guesses and probabilities do not compare"
    """
    for other in others:
        if odd := set(model.classes) ^ set(other.classes):
            return (
                f"the models know different classes: only one has {min(odd)!r}; "
                "their guesses and probabilities do not compare"
            )
    return ""


def verdict(truth: str | None, named: str) -> str:
    """How a prediction compares with the true class.

    >>> verdict("wren", "robin"), verdict("wren", "wren"), verdict(None, "wren")
    ('wrong', 'right', 'unknown')
    """
    return "unknown" if truth is None else "right" if truth == named else "wrong"


def headline(truth: str | None, found: Explanation, base: Explanation | None, whose: str = "base") -> str:
    """One sentence on what was predicted; ``whose`` is what the base model is called."""
    (named, share), *_ = found.top(1)
    told = {"wrong": f"✗ wrong: {truth}, taken for {named}", "right": f"✓ right: {named}"}
    text = f"{told.get(verdict(truth, named), named)} ({percent(share)})"
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
