"""Keep a run once that several published comparisons hold: all files but the first one refer to it.

    python scripts/share_runs.py results

To add new runs to a published comparison: put the folder of runs into today's words if an older version made it, take
over what was published, publish both as one, and share the runs that other comparisons hold too.

    python scripts/migrate_results.py runs/more
    ulsam compare --report-only --from results/birds.jsonl.gz --out runs/more --publish results/birds.jsonl.gz
    python scripts/share_runs.py results
    python benchmarks/tables.py
"""

import json
import sys
from pathlib import Path

from ulsam.base.packed import SUFFIX, read_packed, write_packed


def share(folder: Path) -> None:
    """Rewrite the packed files in a folder, each run in the first of those that hold it."""
    packed = {path: read_packed(path) for path in sorted(folder.glob(f"*{SUFFIX}"))}
    first: dict[tuple[str, str], str] = {}
    for path, files in packed.items():
        holders = {name: first.setdefault((name, json.dumps(value)), path.name) for name, value in files.items()}
        write_packed(path, files, {name: holder for name, holder in holders.items() if holder != path.name})


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    share(Path(sys.argv[1]))
