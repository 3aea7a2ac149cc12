"""ULSAM: ultra-lightweight subspace attention for compact CNNs.

Importing this package imports nothing heavy: each public name is loaded when first used (PEP 562). Their types are in
``__init__.pyi``.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    # the layers
    "ULSAM": "ulsam.layer.ulsam",
    "InvertedResidual": "ulsam.layer.inverted_residual",
    "convert_released": "ulsam.layer.ulsam",
    # surgery
    "candidates": "ulsam.surgery.find",
    "replace": "ulsam.surgery.edit",
    "insert": "ulsam.surgery.edit",
    "remove": "ulsam.surgery.edit",
    "undo": "ulsam.surgery.edit",
    "reconstruct": "ulsam.surgery.reconstruct",
    "cost": "ulsam.surgery.cost",
    "fold": "ulsam.surgery.fold",
    # models
    "Edit": "ulsam.model.spec",
    "ModelSpec": "ulsam.model.spec",
    "apply": "ulsam.model.spec",
    "edits_of": "ulsam.model.spec",
    "make_spec": "ulsam.model.timm_spec",
    "build": "ulsam.model.build",
    "load": "ulsam.model.build",
    "save": "ulsam.model.build",
    # training and studies
    "TrainConfig": "ulsam.training.config",
    "TrainSettings": "ulsam.training.settings",
    "Callback": "ulsam.training.callbacks",
    "train": "ulsam.training.train",
    "resume": "ulsam.training.train",
    "compare": "ulsam.study.compare",
    "slim": "ulsam.study.slim",
    # what a trained model does
    "evaluate": "ulsam.deploy.evaluate",
    "evaluate_labels": "ulsam.deploy.evaluate_labels",
    "predict": "ulsam.deploy.predict",
    "explain": "ulsam.explanation.explainer",
    "Explainer": "ulsam.explanation.explainer",
    "inspect": "ulsam.explanation.inspect_maps",
    # deployment
    "export": "ulsam.deploy.export",
    "quantize": "ulsam.deploy.quantize",
    "bench": "ulsam.deploy.bench",
    "push": "ulsam.deploy.hub",
    # data
    "check": "ulsam.data.check",
    "Checked": "ulsam.data.check",
    # what the functions return
    "BenchRow": "ulsam.deploy.bench_report",
    "Candidate": "ulsam.surgery.find",
    "CompareResult": "ulsam.study.compare_result",
    "Cost": "ulsam.surgery.cost",
    "Evaluation": "ulsam.deploy.evaluate",
    "Explanation": "ulsam.explanation.explanation",
    "LabelEvaluation": "ulsam.deploy.evaluate_labels",
    "LayerStats": "ulsam.explanation.inspect_maps",
    "Parity": "ulsam.deploy.parity",
    "Prediction": "ulsam.training.predict",
    "Quantized": "ulsam.deploy.quantize",
    "Reconstructed": "ulsam.surgery.reconstruct",
    "SlimResult": "ulsam.study.slim_result",
    "TrainSummary": "ulsam.training.train_summary",
    # errors and progress
    "UlsamError": "ulsam.base.errors",
    "Interrupted": "ulsam.base.errors",
    "show_progress": "ulsam.base.logs",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'ulsam' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
