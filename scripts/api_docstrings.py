"""For the API reference of the site: doctests in docstrings as code, and roles such as :func:`ulsam.load` as names.

mkdocs.yml names this file as an extension of griffe, which reads the docstrings.
"""

import re
from typing import Any

import griffe


def markdown(docstring: str) -> str:
    """A docstring as Markdown.

    >>> markdown("It computes::")
    'It computes:'

    >>> markdown("See :func:`ulsam.load`.\\n\\n>>> 1 + 1\\n2").splitlines()
    ['See `ulsam.load`.', '', '```pycon', '>>> 1 + 1', '2', '```']
    """
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", docstring)
    text = re.sub(r"(?m)::$", ":", text)
    return re.sub(r"(?m)^>>> (?:.+\n?)+", lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", text).rstrip()


class Docstrings(griffe.Extension):
    """Changes each docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **options: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
