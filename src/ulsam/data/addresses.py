"""Images by their address on the web: fetched whole, within limits of bytes and time."""

import contextlib
import http.client
import io
import time
import urllib.error
import urllib.request
from typing import TypeGuard

from ulsam.base.errors import first_line
from ulsam.data.images import UnreadableImage

MAX_FETCHED = 100_000_000
"""Bytes of the largest image that is fetched."""

TIMEOUT = 30.0
"""Seconds within which a whole image must have come."""

_AGENT = {"User-Agent": "ulsam"}  # some servers refuse the default one of Python


class Fetched(io.BytesIO):
    """The content of an address; messages call it by the address."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self.name = name


def is_address(name: object) -> TypeGuard[str]:
    """Whether an image is meant by its address.

    >>> is_address("https://example.org/wren.jpg"), is_address("wren.jpg")
    (True, False)
    """
    return isinstance(name, str) and name.lower().startswith(("http://", "https://"))


def fetch(address: str) -> Fetched:
    """The image file at an address.

    Raises:
        UnreadableImage: the server refuses or cannot be reached, or the file is too large or too slow.

    >>> fetch("https:///wren.jpg")
    Traceback (most recent call last):
    ulsam.data.images.UnreadableImage: https:///wren.jpg: cannot be fetched: no host given
    """
    end = time.monotonic() + TIMEOUT
    try:
        request = urllib.request.Request(address, headers=_AGENT)
        with contextlib.closing(urllib.request.urlopen(request, timeout=TIMEOUT / 3)) as answer:
            content = bytearray()
            while part := answer.read1(1 << 20):
                content += part
                if len(content) > MAX_FETCHED:
                    raise UnreadableImage(f"{address}: larger than {MAX_FETCHED} bytes, the most that is fetched")
                if time.monotonic() > end:
                    raise UnreadableImage(f"{address}: not whole after {TIMEOUT:g} s")
            if answer.length:
                raise UnreadableImage(f"{address}: the connection ended {answer.length} bytes too early")
    except urllib.error.HTTPError as error:
        raise UnreadableImage(f"{address}: the server answers {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:  # a ValueError: what is no address
        reason = getattr(error, "reason", error)
        said = getattr(reason, "strerror", None) or first_line(reason)
        raise UnreadableImage(f"{address}: cannot be fetched: {said}") from error
    return Fetched(bytes(content), address)
