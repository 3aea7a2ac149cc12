"""The files that options name to be written: checked before the work, so that nothing that is read is lost."""

import argparse
import os
from collections.abc import Iterable

from ulsam.base.errors import UlsamError
from ulsam.base.files import check_writable

ENDINGS = {
    "csv": (".csv",),
    "parquet": (".parquet",),
    "features": (".npz", ".csv"),
    "confusion": (".png",),
    "sheet": (".png",),
}


def check_written(args: argparse.Namespace, read: Iterable[str | None]) -> None:
    """Check every file of `ENDINGS` that is named.

    Args:
        args: of the command; the options that it has not are passed over.
        read: the files and folders that the command reads.

    Raises:
        UlsamError: a name with another ending, two of one name, a file that is read or an image in a folder that is, or
            one that cannot be written.

    >>> check_written(argparse.Namespace(csv="found.csv", features=None), ["model.safetensors", "images"])
    """
    named = {option: file for option in ENDINGS if (file := getattr(args, option, None))}
    inputs = [os.path.realpath(path) for path in read if path]
    seen: dict[str, str] = {}
    for option, file in named.items():
        if not file.lower().endswith(ENDINGS[option]):
            names = " or ".join(f"NAME{ending}" for ending in ENDINGS[option])
            raise UlsamError(f"--{option} writes {names}, not {file}")
        place = os.path.realpath(file)
        if place in seen:
            raise UlsamError(f"--{option} and --{seen[place]} name the same file, {file}: name two")
        seen[place] = option
        inside = file.lower().endswith(".png") and os.path.exists(file)
        if place in inputs or (inside and any(place.startswith(os.path.join(folder, "")) for folder in inputs)):
            raise UlsamError(f"--{option} would replace {file}, which is read: name another file")
        check_writable(file)
