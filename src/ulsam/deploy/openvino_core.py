"""OpenVINO's entry point, one for the whole process."""

import functools
from typing import Any


@functools.cache
def openvino_core() -> Any:
    """The process's ``openvino.Core``; it is never freed.

    On Linux the CPU plugin of each core moves the main thread's signal stack to memory of its own, and the end of a
    core puts the one before it back. Of two cores that end in the order of their making, the second one puts back what
    the first has freed, and the next signal, such as Ctrl-C in a training later on, ends the process.

    Raises:
        ImportError: OpenVINO is not installed.
    """
    import openvino

    return openvino.Core()
