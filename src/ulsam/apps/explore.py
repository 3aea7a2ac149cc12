"""Start the page's server, and end it."""

import contextlib
import os
from collections.abc import Callable, Sequence

from ulsam.apps.listening import is_loopback, listen, url
from ulsam.base.errors import UlsamError
from ulsam.base.extras import check_plots, extra


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
        max_mb: largest image file, in megabytes.
        say: is given lines: where the page is.

    Raises:
        UlsamError: not a model file, a model without a feature map to explain, an address that cannot be listened on,
            or FastAPI, uvicorn or matplotlib is not installed.
    """
    check_plots("ulsam explore")
    with extra("explore", "ulsam explore needs"):
        import uvicorn

        from ulsam.apps.explore_page import MEGABYTE, create_app
    from ulsam.apps.explore_models import open_models

    if max_mb < 1:
        raise UlsamError(f"`max_mb` must be 1 or more, not {max_mb}")
    with listen(host, port) as server_socket:
        config = uvicorn.Config(
            create_app(open_models(models), host=host, max_bytes=max_mb * MEGABYTE),
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=64,
            timeout_graceful_shutdown=5,
        )
        say(f"{url(server_socket)}  (Ctrl-C ends it)")
        if not is_loopback(server_socket):
            say("Everyone who can reach this machine can use the page: it asks for no password.")
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn ends its work, and then raises it
            uvicorn.Server(config).run(sockets=[server_socket])
