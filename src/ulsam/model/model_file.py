"""Opening a model file, and the classes that it says it is for."""

import difflib
import os
from typing import Any

import timm
from safetensors import SafetensorError, safe_open

from ulsam.base.errors import UlsamError, first_line
from ulsam.base.file_signatures import kind_of
from ulsam.base.files import check_readable
from ulsam.base.reading import open_regular
from ulsam.model.pretrained import HUB
from ulsam.model.spec import ModelSpec
from ulsam.model.trained import EXPORTED, locate, names

SPEC_KEY = "ulsam"  # of the spec among a model file's metadata


def classes_of(weights: str | os.PathLike[str]) -> tuple[str, ...] | None:
    """The classes of a model file; None for any other file of weights.

    Raises:
        UlsamError: no such file, or a safetensors file that is broken.

    >>> len(classes_of("mobilenetv2_100.grocery81_slim75"))
    81
    """
    if locate(weights).suffix != ".safetensors":
        return None
    with open_model_file(weights) as file:
        text = (file.metadata() or {}).get(SPEC_KEY)
    try:
        return None if text is None else ModelSpec.from_json(text).classes
    except UlsamError as error:
        raise UlsamError(f"{os.fspath(weights)}: {error}") from error


def open_model_file(path: str | os.PathLike[str]) -> Any:
    """The open safetensors file, to read metadata and tensors from.

    Raises:
        UlsamError: there is none, or it is no safetensors file.
    """
    path = locate(path)
    if not os.path.exists(path):
        known = [*names(), *timm.list_models()]
        if near := difflib.get_close_matches(str(path), known, n=1):
            whose = "the package has a trained model" if near[0] in names() else "timm has a model"
            hub = f"; the hub's is {HUB}{path}" if str(path).startswith("timm/") else ""
            raise UlsamError(f"no model file {path}; {whose} {near[0]}{hub}")
    if path.suffix in EXPORTED and path.exists():
        raise UlsamError(f"{path} is an exported model; this takes the .safetensors model file that it was made from")
    check_readable(path, "model file")
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        with open_regular(path) as file:
            head = file.read(64)
        if head.startswith((b"PK", b"\x80")):
            reason = "it is a checkpoint of PyTorch: name timm's model in its place, and the file as its `weights`"
        else:
            reason = kind_of(head) or first_line(error)
        raise UlsamError(f"{path} is no safetensors file, or is cut off: {reason}") from error
