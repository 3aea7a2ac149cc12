"""ULSAM: ultra-lightweight subspace attention for compact CNNs.

Importing this package imports nothing heavy: each public name is loaded when first used (PEP 562).
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "ULSAM": "ulsam.module",
    "ThinBlock": "ulsam.thin",
    "reconstruct": "ulsam.reconstruction",
    "convert_released": "ulsam.module",
    "candidates": "ulsam.surgery",
    "insert": "ulsam.surgery",
    "replace": "ulsam.surgery",
    "drop": "ulsam.surgery",
    "remove": "ulsam.surgery",
    "cost": "ulsam.costs",
    "inspect": "ulsam.inspection",
    "explain": "ulsam.explanation",
    "fold": "ulsam.folding",
    "export": "ulsam.exporting",
    "quantize": "ulsam.quantization",
    "bench": "ulsam.benchmarking.run",
    "compare": "ulsam.comparison",
    "slim": "ulsam.slimming.run",
    "Edit": "ulsam.recipe",
    "apply": "ulsam.recipe",
    "edits_of": "ulsam.recipe",
    "Recipe": "ulsam.recipe",
    "build": "ulsam.models",
    "load": "ulsam.models",
    "save_model": "ulsam.models",
    "UlsamError": "ulsam.errors",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'ulsam' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(["__version__", *_HOME])
