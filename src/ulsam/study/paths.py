"""Keep paths of a machine out of what is published."""

import re
import shlex
from collections.abc import Mapping
from pathlib import PureWindowsPath
from typing import Any

#: What a path begins with that is not a plain name: of this system and of Windows.
_START = r"(?:(?:~|\.{0,2})/|[A-Za-z]:[\\/]|(?:~|\.{1,2}|\\)\\)"


def without_paths(value: Any) -> Any:
    """JSON with every path of a machine shortened to its last part, in commands too.

    >>> without_paths({"data": "/home/me/birds", "command": "ulsam compare ../data/birds --out runs/x"})
    {'data': 'birds', 'command': 'ulsam compare birds --out runs/x'}
    >>> without_paths([r"D:\\images\\birds", r"no file C:\\me\\a.jpg: gone"])
    ['birds', 'no file a.jpg: gone']
    """
    if isinstance(value, Mapping):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    if value.startswith("ulsam "):
        return shlex.join(map(without_paths, shlex.split(value)))
    if re.match(_START, value):
        return PureWindowsPath(value).name  # it knows both separators
    return re.sub(rf"(?<![\w.~-]){_START}(?:[^\s'\";:,]*[\\/])?([^\s'\";:,\\/]+)", r"\1", value)
