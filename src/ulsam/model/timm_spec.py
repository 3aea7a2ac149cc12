"""Specs of timm's models: what is not given comes from timm's data configuration."""

import difflib
import os
from collections.abc import Mapping, Sequence
from typing import Any, cast

import timm
from timm.data import resolve_data_config

from ulsam.base.errors import UlsamError, first_line
from ulsam.model.spec import Edit, Json, ModelSpec
from ulsam.model.trained import names


def make_spec(
    base: str,
    classes: Sequence[str],
    edits: Sequence[Edit] = (),
    *,
    size: int | None = None,
    model_args: Mapping[str, Json] | None = None,
    **data: Any,
) -> ModelSpec:
    """The spec of a timm model with edits; what is not given comes from timm's data configuration of that model.

    Args:
        base: a timm name, one of `ulsam`'s presets included.
        classes: output names.
        edits: see :class:`ulsam.model.spec.Edit`.
        size: height and width of the input, in pixels.
        model_args: keyword arguments for `timm.create_model`.
        data: ``mean``, ``std``, ``interpolation`` or ``crop_pct`` in place of timm's.

    Raises:
        UlsamError: timm has no model of this name.

    >>> make_spec("mobilenetv2_100", ["cat", "dog"], size=160).input_size
    (3, 160, 160)
    """
    check_base(base)
    return spec_from(base, classes, edits, pretrained_config(base), size=size, model_args=model_args, **data)


def pretrained_config(base: str) -> dict[str, Any]:
    """timm's pretrained configuration of a model; empty where it has none."""
    known = timm.get_pretrained_cfg(base)
    return known.to_dict() if known else {}


def spec_from(
    base: str,
    classes: Sequence[str],
    edits: Sequence[Edit],
    known: Mapping[str, Any],
    *,
    size: int | None = None,
    model_args: Mapping[str, Json] | None = None,
    **data: Any,
) -> ModelSpec:
    """As :func:`make_spec`, with timm's configuration given."""
    given = {key: tuple(data.pop(key)) for key in ("mean", "std") if data.get(key)}  # timm takes three numbers alone
    config = {**resolve_data_config({"img_size": size, **data}, pretrained_cfg=known), **given}
    channels = cast(int, (model_args or {}).get("in_chans", config["input_size"][0]))
    for key in ("mean", "std"):
        if len(config[key]) != channels:  # a model for other than RGB images
            config[key] = (sum(config[key]) / len(config[key]),) * channels
    return ModelSpec(
        base=base,
        classes=tuple(classes),
        edits=tuple(edits),
        model_args=dict(model_args or {}),
        input_size=(channels, *config["input_size"][1:]),
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


def check_base(base: str) -> None:
    """Raise UlsamError unless timm has a model of this name, with the nearest ones."""
    if not timm.is_model(base):
        if os.path.exists(base):
            raise UlsamError(f"timm has no model {base!r}; to start from a trained model name its file as `weights`")
        near = difflib.get_close_matches(base, timm.list_models(), n=3)
        raise UlsamError(f"timm has no model {base!r}{'; nearest: ' + ', '.join(near) if near else ''}")
    try:
        timm.get_pretrained_cfg(base)
    except RuntimeError as error:
        ours = difflib.get_close_matches(base, names(), n=1)
        reason = f"the package has a trained model {ours[0]}" if ours else first_line(error)
        raise UlsamError(f"timm has no model {base!r}: {reason}") from error
