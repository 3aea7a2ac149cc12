"""The models of the paper's tables as timm names; importing `ulsam.model.build` registers them.

``timm.create_model("ulsam_mobilenetv2_100_replace_14_17", groups=8)`` gives timm's own MobileNet-V2 with layers 14 and
17 replaced. ``groups=`` (default 4) and ``form=`` are keywords; every other argument goes to timm's model, and
``pretrained=True`` loads the base model's weights into the layers that were not touched.
"""

from typing import Any

import timm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.efficientnet import _gen_mobilenet_v1
from torch import nn

from ulsam.layer.ulsam import Form
from ulsam.model.spec import Edit

#: Base model and edit of each placement in the paper's tables. Which 512-channel block of MobileNet-V1 the paper
#: replaced is not published; all five candidates (layers 8 to 12) cost the same, and layer 12 is this project's choice.
PLACEMENTS: dict[str, tuple[str, str]] = {
    "ulsam_mobilenetv1_100_insert_11": ("mobilenetv1_100", "insert 11:1"),
    "ulsam_mobilenetv1_100_insert_12": ("mobilenetv1_100", "insert 12:1"),
    "ulsam_mobilenetv1_100_insert_13": ("mobilenetv1_100", "insert 13:1"),
    "ulsam_mobilenetv1_100_replace_12": ("mobilenetv1_100", "replace 12"),
    "ulsam_mobilenetv1_075_replace_12": ("mobilenetv1_075", "replace 12"),
    "ulsam_mobilenetv1_050_replace_12": ("mobilenetv1_050", "replace 12"),
    "ulsam_mobilenetv2_100_insert_17": ("mobilenetv2_100", "insert 17:1"),
    "ulsam_mobilenetv2_100_replace_14": ("mobilenetv2_100", "replace 14"),
    "ulsam_mobilenetv2_100_replace_17": ("mobilenetv2_100", "replace 17"),
    "ulsam_mobilenetv2_100_replace_9_13": ("mobilenetv2_100", "replace 9,13"),
    "ulsam_mobilenetv2_100_replace_16_17": ("mobilenetv2_100", "replace 16,17"),
    "ulsam_mobilenetv2_100_replace_14_17": ("mobilenetv2_100", "replace 14,17"),
    "ulsam_mobilenetv2_100_replace_13_14_16_17": ("mobilenetv2_100", "replace 13,14,16,17"),
}

_WRAPPING = ("features_only", "feature_cls", "feature_cfg", "out_indices")

#: MobileNet-V1 widths that timm does not name.
_WIDTHS = {"mobilenetv1_075": 0.75, "mobilenetv1_050": 0.5}

default_cfgs: dict[str, Any] = {}  # where timm's register_model looks for a model's data configuration


def _register(name: str, build: Any, config_of: str) -> None:
    config = timm.get_pretrained_cfg(config_of)
    kept = (
        "input_size",
        "pool_size",
        "interpolation",
        "crop_pct",
        "mean",
        "std",
        "num_classes",
        "first_conv",
        "classifier",
    )
    default_cfgs.update(generate_default_cfgs({name: {key: getattr(config, key) for key in kept}}))
    build.__name__ = build.__qualname__ = name
    register_model(build)


def _width(name: str, multiplier: float) -> None:
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _gen_mobilenet_v1(name, multiplier, pretrained=pretrained, **kwargs)

    build.__doc__ = f"MobileNet-V1 at {multiplier} of its channels; no trained weights exist."
    _register(name, build, "mobilenetv1_100")


def _preset(name: str, base: str, text: str) -> None:
    def build(pretrained: bool = False, groups: int = 4, form: Form = "equations", **kwargs: Any) -> nn.Module:
        wrap = (
            {key: kwargs.pop(key) for key in _WRAPPING if key in kwargs}
            if kwargs.get("features_only") and "feature_cls" in kwargs
            else {}
        )
        model = timm.create_model(base, pretrained=pretrained, **kwargs)
        edit = Edit.parse(text)
        Edit(edit.kind, edit.at, groups, form).apply(model)
        if wrap:  # timm's other ways to give features wrap a whole model: first the edit, then the wrapping
            model = build_model_with_cfg(lambda **_: model, name, False, pretrained_cfg=model.pretrained_cfg, **wrap)
        model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, "architecture": name}
        return model

    build.__doc__ = f"{base} with the edit `{text}` of the ULSAM paper's tables."
    _register(name, build, base)


for _name, _multiplier in _WIDTHS.items():
    _width(_name, _multiplier)
for _name, (_base, _text) in PLACEMENTS.items():
    _preset(_name, _base, _text)
