"""Run timm's own model tests, unmodified, on the models of this package.

Usage: python scripts/timm_tests.py CHECKOUT [pytest's options ...]

CHECKOUT holds timm's ``tests/test_models.py``: a clone of timm at the installed version, or its unpacked sdist. The
installed timm is tested, not the one in the checkout. Each test that timm runs on our base models (MobileNet-V1
and -V2) runs on each of our models. Tests that download trained weights are left out.
"""

import sys
from pathlib import Path

import pytest
import timm

from ulsam.model.presets import PLACEMENTS

BASES = {base for base, _ in PLACEMENTS.values()}


class OurModels:
    """A pytest plugin that puts our names in the place of timm's."""

    def pytest_report_header(self) -> str:
        """Say which timm is tested."""
        return f"timm {timm.__version__} at {Path(timm.__file__).parent}, {len(PLACEMENTS)} models of ulsam"

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Give a test that timm runs on a base model all our names, before pytest reads the test's own list."""
        if "pretrained" in metafunc.function.__name__:  # downloads
            return
        marks = metafunc.definition.own_markers
        for place, mark in enumerate(marks):
            if mark.name == "parametrize" and mark.args[0] == "model_name":
                names = {str(name).partition(".")[0] for name in mark.args[1]}  # without the tag of the weights
                if BASES & names:
                    marks[place] = pytest.mark.parametrize("model_name", sorted(PLACEMENTS)).mark

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Function]) -> None:
        """Leave out what does not test a model of ours."""
        ours, others = [], []
        for item in items:
            values = item.callspec.params if hasattr(item, "callspec") else {}
            (ours if values.get("model_name") in PLACEMENTS else others).append(item)
        config.hook.pytest_deselected(items=others)
        items[:] = ours


def main() -> int:
    """Run the tests; pytest's exit status."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return 2
    tests = Path(sys.argv[1]).absolute() / "tests" / "test_models.py"
    if not tests.is_file():
        print(f"there is no {tests}; name a checkout of timm, or its unpacked sdist", file=sys.stderr)
        return 2
    return pytest.main([str(tests), "--import-mode=importlib", "-W", "ignore", *sys.argv[2:]], plugins=[OurModels()])


if __name__ == "__main__":
    sys.exit(main())
