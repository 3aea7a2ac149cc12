"""The page's server: three static files, and two questions about an uploaded image. It writes no file."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi import Path as PathParameter
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from ulsam.apps.explore_guard import Guard
from ulsam.apps.explore_models import ExploredModel, explain_upload, gray_image
from ulsam.apps.explore_views import about, panel_png, view
from ulsam.base.errors import UlsamError, printable
from ulsam.explanation.explanation import Explanation

MEGABYTE = 10**6
PLACES = 4
"""Images that are taken in at a time: one that is looked at, the others waiting or on their way."""

TIMEOUT = 30.0
"""Seconds that an upload may take."""

_FILES = {
    "/": ("explore_page.html", "text/html"),
    "/page.css": ("explore_page.css", "text/css"),
    "/page.js": ("explore_page.js", "text/javascript"),
}
_LONGEST_NAME = 200

T = TypeVar("T")


def create_app(
    models: Sequence[ExploredModel],
    *,
    host: str = "127.0.0.1",
    max_bytes: int = 20 * MEGABYTE,
    timeout: float = TIMEOUT,
) -> FastAPI:
    """The server as an ASGI application, whose models have seen a first image.

    ``POST /explain`` takes an image file as its body, with its name as ``?name=``, and answers what
    :func:`ulsam.apps.explore_views.view` says. ``POST /panel/0`` answers the PNG panel of the first model, beside the
    next one. Refusals have a status and ``{"detail": a line}``: 403 another host or origin, 408 too slow, 413 too
    large, 422 no image, 429 too many at a time.

    Args:
        models: of :func:`ulsam.apps.explore_models.open_models`.
        host: that the server listens on, and may be called by, besides "localhost" and addresses.
        max_bytes: of an image file.
        timeout: seconds in which an image file must have arrived.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # FastAPI's pages load scripts from elsewhere
    app.add_middleware(Guard, host=host)
    desk = _ExplainQueue(models, max_bytes, timeout)
    for path, (name, kind) in _FILES.items():
        app.add_api_route(path, _file(Path(__file__).with_name(name).read_bytes(), kind), methods=["GET"])

    @app.get("/models")
    def describe() -> dict[str, Any]:
        return about(models, max_bytes)

    @app.post("/explain")
    async def explain(request: Request, name: str = "image") -> Response:
        return await desk.ask(request, name, lambda found: JSONResponse(view(found)))

    @app.post("/panel/{number}")
    async def draw(
        request: Request, number: Annotated[int, PathParameter(ge=0, lt=len(models))], name: str = "image"
    ) -> Response:
        def png(explanations: Sequence[Explanation]) -> Response:
            drawn = panel_png(models, explanations, number, printable(name[:_LONGEST_NAME]))
            return Response(drawn, media_type="image/png")

        return await desk.ask(request, name, png)

    @app.exception_handler(UlsamError)
    async def refuse(request: Request, error: UlsamError) -> Response:
        return JSONResponse({"detail": str(error)}, 422)

    @app.exception_handler(ClientDisconnect)
    async def give_up(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=400)  # which nobody is there to read

    return app


class _ExplainQueue:
    """Takes in a few images at a time, and has the models look at them one after the other.

    They do so in one thread: a model must not be explained twice at a time, and PyTorch has helpers for each thread
        that calls it, which are slow to start.
    """

    def __init__(self, models: Sequence[ExploredModel], max_bytes: int, timeout: float) -> None:
        self.models, self.max_bytes, self.timeout = models, max_bytes, timeout
        self.places = asyncio.Semaphore(PLACES)
        self.thread = ThreadPoolExecutor(1)
        self.thread.submit(
            self.work, gray_image(), "gray", lambda found: (view(found), panel_png(models, found, 0, ""))
        ).result()

    async def ask(self, request: Request, name: str, answer: Callable[[Sequence[Explanation]], T]) -> T:
        """Have the image in the body explained, and the explanations made an answer of."""
        if self.places.locked():
            await self.body(request, keep=False)  # a browser that is still sending would not hear the answer
            raise HTTPException(
                429, f"{PLACES} images are being looked at: try again in a moment", {"Retry-After": "1"}
            )
        async with self.places:
            content = await self.body(request)
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self.thread, self.work, content, name[:_LONGEST_NAME], answer)

    def work(self, content: bytes, name: str, answer: Callable[[Sequence[Explanation]], T]) -> T:
        return answer(explain_upload(self.models, content, name))

    async def body(self, request: Request, *, keep: bool = True) -> bytes:
        """The body, whole, or read and forgotten; of too large a one some is read on, for its sender to hear so."""
        content, size = bytearray(), 0
        try:
            async with asyncio.timeout(self.timeout):
                async for part in request.stream():
                    size += len(part)
                    if size > 2 * self.max_bytes:
                        break
                    if keep and size <= self.max_bytes:
                        content += part
        except TimeoutError:
            raise HTTPException(408, f"the upload took more than {self.timeout:g} seconds") from None
        if size > self.max_bytes:
            limit = f"{self.max_bytes / MEGABYTE:g} MB"
            raise HTTPException(413, f"the file is larger than {limit}, the most that is taken (see --max-mb)")
        return bytes(content)


def _file(content: bytes, kind: str) -> Callable[[], Response]:
    def answer() -> Response:
        return Response(content, media_type=kind)

    return answer
