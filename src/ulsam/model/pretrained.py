"""Pretrained models by name: which texts name one, and what their outputs are called."""

import os
from collections.abc import Mapping
from typing import Any

import timm
from timm.data import ImageNetInfo, infer_imagenet_subset

from ulsam.model.trained import names

HUB = "hf-hub:"
LOCAL = "local-dir:"  # timm's name of a folder in the hub's format


def is_pretrained_name(model: object) -> bool:
    """Whether this is a timm name, or that of a model of the hub, and no file or folder.

    >>> [is_pretrained_name(name) for name in ("mobilenetv2_100", "hf-hub:me/birds", "runs/mine", "model.safetensors")]
    [True, True, False, False]
    """
    if not isinstance(model, str) or os.path.exists(model):
        return False
    return is_hub_name(model) or timm.is_model(model)


def is_hub_name(model: str) -> bool:
    """Whether this names a model of the hub, or a folder in the hub's format.

    >>> is_hub_name("hf-hub:timm/mobilenetv2_100.ra_in1k")
    True
    """
    return model.startswith((HUB, LOCAL))


def means_file(model: str) -> bool:
    """Whether a name means a model file: its own, a run's folder, or a trained model of the package; not timm's name.

    >>> means_file("model.safetensors"), means_file("mobilenetv2_100")
    (True, False)
    """
    return model.endswith(".safetensors") or model in names() or (os.path.isdir(model) and not timm.is_model(model))


def class_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the outputs of a pretrained model.

    They are the label names in its configuration; without any, of an ImageNet head "WNID description"; else numbers.

    Args:
        config: timm's pretrained configuration.

    >>> class_names({"num_classes": 1000})[0]
    'n01440764 tench, Tinca tinca'
    >>> class_names({"num_classes": 2}), class_names({"num_classes": 2, "label_names": ["cat", "dog"]})
    (('0', '1'), ('cat', 'dog'))
    """
    count = config.get("num_classes") or 0
    labels, descriptions = config.get("label_names"), config.get("label_descriptions") or {}
    if labels is None and (subset := infer_imagenet_subset({"num_classes": count})):
        known = ImageNetInfo(subset)
        labels, descriptions = known.label_names(), known.label_descriptions(as_dict=True)
        return tuple(f"{label} {descriptions[label]}" for label in labels)
    if labels is None or len(labels) != count or len(set(map(str, labels))) != count:
        labels = range(count)
    return tuple(map(str, labels))
