"""A running `ulsam serve` for tests, and what is asked of it."""

import contextlib
import http.client
import io
import json
import resource
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from tiny import command, session

KEY = "correct-horse"
PNG = {"Content-Type": "image/png"}


class Reply(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: Any  # of JSON, or text


def gray(value: int, size: tuple[int, int] = (4, 4)) -> bytes:
    """A PNG file of one value."""
    stream = io.BytesIO()
    Image.new("L", size, value).save(stream, "png")
    return stream.getvalue()


class Service:
    """A running service; `stop` ends it and returns what it printed."""

    def __init__(self, *words: str, folder: Path, **env: str) -> None:
        self.folder = folder
        folder.mkdir()
        limit = (0, resource.RLIM_INFINITY)  # no file can be written, not even one without a name
        self.process = command(
            ["serve", *words, "--port", "0"],
            cwd=folder,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
            env={"TMPDIR": str(folder), "PYTHONDONTWRITEBYTECODE": "1", **env},
        )
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert " at http://127.0.0.1:" in line, self.process.communicate()
        self.port = int(line.split("http://127.0.0.1:")[1].split(",")[0])

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def ask(self, path: str, body: bytes | None = None, headers: dict[str, str] = PNG) -> Reply:
        with contextlib.closing(self.connect()) as connection:
            connection.request("GET" if body is None else "POST", path, body, headers)
            return reply(connection)

    def raw(self, sent: bytes) -> socket.socket:
        """A connection on which these bytes were sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        connection.sendall(sent)
        return connection

    def metric(self, name: str) -> float:
        lines = self.ask("/metrics", headers={"Authorization": f"Bearer {KEY}"}).body.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.split()[0] == name)

    def stop(self, number: int = signal.SIGTERM) -> str:
        self.process.send_signal(number)
        return self.ended()

    def ended(self) -> str:
        """What it said, once it has ended as it should."""
        out, err = self.process.communicate(timeout=60)
        assert (self.process.returncode, err) == (0, "")
        assert session(self.process.pid) == []
        assert list(self.folder.iterdir()) == []
        return out


def reply(connection: http.client.HTTPConnection) -> Reply:
    found = connection.getresponse()
    text = found.read().decode()
    return Reply(found.status, found.headers, json.loads(text) if "json" in found.headers["Content-Type"] else text)


@contextlib.contextmanager
def service(*words: str, folder: Path, **env: str) -> Iterator[Service]:
    one = Service(*words, folder=folder, **env)
    try:
        yield one
        if one.process.returncode is None:
            one.stop()
    finally:
        one.process.kill()


def form(files: list[tuple[str, bytes]]) -> tuple[bytes, dict[str, str]]:
    """The body and headers of a form with these files."""
    parts = [
        f'--cut\r\nContent-Disposition: form-data; name="a"; filename="{name}"\r\n\r\n'.encode() + content + b"\r\n"
        for name, content in files
    ]
    return b"".join([*parts, b"--cut--\r\n"]), {"Content-Type": "multipart/form-data; boundary=cut"}
