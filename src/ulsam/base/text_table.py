"""Tables as text: for the terminal, and as CSV."""

import csv
import io
import re
from collections.abc import Collection, Iterable, Sequence


def text_table(cells: Sequence[Sequence[str]], right: Collection[int]) -> list[str]:
    """The lines of a text table: a heading, a rule, and the rest, each column as wide as its widest cell.

    Args:
        cells: a line each, the heading first.
        right: the columns that are flush right.

    >>> print("\\n".join(text_table([["name", "n"], ["a", "10"]], right=[1])))
    name   n
    --------
    a     10
    """
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        pairs = enumerate(zip(line, widths, strict=True))
        lines.append("  ".join(cell.rjust(w) if n in right else cell.ljust(w) for n, (cell, w) in pairs).rstrip())
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def as_csv(rows: Iterable[Sequence[object]]) -> str:
    """Rows as CSV; text that a spreadsheet would take for a formula gets an apostrophe before it.

    Names can be a stranger's: of the arms in a published comparison, or of files.

    >>> print(as_csv([["arm", "top1"], ["=1+1, 2", -0.5]]), end="")
    arm,top1
    "'=1+1, 2",-0.5
    >>> as_csv([[" @sum", "-0.5", "-x", ""]])
    "' @sum,-0.5,'-x,\\n"
    """
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    for row in rows:
        table.writerow([f"'{cell}" if isinstance(cell, str) and _may_be_formula(cell) else cell for cell in row])
    return out.getvalue()


def _may_be_formula(cell: str) -> bool:
    if cell.strip()[:1] not in _FORMULAS and cell[:1] not in _BLANKS:
        return False
    return re.fullmatch(r"[+-]?\d+(\.\d+)?(e[+-]?\d+)?", cell) is None  # a number is none


_FORMULAS = ("=", "+", "-", "@")
_BLANKS = ("\t", "\r", "\n")
