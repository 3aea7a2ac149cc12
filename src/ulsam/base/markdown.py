"""Text for Markdown."""

import re
import string

_SIGNS = re.compile(f"[{re.escape(string.punctuation)}]")


def escaped(text: str) -> str:
    r"""A text, on one line, that Markdown shows as it is: not as markup, HTML or a link.

    Every ASCII sign gets a backslash, as CommonMark allows for each of them. Other signs mean nothing there.

    >>> escaped("a_b <i>\nwww.x.org"), escaped("9 × 9")
    ('a\\_b \\<i\\> www\\.x\\.org', '9 × 9')
    """
    return _SIGNS.sub(r"\\\g<0>", " ".join(text.split()))
