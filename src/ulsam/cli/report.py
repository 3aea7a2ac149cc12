"""`ulsam report RUNS...`: one page about one or several runs."""

import argparse
from pathlib import Path

from ulsam.base.errors import printable
from ulsam.cli.common import free_folder, print_json

EXAMPLE = "ulsam report runs/base runs/mine --out runs/report.html"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="folders of ulsam train; the others are compared with the first"
    )
    parser.add_argument("--out", metavar="FILE", help="the page (default: runs/report-N/report.html)")
    parser.add_argument("--replace", action="store_true", help="replace the file if it exists")
    parser.add_argument("--data", metavar="DIR", help="where the images lie now (default: where the runs say)")
    parser.add_argument(
        "--no-images",
        dest="images",
        action="store_false",
        help="run no model: figures and curves alone, without confusions",
    )
    parser.add_argument("--time", action="store_true", help="time the models, too, on a machine without other work")


def run(args: argparse.Namespace) -> None:
    """Write the page, and say where it is."""
    from ulsam.explanation.run_report import report_runs

    out = Path(args.out) if args.out else free_folder("report") / "report.html"
    written = report_runs(args.runs, out, data=args.data, images=args.images, time=args.time, replace=args.replace)
    if args.json:
        runs = [{"key": one.key, "folder": one.folder, "line": one.line} for one in written.runs]
        print_json({"page": written.page, "runs": runs, "notes": written.notes})
        return
    for one in written.runs:
        print(f"{one.key}       {printable(one.line)}")
    for note in written.notes:
        print(f"note    {printable(note)}")
    print(f"report  {printable(str(written.page))}")
