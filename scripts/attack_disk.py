"""Fill the disk at random moments of commands that write; then make room, start again, and compare the results.

Needs root: the disk is one in memory, of 8 MB.
"""

import contextlib
import random
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from attack_kills import commands

from tiny import warm


def attack(count: int = 12, seed: int = 0) -> tuple[dict[str, Any], list[str]]:
    """``count`` times, the commands in turn."""
    fell: list[str] = []
    filled: dict[str, int] = {}
    chance = random.Random(seed)
    with warm() as interpreter, tempfile.TemporaryDirectory(prefix="ulsam-attack-") as root:
        log, disk = Path(root, "log"), Path(root, "disk")
        known = {}
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], check=True)
        try:
            all_commands = commands(Path(root), interpreter)
            for turn in range(count):
                name = list(all_commands)[turn % len(all_commands)]
                words, resumed, digest = all_commands[name]
                if name not in known:
                    began = time.monotonic()
                    assert interpreter.run(words(Path(root, f"{name}-whole")), log) == 0, log.read_text()
                    known[name] = time.monotonic() - began, digest(Path(root, f"{name}-whole"))
                lasts, expected = known[name]
                log.write_text("")
                out = disk / f"out{turn}"
                pid = interpreter.start(words(out), log)
                time.sleep(chance.uniform(0, 0.9 * lasts))
                _fill(disk / "rest")
                code, said = interpreter.ask(wait=pid), log.read_text()
                (disk / "rest").unlink()
                if code not in (0, 2) or "Traceback" in said:
                    fell.append(f"{name}: exit {code}: {said[-300:]}")
                log.write_text("")
                if code and interpreter.run(resumed(out) or words(out), log) != 0:
                    fell.append(f"{name}, started again: {log.read_text()[-300:]}")
                if digest(out) != expected:
                    fell.append(f"{name}: another result")
                filled[name] = filled.get(name, 0) + 1
                print(f"{name}: exit {code}; fell: {len(fell)}", flush=True)
                for path in disk.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        finally:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)
    return {"filled": filled}, fell


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for size in (65_536, 100, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass
