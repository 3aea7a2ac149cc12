"""The trained models that come with the package: each a model file and, beside it, its card in Markdown."""

import os
import re
from pathlib import Path

from ulsam.base.errors import UlsamError

_FOLDER = Path(__file__).with_name("weights")


def names() -> list[str]:
    """The names by which `ulsam.load`, and every command that takes a model file, know them.

    >>> names() == sorted(names())
    True
    """
    return sorted(path.name.removesuffix(".md") for path in _FOLDER.glob("*.md"))


def locate(model: str | os.PathLike[str]) -> Path:
    """The file that is meant: the package's own for one of :func:`names`, otherwise the path itself.

    A file of your own with such a name is meant by ``./NAME``, or by a `Path`.

    >>> locate("runs/mine/model.safetensors").as_posix()
    'runs/mine/model.safetensors'
    """
    return _FOLDER / f"{model}.safetensors" if isinstance(model, str) and model in names() else Path(model)


def card(name: str) -> str:
    """What the trained model ``name`` was made from, how, how good it is, and what it is not for: Markdown.

    Raises:
        UlsamError: no trained model of this name comes with the package.

    >>> card("mobilenet")
    Traceback (most recent call last):
    ulsam.base.errors.UlsamError: no trained model 'mobilenet' comes with the package: see ulsam.model.trained.names()
    """
    if name not in names():
        raise UlsamError(f"no trained model {name!r} comes with the package: see ulsam.model.trained.names()")
    text = (_FOLDER / f"{name}.md").read_text(encoding="utf-8")
    return re.sub(r"<!--.*?-->\n", "", text)  # marks of a table that is written from results
