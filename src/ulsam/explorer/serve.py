"""Start the page's server, and end it."""

import contextlib
import ipaddress
import os
import socket
from collections.abc import Callable, Sequence

from ulsam.errors import UlsamError


def serve(
    models: Sequence[str | os.PathLike[str]],
    *,
    host: str = "127.0.0.1",
    port: int = 8765,
    max_mb: int = 20,
    say: Callable[[str], None],
) -> None:
    """Serve the page until Ctrl-C.

    Args:
        models: model files, in the order in which the page shows them.
        host: name or address to listen on; 0.0.0.0 is reached from other machines, too.
        port: 0 takes any free one.
        max_mb: largest picture file, in megabytes.
        say: is given lines: where the page is.

    Raises:
        UlsamError: not a model file, a net without a feature map to explain, an address that cannot be listened on, or
            FastAPI or uvicorn is not installed.
    """
    try:
        import uvicorn

        from ulsam.explorer.app import MEGABYTE, create_app
    except ImportError as error:
        raise UlsamError(f"ulsam explore: {error}; pip install 'ulsam[explore]'") from error
    from ulsam.explorer.nets import open_nets

    if max_mb < 1:
        raise UlsamError(f"--max-mb must be 1 or more, not {max_mb}")
    with listen(host, port) as server_socket:
        config = uvicorn.Config(
            create_app(open_nets(models), host=host, max_bytes=max_mb * MEGABYTE),
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=64,
            timeout_graceful_shutdown=5,
        )
        place, port = server_socket.getsockname()[:2]
        say(f"http://{f'[{host}]' if ':' in host else host}:{port}  (Ctrl-C ends it)")
        if not ipaddress.ip_address(place).is_loopback:
            say("Everyone who can reach this machine can use the page: it asks for no password.")
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn ends its work, and then raises it
            uvicorn.Server(config).run(sockets=[server_socket])


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        UlsamError: no such host, or a port that is taken, not allowed, or none.

    >>> with listen("127.0.0.1", 0) as taken:
    ...     listen("127.0.0.1", taken.getsockname()[1])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ulsam.errors.UlsamError: cannot listen on port ... of 127.0.0.1: address already in use; ...
    """
    if not 0 <= port <= 65535:
        raise UlsamError(f"--port must be 0 to 65535, not {port}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address, family=family)
    except socket.gaierror as error:
        raise UlsamError(f"cannot listen on {host}: {str(error.strerror).lower()}; see --host") from error
    except OSError as error:
        reason = os.strerror(error.errno or 0).lower()  # its own text tells the address once more
        hint = "name another --port, or --port 0 for any free one"
        raise UlsamError(f"cannot listen on port {port} of {host}: {reason}; {hint}") from error
