"""Ctrl-C works in every test and in every process that a test starts; garbage is collected fast."""

import gc
import signal

# `nohup make test &` in a script ignores it, and what ignores it passes that on.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What is imported by then stays: collections need not look at a million objects again, in every test."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Or extensions complain at the end that their objects are left."""
    gc.unfreeze()
