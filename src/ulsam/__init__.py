"""ULSAM: ultra-lightweight subspace attention for compact CNNs.

Importing this package imports nothing heavy: each public name is loaded when first used (PEP 562).
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "ULSAM": "ulsam.layer.ulsam",
    "InvertedResidual": "ulsam.layer.inverted_residual",
    "reconstruct": "ulsam.surgery.reconstruct",
    "convert_released": "ulsam.layer.ulsam",
    "candidates": "ulsam.surgery.find",
    "insert": "ulsam.surgery.edit",
    "replace": "ulsam.surgery.edit",
    "remove": "ulsam.surgery.edit",
    "undo": "ulsam.surgery.edit",
    "cost": "ulsam.surgery.cost",
    "inspect": "ulsam.explanation.inspect_maps",
    "explain": "ulsam.explanation",
    "fold": "ulsam.surgery.fold",
    "export": "ulsam.deploy.export",
    "quantize": "ulsam.deploy.quantize",
    "bench": "ulsam.deploy.bench",
    "compare": "ulsam.study.compare",
    "slim": "ulsam.study.slim",
    "Edit": "ulsam.model.spec",
    "apply": "ulsam.model.spec",
    "edits_of": "ulsam.model.spec",
    "ModelSpec": "ulsam.model.spec",
    "build": "ulsam.model.build",
    "load": "ulsam.model.build",
    "save_model": "ulsam.model.build",
    "UlsamError": "ulsam.base.errors",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'ulsam' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(["__version__", *_HOME])
