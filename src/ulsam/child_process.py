"""``ulsam`` in a process that ends with the one that started it: ``python -m ulsam.child_process LOCK train ...``.

Its standard input is a pipe that only the starting process holds open. When that is closed, on purpose or because the
process is gone, whatever ended it, the run saves and stops as after Ctrl-C. Until its end it holds a lock file.
"""

import os
import signal
import sys
import threading
import time

from filelock import FileLock

from ulsam.cli import main

TIMEOUT = 60.0  # seconds for saving; the second signal stops at once


def _stop_at_the_end_of_input() -> None:
    while os.read(0, 1024):
        pass
    while True:
        signal.raise_signal(signal.SIGTERM)  # os.kill would end the process on Windows
        time.sleep(TIMEOUT)


if __name__ == "__main__":
    threading.Thread(target=_stop_at_the_end_of_input, daemon=True).start()
    with FileLock(sys.argv[1]):
        sys.argv = ["ulsam", *sys.argv[2:]]  # the command that a summary shows
        sys.exit(main(sys.argv[1:]))
