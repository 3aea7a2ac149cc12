"""The threads that decode images: a bounded number of pixels at once, and an end that waits for none of them for long.

Python's own pool of threads is waited for when the program ends, however long a thread still works.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any


class Readers:
    """Threads of a service that decode images.

    Args:
        threads: how many.
        pixels: of the images that are decoded at once, in all; an image of more has all the threads wait.

    >>> readers = Readers(threads=2, pixels=100)
    >>> readers.submit(len, b"abc").result()
    3
    >>> readers.close(seconds=1)
    """

    def __init__(self, threads: int, pixels: int) -> None:
        self.pixels = pixels
        self._decoding = 0
        self._room = threading.Condition()
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name="reader", daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[..., Any], *args: Any) -> "Future[Any]":
        """Call the function in one of the threads; cancelled before then, it is not called."""
        future: Future[Any] = Future()
        self._jobs.put((future, function, args))
        return future

    def take(self, pixels: int) -> None:
        """Wait until there is room for an image of so many pixels; :meth:`give_back` ends its stay."""
        with self._room:
            self._room.wait_for(lambda: not self._decoding or self._decoding + pixels <= self.pixels)
            self._decoding += pixels

    def give_back(self, pixels: int) -> None:
        """The image of so many pixels is gone."""
        with self._room:
            self._decoding -= pixels
            self._room.notify_all()

    def close(self, seconds: float) -> None:
        """End the threads; those that still work after so many seconds end with the program."""
        end = time.monotonic() + seconds
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _work(self) -> None:
        while job := self._jobs.get():
            future, function, args = job
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*args))
                except BaseException as error:
                    future.set_exception(error)
                    del error
            del job, future, function, args  # an idle thread keeps no image
