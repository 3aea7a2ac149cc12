"""Who may ask: this page alone, under an address of its own. And the headers that limit what browsers do with it."""

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """ASGI middleware: refuses what :func:`refusal` says with status 403, and adds `HEADERS` to every answer."""

    def __init__(self, app: ASGIApp, host: str) -> None:
        self.app, self.host = app, host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        reason = refusal(headers.get("host", ""), headers.get("origin"), self.host)
        answer = JSONResponse({"detail": reason}, 403) if reason else self.app
        await answer(scope, receive, send_with_headers)


def refusal(host: str, origin: str | None, own: str) -> str | None:
    """Why a request is refused; None if it is not.

    A name that leads here may be a stranger's, whose own page could then read this one's answers (DNS rebinding); an
    address or "localhost" cannot be. A page of another address must not ask in its reader's name.

    Args:
        host: the header of that name.
        origin: the header of that name, if there is one: browsers send it with all but plain page views.
        own: the name or address that the server listens on.

    >>> refusal("127.0.0.1:8765", "http://127.0.0.1:8765", "127.0.0.1"), refusal("[::1]:8765", None, "::1")
    (None, None)
    >>> refusal("evil.example:8765", None, "127.0.0.1")
    "this page is not served as 'evil.example': use its address, or start it with --host evil.example"
    >>> refusal("localhost:8765", "http://evil.example", "127.0.0.1")
    'pages of other addresses may not ask here'
    """
    try:
        name = urlsplit(f"//{host}").hostname or ""
        asking = None if origin is None else urlsplit(origin).netloc
    except ValueError:
        return "the Host or Origin header cannot be read"
    if name not in ("localhost", own.lower()) and not _is_address(name):
        return f"this page is not served as {name!r}: use its address, or start it with --host {name}"
    if asking is not None and asking != host:
        return "pages of other addresses may not ask here"
    return None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
