"""Colors and markers of plots."""

from typing import Any


def style(number: int) -> dict[str, Any]:
    """Color and marker of an arm, or of a model, by its number, none like another's below 110; no line of its own.

    >>> len({(shown["marker"], shown["color"]) for shown in map(style, range(110))})
    110
    """
    return {"marker": "os^Dv<>pPX*"[number % 11], "color": f"C{number % 10}", "ls": "none"}
