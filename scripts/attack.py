"""Attack ulsam as strangers and machines do, and write down what it withstood: results/attack.json.

python scripts/attack.py kills --count 100 [--command train]
python scripts/attack.py disk --count 12
python scripts/attack.py images
python scripts/attack.py models --count 400
python scripts/attack.py requests --count 100000
python scripts/attack.py day --count 1000000

Each run replaces its own part of the file. What fell is printed, and the exit status is then 1. SECURITY.md shows the
figures. Linux only.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "results" / "attack.json"
sys.path.insert(0, str(ROOT / "tests"))
PARTS = ("kills", "disk", "images", "models", "requests", "day")


def alone(work: Callable[[], Any], limit: float = 60.0) -> dict[str, Any]:
    """What ``work`` returns in a forked process, how long it took, and by how many MB that process grew at most."""
    reader, writer = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        try:
            found = work()
        except BaseException as error:
            found = f"{type(error).__name__}: {error}"
        seconds = time.process_time() - began
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        writer.send({"found": found, "seconds": seconds, "megabytes": grown})

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    writer.close()
    lost = {"found": "the process died or did not end", "seconds": limit, "megabytes": 0.0, "lost": True}
    try:
        answer: dict[str, Any] = reader.recv() if reader.poll(limit) else lost
    except EOFError:
        answer = lost
    process.kill()
    process.join()
    return answer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--count", type=int, help="kills, crafted files or requests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--command", help="of kills: kill this one alone, and let the figures of the others stand")
    parser.add_argument("--machine", default="", help="what to call this machine")
    args = parser.parse_args()
    attack = importlib.import_module(f"attack_{args.part}").attack
    given = {"count": args.count, "seed": args.seed, "command": args.command}
    result, fell = attack(**{name: value for name, value in given.items() if value})
    known = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if args.command:
        result["kills"] = {**known[args.part]["kills"], **result["kills"]}
        fell = [*known[args.part]["fell"], *fell]
    known[args.part] = {**result, "fell": fell, "machine": args.machine, "cores": os.cpu_count()}
    RESULT.write_text(json.dumps(dict(sorted(known.items())), indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(result, indent=1))
    print(*fell, sep="\n")
    return int(bool(fell))


if __name__ == "__main__":
    sys.exit(main())
