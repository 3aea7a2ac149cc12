"""Tables of text for the terminal."""

from collections.abc import Collection, Sequence


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
