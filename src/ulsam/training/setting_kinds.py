"""Values of settings as the kinds that their annotations name."""

import itertools
import math
import reprlib
import types
from typing import Any, Literal, get_args, get_origin

from ulsam.base.errors import UlsamError

MOMENTUM = 0.9
"""Of optimizers that have one, where none is given."""

_MAX_ENTRIES = 10_000  # of a setting, inner ones included: a few lines of YAML can stand for any number


def checked(name: str, value: Any, kind: Any) -> Any:
    """``value`` as ``kind``; whole numbers pass for floats, and 1e-4, which YAML takes for text, for a number."""
    if isinstance(value, list | tuple | dict) and not _is_small(value):
        raise UlsamError(f"`{name}` has more than {_MAX_ENTRIES} entries")
    origin, choices = get_origin(kind), get_args(kind)
    if origin is Literal:
        if isinstance(value, bool):  # YAML's true and false
            value = str(value).lower()
        if value not in choices:
            raise UlsamError(f"`{name}` must be one of {', '.join(choices)}, not {reprlib.repr(value)}")
        return value
    if origin is types.UnionType:
        return value if value is None or type(value) in choices else checked(name, value, choices[0])
    if origin is list:
        if not isinstance(value, list | tuple):
            raise UlsamError(f"`{name}` must be a list, not {reprlib.repr(value)}")
        return [checked(name, item, choices[0]) for item in value]
    if origin is dict and isinstance(value, dict) and Any not in choices:
        return {checked(name, key, choices[0]): checked(name, item, choices[1]) for key, item in value.items()}
    if origin is dict:
        kind = dict
    if kind is float and isinstance(value, str):
        if is_number(value):
            return float(value)
        raise UlsamError(f"`{name}` must be a number, not {reprlib.repr(value)}")
    if kind is float and type(value) is int:
        return float(value) if is_number(value) else math.inf
    if type(value) is not kind:
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a JSON object"}
        raise UlsamError(f"`{name}` must be {words[kind]}, not {reprlib.repr(value)}")
    return value


def is_number(value: str | int) -> bool:
    try:
        float(value)
    except (ValueError, OverflowError):
        return False
    return True


def _is_small(value: Any) -> bool:
    """Whether a value has at most `_MAX_ENTRIES`, counted as often as they are referred to."""
    waiting, count = [value], 0
    while waiting and count <= _MAX_ENTRIES:
        item = waiting.pop()
        count += 1
        if isinstance(item, list | tuple | dict):
            waiting += itertools.islice(item.values() if isinstance(item, dict) else item, _MAX_ENTRIES)
    return count <= _MAX_ENTRIES
