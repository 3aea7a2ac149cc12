"""Where a model's file is; and the trained models of the package: each a model file and, beside it, its card."""

import os
import re
from pathlib import Path

from ulsam.base.errors import UlsamError

EXPORTED = (".onnx", ".xml", ".pte", ".mlpackage", ".tflite")
"""What files of `ulsam.export` end in; a Core ML package is a folder."""

_FOLDER = Path(__file__).with_name("weights")


def names() -> list[str]:
    """The names by which `ulsam.load`, and every command that takes a model file, know them.

    >>> names() == sorted(names())
    True
    """
    return sorted(path.name.removesuffix(".md") for path in _FOLDER.glob("*.md"))


def locate(model: str | os.PathLike[str]) -> Path:
    """The file that is meant: the package's own for one of :func:`names`, a run's for its folder, else the path itself.

    A file of your own with such a name is meant by ``./NAME``, or by a `Path`.

    Args:
        model: a file, a name, or the folder of `ulsam train` or `ulsam slim`.

    Raises:
        UlsamError: a folder without the model of a run, of none or of several.

    >>> locate("runs/mine/model.safetensors").as_posix()
    'runs/mine/model.safetensors'
    """
    if isinstance(model, str) and model in names():
        return _FOLDER / f"{model}.safetensors"
    path = Path(model)
    if not path.is_dir() or path.suffix in EXPORTED:
        return path
    if file := model_in(path):
        return file
    others = ", ".join(sorted(file.relative_to(path).as_posix() for file in path.glob("*/model.safetensors"))[:3])
    raise UlsamError(f"{path} is a folder without model.safetensors" + (f"; it has {others}" if others else ""))


def model_in(folder: str | os.PathLike[str]) -> Path | None:
    """The model file of a folder of `ulsam train` or `ulsam slim`; None in any other.

    >>> model_in("a folder that is not there")
    """
    path = Path(folder)
    files = (path / "model.safetensors", path / "run" / "model.safetensors")  # of a run; of what `slim` trained
    return next(filter(Path.exists, files), None)


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
