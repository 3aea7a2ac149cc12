"""What panels, the report and figures say, in the same words."""

from ulsam.model.spec import ModelSpec


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
