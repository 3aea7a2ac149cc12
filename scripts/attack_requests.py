"""Broken, slow and many requests against `ulsam serve`: no answer with a status of 500 or more, and memory comes back.

64 clients send requests whose bytes were changed, then 1,500 connections send a byte a second. SIGTERM comes while 64
requests are in flight, some of them of large images, and some that never end.
"""

import contextlib
import io
import random
import signal
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from serving import Service, form, service
from tiny import TINY_MODEL
from ulsam.deploy.export import export
from ulsam.model.build import build, make_spec

CLIENTS, SLOW, TIMEOUT = 64, 1_500, 5
LIMITS = f"--max-requests 200 --timeout {TIMEOUT} --idle 5"


def attack(count: int = 100_000, seed: int = 0) -> tuple[dict[str, Any], list[str]]:
    """``count`` broken requests."""
    fell: list[str] = []
    with tempfile.TemporaryDirectory(prefix="ulsam-attack-") as root:
        spec = make_spec(TINY_MODEL, ("a", "b"), size=32)
        export(build(spec)[0], Path(root) / "model.onnx", spec=spec)
        with service(str(Path(root) / "model.onnx"), *LIMITS.split(), folder=Path(root) / "here") as one:
            sound = _sound(one)
            _broken(one, sound, 2_000, seed - 1)  # what is taken once, at the first requests
            before = _rest(one)
            statuses = _broken(one, sound, count, seed)
            after = _rest(one)
            print(f"broken: {dict(statuses)}; {before:.0f} to {after:.0f} MB", flush=True)
            slow, answered, slowest = _slow(one, sound[0])
            rested = _rest(one)
            ended = _ended(one, sound)
    bad = {status: number for status, number in (statuses + slow).items() if status >= 500 and status != 503}
    if bad:
        fell.append(f"answers: {bad}")
    if max(after, rested) > 1.2 * before:
        fell.append(f"memory: {before:.0f} MB before, {after:.0f} and {rested:.0f} MB after")
    if ended > TIMEOUT + 10:
        fell.append(f"SIGTERM took {ended:.1f} s")
    if answered < 20:
        fell.append(f"only {answered} sound requests were answered beside the slow ones")
    return {
        "requests": count,
        "statuses": {str(status): number for status, number in sorted(statuses.items())},
        "slow": {str(status): number for status, number in sorted(slow.items())},
        "answered_beside_slow": {"requests": answered, "slowest_seconds": round(slowest, 2)},
        "megabytes": {"before": round(before), "after_broken": round(after), "after_slow": round(rested)},
        "sigterm_seconds": round(ended, 1),
    }, fell


def _sound(one: Service) -> list[bytes]:
    """One request of each kind."""
    stored = {}
    for kind in ("PNG", "JPEG", "GIF", "WEBP"):
        stream = io.BytesIO()
        Image.effect_noise((40, 30), 90).convert("RGB").save(stream, kind)
        stored[kind] = stream.getvalue()
    body, headers = form([(f"{kind}.img", content) for kind, content in stored.items()])
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (stored["PNG"][:500], stored["PNG"][500:]))
    return [
        *(_request("/predict", content, f"image/{kind.lower()}") for kind, content in stored.items()),
        _request("/predict?top=2", body, headers["Content-Type"]),
        b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
        + chunks
        + b"0\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /openapi.json HTTP/1.1\r\nHost: a\r\n\r\n",
    ]


def _request(path: str, body: bytes, kind: str) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _changed(sound: list[bytes], chance: random.Random) -> bytes:
    """A request with bytes changed, left out, doubled or put in, in its header more often than in its body."""
    request = bytearray(chance.choice(sound))
    head = request.index(b"\r\n\r\n") + 4
    for _ in range(chance.randint(1, 5)):
        place = chance.randrange(head if chance.random() < 0.6 else len(request))
        match chance.randrange(7):
            case 0:
                request[place] = chance.randrange(256)
            case 1:
                del request[place : place + chance.randrange(1, 40)]
            case 2:
                request[place:place] = request[place : place + chance.randrange(1, 200)]
            case 3:
                request[place:place] = chance.choice(_TOKENS)
            case 4:
                request[place:place] = chance.randbytes(chance.randrange(1, 30))
            case 5:
                request = request[:place]
            case 6:
                line = request.find(b"\r\n", place)
                request[line + 2 : line + 2] = chance.choice(_HEADERS) if line >= 0 else b""
        request = request or bytearray(b"\r\n")
        head = min(head, len(request))
        head = max(1, head)
    return bytes(request)


