"""Parts of a data set for cross-validation, by their names."""

import re
import reprlib

from ulsam.base.errors import UlsamError


def parse_fold(text: str) -> tuple[int, int]:
    """K and N of ``K/N``, the Kth of N parts.

    Raises:
        UlsamError: no such part.

    >>> parse_fold("2/5")
    (2, 5)
    """
    found = re.fullmatch(r"(\d{1,4})/(\d{1,4})", text)
    part, parts = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= part <= parts or parts < 2:
        raise UlsamError(f"`fold` is K/N, the Kth of N parts, such as 2/5, not {reprlib.repr(text)}")
    return part, parts
