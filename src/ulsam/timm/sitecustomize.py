"""What Python runs at its start in each child process of ``python -m ulsam.timm``: importing timm registers our models.

The launcher puts this folder on ``PYTHONPATH``. An interpreter that never imports timm imports nothing more.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # as in typing, which takes milliseconds to import
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType


class RegisterOnImport:
    """Finds timm as the other finders do; whoever imports it gets our models registered with it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """timm's spec, whose loader imports `ulsam.model.presets` after timm; None for every other module."""
        if name != "timm" or not self._find("ulsam"):  # another environment's Python may have timm without ulsam
            return None
        spec = self._find("timm")
        if not spec or not spec.loader:
            return None
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            import ulsam.model.presets  # noqa: F401

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec

    def _find(self, name: str) -> ModuleSpec | None:
        others = (finder for finder in sys.meta_path if finder is not self)
        return next(filter(None, (finder.find_spec(name, None) for finder in others)), None)


def register_on_import() -> None:
    """Register our models as soon as timm is imported; at once if it is."""
    if "timm" in sys.modules:
        import ulsam.model.presets  # noqa: F401
    sys.meta_path.insert(0, RegisterOnImport())


def run_the_next() -> None:
    """Leave `sys.path`, and run the ``sitecustomize`` that this one hides."""
    import os
    from importlib.machinery import PathFinder

    here = os.path.dirname(__file__)
    sys.path[:] = [folder for folder in sys.path if folder != here]
    spec = PathFinder.find_spec("sitecustomize")
    if spec and spec.loader:
        from importlib.util import module_from_spec

        sys.modules["sitecustomize"] = module = module_from_spec(spec)
        spec.loader.exec_module(module)


if __name__ == "sitecustomize":  # Python's start, not an import from this package
    register_on_import()
    run_the_next()
