"""Packages that only some commands need: `pip install 'ulsam[EXTRA]'` brings them, pyproject.toml lists them."""

import contextlib
import importlib.util
from collections.abc import Iterator

from ulsam.base.errors import UlsamError, first_line


@contextlib.contextmanager
def extra(name: str, text: str) -> Iterator[None]:
    """Within it packages of an extra are imported; a missing one is reported in one line.

    Args:
        name: of the extra.
        text: what the line begins with, such as ``"ulsam serve needs"``; the package's name follows.

    Raises:
        UlsamError: a package is missing, or does not load.

    >>> with extra("plots", "ulsam demo draws with"):
    ...     import matplotnib
    Traceback (most recent call last):
    ulsam.base.errors.UlsamError: ulsam demo draws with matplotnib, which is not installed: pip install 'ulsam[plots]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise UlsamError(f"{text} {package}, which is not installed: pip install 'ulsam[{name}]'") from error
    except ImportError as error:
        reason = f"a package that does not load ({first_line(error)})"
        raise UlsamError(f"{text} {reason}: pip install 'ulsam[{name}]'") from error


def check_plots(command: str) -> None:
    """Raise unless what ``command`` draws with is installed: to ask before long work.

    Raises:
        UlsamError: it is not.
    """
    with extra("plots", f"{command} draws with"):
        import matplotlib  # noqa: F401


def installed(package: str) -> bool:
    """Whether a package can be imported; it is not.

    >>> installed("torch"), installed("a package that is not there")
    (True, False)
    """
    return importlib.util.find_spec(package) is not None
