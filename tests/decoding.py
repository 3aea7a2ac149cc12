"""The reading of images as on a machine that lacks the package simplejpeg, which is not required."""

import functools
import importlib.util
import sys
from types import ModuleType

import pytest


@functools.cache
def images_without_simplejpeg() -> ModuleType:
    """A second `ulsam.data.images`, imported where simplejpeg cannot be."""
    spec = importlib.util.find_spec("ulsam.data.images")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "simplejpeg", None)
        spec.loader.exec_module(module)
    assert module.simplejpeg is None
    return module
