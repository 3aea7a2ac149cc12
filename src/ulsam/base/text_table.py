"""Tables as text: for the terminal, and as CSV."""

import csv
import io
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
    """
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    for row in rows:
        table.writerow([f"'{cell}" if isinstance(cell, str) and cell[:1] in _FORMULAS else cell for cell in row])
    return out.getvalue()


_FORMULAS = ("=", "+", "-", "@", "\t", "\r")
