"""Sockets on which services listen."""

import ipaddress
import socket

from ulsam.base.errors import UlsamError


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Args:
        host: name or address.
        port: 0 for any that is free.

    Raises:
        UlsamError: no such host, or a port that is taken, not allowed, or none.

    >>> with listen("127.0.0.1", 0) as taken:
    ...     listen("127.0.0.1", taken.getsockname()[1])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ulsam.base.errors.UlsamError: cannot listen on port ... of 127.0.0.1: address already in use; ...
    """
    if not 0 <= port <= 65535:
        raise UlsamError(f"`port` must be 0 to 65535, not {port}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.create_server(address, family=family)
    except UnicodeError as error:
        raise UlsamError(f"cannot listen on {host}: no name of a host; see `host`") from error
    except socket.gaierror as error:
        raise UlsamError(f"cannot listen on {host}: {str(error.strerror).lower()}; see `host`") from error
    except OSError as error:
        reason = str(error.strerror).partition(" (while attempting")[0].lower()  # to bind, and the address once more
        hint = "name another `port`, or `port=0` for any free one"
        raise UlsamError(f"cannot listen on port {port} of {host}: {reason}; {hint}") from error
    # for its connections, which asyncio leaves as they are: else a body waits up to 40 ms for the header's receipt
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def url(listening: socket.socket) -> str:
    """What a browser calls it.

    >>> with listen("127.0.0.1", 0) as one:
    ...     url(one).rpartition(":")[0]
    'http://127.0.0.1'
    """
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(listening: socket.socket) -> bool:
    """Whether it can be reached from this machine alone.

    >>> with listen("127.0.0.1", 0) as one, listen("0.0.0.0", 0) as other:
    ...     is_loopback(one), is_loopback(other)
    (True, False)
    """
    return ipaddress.ip_address(listening.getsockname()[0]).is_loopback
