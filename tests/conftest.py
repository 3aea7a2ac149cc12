"""What holds for every test and every process that a test starts."""

import gc
import logging
import os
import random
import signal
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from tiny import Warm, warm

LONGEST = [
    *("train", "train_options", "train_resume", "slimming", "slimming_damage", "slimming_choice", "compare"),
    *("compare_runs", "portable", "resume", "resume_processes", "other_tools", "other_exporters", "timm_scripts"),
]

# A user's choice of the backend is none of the tests': they choose themselves.
os.environ.pop("ULSAM_BACKEND", None)
# Where there are no kernels each process says so; what it says has tests of its own.
os.environ["PYTHONWARNINGS"] = "ignore:ULSAM runs in plain PyTorch:RuntimeWarning"

# A log is complete without it.
os.environ.pop("PYTHONUNBUFFERED", None)

# A module for the start of other processes: imported here, it takes names away from this one.
collect_ignore = ["windows"]

# Ctrl-C works, and so does the end of a terminal. `nohup make test &` in a script ignores both, and what ignores them
# passes that on.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


# A machine may be slow, or emulated.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the files that take longest, so that two workers end together (with `--no-loadscope-reorder`)."""
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_runtest_setup() -> None:
    """What a test draws is the same whichever tests ran before it, so that none fails by chance."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_collection_finish() -> None:
    """What is imported by then stays: collections need not look at a million objects again, in every test."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Or extensions complain at the end that their objects are left."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Warm]:
    """Starts the command line without the seconds that importing torch takes."""
    with warm() as one:
        yield one


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """What the library has logged since the last call, a line each."""
    caplog.set_level(logging.INFO, logger="ulsam")

    def lines() -> str:
        text = "".join(f"{message}\n" for message in caplog.messages)
        caplog.clear()
        return text

    return lines