_TOKENS = (
    b"\0",
    b"\r\n",
    b"\r\n\r\n",
    b"%00",
    b"%ff",
    b"../" * 9,
    b"9" * 4_400,
    b"-1",
    b"\xc2\xb2",
    b"?top=",
    b"&top=2" * 50,
)
_HEADERS = (
    b"Content-Length: 5\r\n",
    b"Content-Length: 99999999999999999999\r\n",
    b"Content-Length: \xb2\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: gzip, chunked\r\n",
    b"Content-Encoding: gzip\r\n",
    b"Content-Type: multipart/form-data\r\n",
    b"Content-Type: multipart/form-data; boundary=\xff\r\n",
    b"Content-Type: multipart/form-data; boundary=" + b"x" * 5_000 + b"\r\n",
    b"Content-Type: image/png; charset=\xff\r\n",
    b"Expect: 100-continue\r\n",
    b"Upgrade: websocket\r\nConnection: upgrade\r\n",
    b"Connection: close\r\n",
    b"Authorization: Bearer \xff\r\n",
    b"Range: bytes=0-\r\n",
    b"a: " + b"b" * 60_000 + b"\r\n",
)


def _broken(one: Service, sound: list[bytes], count: int, seed: int) -> Counter[int]:
    """The statuses of the answers to so many requests; 0 for none."""
    statuses: list[Counter[int]] = [Counter() for _ in range(CLIENTS)]

    def client(number: int) -> None:
        chance = random.Random(f"{seed} {number}")
        for _ in range(number, count, CLIENTS):
            statuses[number][_answer(one, _changed(sound, chance))] += 1

    run_clients(client, CLIENTS)
    return sum(statuses, Counter())


def _answer(one: Service, request: bytes) -> int:
    try:
        with socket.create_connection(("127.0.0.1", one.port), timeout=30) as connection:
            connection.settimeout(1.0)  # the service waits for the rest of what is not whole
            connection.sendall(request)
            line = connection.recv(15)
            return int(line[9:12]) if line.startswith(b"HTTP/1.1 ") else 0
    except ConnectionRefusedError:
        return 599  # as if it were gone: it fell
    except (OSError, ValueError):
        return 0


def run_clients(client: Callable[[int], None], count: int) -> None:
    """Call ``client`` with each number below ``count``, at the same time."""
    threads = [threading.Thread(target=client, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _slow(one: Service, request: bytes) -> tuple[Counter[int], int, float]:
    """Connections of a byte a second: the statuses of their answers, and how sound requests fared beside them."""
    statuses: Counter[int] = Counter()
    answered, slowest, left = 0, 0.0, SLOW
    begun = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
    while left:
        waves: list[tuple[socket.socket, bytes]] = []
        for number in range(min(150, left)):
            connection = socket.create_connection(("127.0.0.1", one.port), timeout=30)
            sent = (request[:90], begun, b"GE")[number % 3]
            connection.sendall(sent)
            waves.append((connection, (b"x", b"1\r\nx\r\n", b"T")[number % 3]))
        left -= len(waves)
        end = time.monotonic() + TIMEOUT + 4
        while time.monotonic() < end:
            for connection, more in waves:
                with contextlib.suppress(OSError):
                    connection.sendall(more)
            began = time.monotonic()
            answered += _answer(one, request) == 200
            slowest = max(slowest, time.monotonic() - began)
            time.sleep(1)
        for connection, _ in waves:
            connection.settimeout(0.2)
            line = b""
            with contextlib.suppress(OSError):
                line = connection.recv(15)
            statuses[int(line[9:12]) if line.startswith(b"HTTP/1.1 ") else 0] += 1
            connection.close()
    return statuses, answered, slowest


def _rest(one: Service) -> float:
    """MB of the service once nothing is in progress."""
    end = time.monotonic() + 60
    while one.metric("ulsam_requests_in_progress") and time.monotonic() < end:
        time.sleep(0.2)
    time.sleep(2)
    return one.metric("process_resident_memory_bytes") / 1e6


def _ended(one: Service, sound: list[bytes]) -> float:
    """Seconds from SIGTERM to the end of the service."""
    stream = io.BytesIO()
    Image.effect_noise((7_000, 5_000), 90).convert("RGB").save(stream, "JPEG", progressive=True)
    large = _request("/predict", stream.getvalue(), "image/jpeg")
    connections = [one.raw(sound[0] if number % 4 else large[: 10**6]) for number in range(CLIENTS)]
    connections += [one.raw(large) for _ in range(4)] + [one.raw(sound[0][:90]) for _ in range(20)]
    one.process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    one.process.wait(timeout=120)
    seconds = time.monotonic() - began
    for connection in connections:
        connection.close()
    one.process.communicate()
    return seconds
