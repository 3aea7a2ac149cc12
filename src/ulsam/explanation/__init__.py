"""What a model looks at: attention maps, class activation maps, panels, a report, and numbers about all of it."""

from ulsam.explanation.explainer import Explainer, explain
from ulsam.explanation.explanation import Explanation, LayerMaps

__all__ = ["Explainer", "Explanation", "LayerMaps", "explain"]
