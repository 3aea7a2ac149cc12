"""Kill commands that write at random moments, start them again, and compare with a command that nothing happened to."""

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

from tiny import FULL, SETTINGS, Warm, draw_splits, options, warm


def attack(count: int = 100, seed: int = 0, command: str = "") -> tuple[dict[str, Any], list[str]]:
    """``count`` kills, shared out among the commands, or all of one."""
    fell: list[str] = []
    killed: dict[str, int] = {}
    with warm() as interpreter, tempfile.TemporaryDirectory(prefix="ulsam-attack-") as root:
        known = commands(Path(root), interpreter)
        known = {command: known[command]} if command else known
        for turn, (name, (words, resumed, digest)) in enumerate(known.items()):
            share = count // len(known) + (turn < count % len(known))
            killed[name] = _attacked(interpreter, Path(root), name, words, resumed, digest, share, seed, fell)
            print(f"{name}: {killed[name]} kills; fell: {len(fell)}", flush=True)
    return {"kills": killed}, fell


def _attacked(
    interpreter: Warm,
    root: Path,
    name: str,
    words: Callable[[Path], list[str]],
    resumed: Callable[[Path], list[str] | None],
    digest: Callable[[Path], str],
    count: int,
    seed: int,
    fell: list[str],
) -> int:
    """Rounds of kills until there were so many: each round ends with a start that nothing stops."""
    log, chance = root / "log", random.Random(f"{seed} {name}")
    whole = root / f"{name}-whole"
    began = time.monotonic()
    assert interpreter.run(words(whole), log) == 0, log.read_text()
    lasts, expected, kills, rounds = time.monotonic() - began, digest(whole), 0, 0
    while kills < count:
        rounds += 1
        out = root / f"{name}-{rounds}"
        for _ in range(min(count - kills, chance.randint(1, 6))):
            pid = interpreter.start(resumed(out) or words(out), log)
            time.sleep(chance.uniform(0, lasts))
            victim = pid
            if name == "compare" and chance.random() < 0.5:  # one of the processes that train, rather than the parent
                with contextlib.suppress(psutil.Error):
                    victim = chance.choice(psutil.Process(pid).children() or [psutil.Process(pid)]).pid
            ended = interpreter.poll(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
                kills += ended is None
            if ended is None:
                interpreter.ask(wait=pid)
            if ended == 0:
                break
        log.write_text("")
        again = resumed(out) or words(out)
        code = 0 if not again else interpreter.run(again, log)
        if code != 0 and "is finished" not in log.read_text() and "is not an empty folder" not in log.read_text():
            fell.append(f"{name}, round {rounds}: exit {code}: {log.read_text()[-300:]}")
        elif digest(out) != expected:
            fell.append(f"{name}, round {rounds}: another result")
        if parts := [str(path.relative_to(root)) for path in root.rglob("*") if ".part" in path.name]:
            fell.append(f"{name}, round {rounds}: left {parts}")
        shutil.rmtree(out, ignore_errors=True)
    return kills


def commands(root: Path, interpreter: Warm) -> dict[str, Any]:
    """Of each command: its words for an output, the words that resume it, and the digest of its result."""
    data, log = draw_splits(root / "data", train=40, val=5), root / "log"
    model, base = root / "base" / "model.safetensors", {**SETTINGS, "model": "mobilenetv2_035", "epochs": 1}
    assert interpreter.run(["train", str(data), "--out", str(model.parent), *options(base)], log) == 0
    archive = _archive(root / "food-101.tar.gz")

    def rest(out: Path) -> list[str] | None:
        return ["train", "--resume", str(out)] if (out / "config.yaml").exists() else None

    def same(out: Path) -> list[str] | None:
        return None

    def file(out: Path) -> str:
        return _digest([out])

    arms = ["--arm", "base", "--arm", "insert blocks.2 g=4", "--seeds", "1", "--jobs", "2"]
    often = {**SETTINGS, "save_seconds": 0}
    slimmed = {name: value for name, value in often.items() if name != "model"}
    return {
        "train": (lambda out: ["train", str(data), "--out", str(out), *options(FULL)], rest, _run),
        "slim": (
            lambda out: [
                *("slim", str(model), str(data), "--out", str(out), "--params", "0.85"),
                *("--at", "13,14,16,17", *options(slimmed)),
            ],
            same,
            lambda out: _digest([out / "run" / "model.safetensors"]) + _kept(out / "slim.json", "measured", "chosen"),
        ),
        "compare": (
            lambda out: ["compare", str(data), *arms, "--out", str(out), *options(often)],
            same,
            lambda out: (
                _digest(sorted(out.glob("arms/*/*/model.safetensors"))) + _kept(out / "compare.json", "differences")
            ),
        ),
        "prepare": (
            lambda out: ["prepare", "food101", str(archive), str(out)],
            same,
            lambda out: _digest(sorted(path for path in out.rglob("*") if path.is_file()), out),
        ),
        "export": (
            lambda out: ["export", str(model), "--out", str(out.with_suffix(".onnx"))],
            same,
            lambda out: file(out.with_suffix(".onnx")),
        ),
        "birds": (
            lambda out: ["birds", str(out), "--classes", "3", "--train", "12", "--val", "4", "--size", "48"],
            same,
            lambda out: _digest(sorted(path for path in out.rglob("*") if path.is_file()), out),
        ),
    }


def _run(out: Path) -> str:
    return _digest([out / "model.safetensors"]) + _kept(out / "summary.json", "scores")


def _kept(path: Path, *keys: str) -> str:
    return json.dumps([json.loads(path.read_text()).get(key) for key in keys]) if path.exists() else "nothing"


def _digest(paths: list[Path], root: Path | None = None) -> str:
    found = hashlib.sha256()
    for path in paths:
        found.update(str(path.relative_to(root)).encode() if root else b"")
        found.update(path.read_bytes() if path.exists() else b"nothing")
    return found.hexdigest()


def _archive(path: Path) -> Path:
    """Food-101 in small."""
    names = {part: [f"dish{n % 9}/{part}{n}" for n in range(300)] for part in ("train", "test")}
    stream = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(stream, "jpeg")
    with tarfile.open(path, "w:gz") as archive:
        files = {f"food-101/images/{name}.jpg": stream.getvalue() for one in names.values() for name in one}
        lists = {f"food-101/meta/{part}.txt": "\n".join(found).encode() for part, found in names.items()}
        for name, content in {**files, **lists}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path
