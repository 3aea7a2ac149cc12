"""A day of `ulsam serve` in short: a million sound requests over connections that are kept and renewed.

Every answer must be the one expected, and memory, open files and threads must be at the end what they were after the
first hundredth.
"""

import http.client
import random
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from attack_requests import run_clients

from serving import PNG, Reply, Service, form, gray, reply, service
from tiny import TINY_MODEL
from ulsam.deploy.export import export
from ulsam.model.build import build, make_spec

CLIENTS, RENEWED = 8, 500  # requests over one connection


def attack(count: int = 1_000_000, seed: int = 0) -> tuple[dict[str, Any], list[str]]:
    """``count`` requests."""
    fell: list[str] = []
    with tempfile.TemporaryDirectory(prefix="ulsam-attack-") as root:
        spec = make_spec(TINY_MODEL, ("a", "b"), size=32)
        export(build(spec)[0], Path(root) / "model.onnx", spec=spec)
        with service(str(Path(root) / "model.onnx"), folder=Path(root) / "here") as one:
            first = _ask(one, count // 100, seed - 1)
            before = _use(one)
            answers = _ask(one, count - count // 100, seed) + first
            after = _use(one)
    if wrong := {answer: number for answer, number in answers.items() if answer.startswith("not ")}:
        fell.append(f"answers: {wrong}")
    for name in before:
        if after[name] > 1.2 * before[name]:
            fell.append(f"{name}: {before[name]:.0f} before, {after[name]:.0f} after")
    return {"requests": count, "answers": dict(sorted(answers.items())), "before": before, "after": after}, fell


def _ask(one: Service, count: int, seed: int) -> Counter[str]:
    """How often each request was answered as it should be, or with what."""
    predictions = [(gray(value), one.ask("/predict", gray(value)).body["predictions"]) for value in (0, 90, 255)]
    body, headers = form([(f"{number}.png", image) for number, (image, _) in enumerate(predictions)])
    answers: list[Counter[str]] = [Counter() for _ in range(CLIENTS)]

    def client(number: int) -> None:
        chance, connection = random.Random(f"{seed} {number}"), one.connect()
        for turn in range(number, count, CLIENTS):
            if turn // CLIENTS % RENEWED == RENEWED - 1:
                connection.close()
                connection = one.connect()
            image, expected = chance.choice(predictions)
            kind = chance.choices(("image", "form", "health", "metrics", "broken"), (85, 4, 5, 1, 5))[0]
            if kind == "image":
                found = _reply(connection, "/predict", image, PNG)
                right = found.status == 200 and found.body["predictions"] == expected
            elif kind == "form":
                found = _reply(connection, "/predict", body, headers)
                right = found.status == 200
            elif kind == "broken":
                found = _reply(connection, "/predict", image[: len(image) // 2], PNG)
                right = found.status == 422
            else:
                found = _reply(connection, f"/{kind}", None, {})
                right = found.status == 200
            answers[number][kind if right else f"not {kind}: {found.status}"] += 1
        connection.close()

    run_clients(client, CLIENTS)
    return sum(answers, Counter())


def _reply(connection: http.client.HTTPConnection, path: str, body: bytes | None, headers: dict[str, str]) -> Reply:
    connection.request("GET" if body is None else "POST", path, body, headers)
    return reply(connection)


def _use(one: Service) -> dict[str, int]:
    """What the service uses: MB, open files, threads, processes."""
    process = psutil.Process(one.process.pid)
    return {
        "megabytes": round(one.metric("process_resident_memory_bytes") / 1e6),
        "files": process.num_fds(),
        "threads": process.num_threads(),
        "processes": 1 + len(process.children(recursive=True)),
    }
