"""What is said of a lost process changes nothing where there is none, and nothing afterwards."""

import signal

import pytest

from ulsam.base.distributed import lost_processes
from ulsam.base.errors import LostProcess
from ulsam.training.signals import stop_signals


def test_an_error_in_a_single_process_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match=r"^cannot open /data/gloo/images/1\.jpg$"), lost_processes():
        raise RuntimeError("cannot open /data/gloo/images/1.jpg")


def test_a_library_call_leaves_signals_as_they_were() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(LostProcess), stop_signals():
        assert signal.getsignal(signal.SIGTERM) != before
        raise LostProcess("one is gone")
    assert signal.getsignal(signal.SIGTERM) == before
