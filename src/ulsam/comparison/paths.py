"""Keep paths of a machine out of what is published."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def without_paths(value: Any) -> Any:
    """JSON with every path of a machine shortened to its last part, in commands too.

    >>> without_paths({"data": "/home/me/birds", "command": "ulsam compare ../data/birds --out runs/x"})
    {'data': 'birds', 'command': 'ulsam compare birds --out runs/x'}
    """
    if isinstance(value, Mapping):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    if value.startswith("ulsam "):
        return shlex.join(map(without_paths, shlex.split(value)))
    if re.match(r"(~|\.{0,2})/", value):
        return Path(value).name
    return re.sub(r"(?<![\w.~-])(?:~|\.{0,2})/(?:[^\s'\";:,]*/)?([^\s'\";:,/]+)", r"\1", value)
