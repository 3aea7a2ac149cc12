"""The process of one model in one backend, as the process that measures sees it."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

from ulsam.base.errors import UlsamError, printable
from ulsam.base.processes import GROUP, kill_group
from ulsam.deploy.bench_worker import Case


class Process:
    """A process of `ulsam.deploy.bench_worker`, which idles unless it is asked; it ends with the ``with`` statement.

    Attributes:
        size: bytes of the model: its file, or its parameters and buffers in PyTorch.
        peak: the process's largest resident set, in bytes, None on Windows; known after the first call.

    Raises:
        UlsamError: the backend cannot run the model; or its process died, which may be for lack of memory.
    """

    size: int
    peak: int | None

    def __init__(self, name: str, case: Case) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  (closed at exit)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ulsam.deploy.bench_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            encoding="utf-8",
            env={**os.environ, "OMP_NUM_THREADS": str(case.threads)},
            **GROUP,  # Ctrl-C comes to us alone
        )
        try:
            self.size = self._ask(json.dumps(asdict(case)))["bytes"]
        except BaseException:
            self._end()
            raise

    def time(self) -> float:
        """Seconds of one call, after one that is not timed."""
        found = self._ask("")
        self.peak = found["peak"]
        return float(found["seconds"])

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        try:
            print(line, file=self._process.stdin, flush=True)
            text = self._process.stdout.readline()
        except BrokenPipeError:
            text = ""
        found: dict[str, Any] = json.loads(text) if text else {"error": self._last_words()}
        if "error" in found:
            raise UlsamError(f"{self.name}: {found['error']}")
        return found

    def _last_words(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        lines = [line for line in self._log.read().splitlines() if line.strip()]
        how = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
        return printable(": ".join([f"its process ended, {how}", *lines[-1:]]))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        """With the processes that it has started, such as torch.compile's; it has nothing to save."""
        if self._process.poll() is None:
            kill_group(self._process)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            assert stream
            with contextlib.suppress(BrokenPipeError):  # of a line that it did not read
                stream.close()
