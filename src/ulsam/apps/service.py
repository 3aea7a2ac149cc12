"""The HTTP interface: what may be asked, and what is refused, with which status.

429 is not used: it would ask one client to slow down, and the service does not distinguish clients.
"""

import asyncio
import contextlib
import hmac
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel, Field
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ulsam import __version__
from ulsam.apps.service_body import FORM, UploadedFile, images_sent
from ulsam.apps.service_engine import ServiceEngine
from ulsam.apps.service_limits import Limits
from ulsam.apps.service_metrics import Metrics
from ulsam.base.errors import MachineError, NotFinite
from ulsam.base.markdown import escaped
from ulsam.data.images import UnreadableImage
from ulsam.training.predict import chosen

PREDICT = "/predict"
LINGER = 2.0
"""Seconds for which the rest of a refused body is read: a client that still sends would not see the answer."""

SHOWN = 200
"""Classes that the page lists."""

AGAIN = {"Retry-After": "1"}
"""Header of an answer with status 503: seconds after which to ask again."""


class Class(BaseModel):
    """A class and its probability."""

    name: str
    probability: float = Field(ge=0, le=1)


class Prediction(BaseModel):
    """What one image shows."""

    image: str | None = Field(description="the file's name in the form")
    classes: list[Class] = Field(description="the most probable ones, or the labels that it has, best first")
    error: str | None = Field(description="why the image could not be read")


class Answer(BaseModel):
    """What the images show, in their order."""

    predictions: list[Prediction]


class Problem(BaseModel):
    """Why a request was refused."""

    detail: str


_BINARY = {"schema": {"type": "string", "format": "binary", "minLength": 1}}
_FORM = {
    "schema": {
        "type": "object",
        "properties": {"images": {"type": "array", "minItems": 1, "items": {"type": "string", "format": "binary"}}},
        "required": ["images"],
    }
}
_BODY = {
    "description": "One image file, or a form of them; the names of the form's fields do not matter.",
    "required": True,
    "content": {"image/jpeg": _BINARY, "image/png": _BINARY, "application/octet-stream": _BINARY, FORM: _FORM},
}
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": text}
    for status, text in {
        408: "The request did not arrive in time",
        413: "More bytes or images than the limits allow",
        415: "The body is neither an image nor a form",
        422: "No image could be read, too many pixels included, or top is not valid",
        503: "Too many requests at once, no answer in time, or no memory: any replica may be asked again",
    }.items()
}
_LOCKED: dict[int | str, dict[str, Any]] = {401: {"model": Problem, "description": "No key, or another one"}}


def create_app(engine: ServiceEngine, limits: Limits, api_key: str | None, name: str = "model") -> "RequestLimit":
    """The ASGI application of a service.

    Args:
        engine: that names images.
        name: of the model, for the page.
        limits: what is refused.
        api_key: required as a bearer token for predictions and metrics; None requires none.
    """
    namer = _Namer(engine, limits)
    about = _about(name, namer.classes, limits, locked=api_key is not None)
    app = FastAPIOffline(title=f"ulsam serve: {name}", version=__version__, description=about, redoc_url=None)
    locked = [] if api_key is None else [Depends(_lock(api_key))]
    refusals = {} if api_key is None else _LOCKED
    _add_predictions(app, namer, locked, refusals)
    _add_state(app, engine.metrics, locked, refusals)
    _add_errors(app)
    return RequestLimit(app, engine.metrics, limits)


class _Namer:
    """Names the images of a request.

    Attributes:
        classes: the names as JSON in UTF-8 can hold them.
        top: how many classes an image gets where the request does not say; None: those that reach their thresholds.
    """

    def __init__(self, engine: ServiceEngine, limits: Limits) -> None:
        self.engine, self.limits = engine, limits
        self.classes = [name.encode(errors="replace").decode() for name in engine.model.classes]
        self.top = 3 if engine.model.thresholds is None else None

    async def answer(self, request: Request, top: int | None) -> list[Prediction]:
        """What the images of a request show.

        Raises:
            HTTPException: it does not arrive, or cannot be answered, in time.
        """
        arrived = False
        try:
            async with asyncio.timeout(self.limits.timeout):
                files = await images_sent(request, self.limits)
                arrived = True
                return await asyncio.gather(*(self._named(file, top or self.top) for file in files))
        except TimeoutError as error:
            if arrived:
                raise HTTPException(503, f"no answer within {self.limits.timeout:g} seconds", AGAIN) from error
            raise HTTPException(408, f"the request did not arrive within {self.limits.timeout:g} seconds") from error
        except ClientDisconnect as error:
            raise HTTPException(408, "the client went away") from error

    async def _named(self, file: UploadedFile, top: int | None) -> Prediction:
        images = self.engine.metrics.images
        try:
            shares = await self.engine.probabilities(file.content)
        except UnreadableImage as error:
            images.labels("unreadable").inc()
            return Prediction(image=file.name, classes=[], error=str(error).removeprefix("<stream>: "))
        best = chosen(shares, self.classes, top, self.engine.model.thresholds)
        images.labels("named").inc()
        classes = [Class(name=name, probability=round(share, 6)) for name, share in best]
        return Prediction(image=file.name, classes=classes, error=None)


def _add_predictions(app: FastAPI, namer: _Namer, locked: list[Any], refusals: dict[int | str, dict[str, Any]]) -> None:
    """What the service is for."""

    @app.post(
        PREDICT,
        summary="Classify images",
        openapi_extra={"requestBody": _BODY},
        responses={**_PROBLEMS, **refusals},
        dependencies=locked,
    )
    async def predict(
        request: Request,
        top: Annotated[int | None, Query(ge=1, le=1000, description="classes for each image")] = namer.top,
    ) -> Answer:
        predictions = await namer.answer(request, top)
        if all(prediction.error is not None for prediction in predictions):
            raise HTTPException(422, _reasons(predictions))
        return Answer(predictions=predictions)


def _add_state(app: FastAPI, metrics: Metrics, locked: list[Any], refusals: dict[int | str, dict[str, Any]]) -> None:
    """The page, whether the service is well, and its counters."""

    @app.get("/", include_in_schema=False)
    async def page() -> RedirectResponse:
        return RedirectResponse("docs")

    @app.get("/health", summary="Whether requests are taken")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get(
        "/metrics",
        summary="Counters for Prometheus",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **refusals},
        dependencies=locked,
    )
    async def text() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")


def _add_errors(app: FastAPI) -> None:
    """The statuses of what goes wrong in naming an image."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        detail = "; ".join(f"{one['loc'][-1]}: {one['msg']}" for one in error.errors())
        return JSONResponse({"detail": detail}, 422)

    @app.exception_handler(MachineError)
    async def machine(_: Request, error: MachineError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 503, AGAIN)

    @app.exception_handler(NotFinite)
    async def not_finite(_: Request, error: NotFinite) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 500)


class RequestLimit:
    """Around the application: lets in as many requests at once as the limits allow, and counts them.

    Attributes:
        inside: requests to name images that are in progress.
        answered: those that are not any more.
        draining: whether the service is about to end, so that clients should send no further request on a connection.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, limits: Limits) -> None:
        self.app, self.metrics, self.limits = app, metrics, limits
        self.inside = self.answered = 0
        self.draining = False
        metrics.in_progress.set_function(lambda: self.inside)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's entry, for HTTP alone."""
        watched = _Request(receive, send, self)
        if scope["path"] != PREDICT:
            return await self.app(scope, watched.receive, watched.send)
        start, limit = time.perf_counter(), self.limits.requests
        full = JSONResponse({"detail": f"{limit} requests at once are the most"}, 503, AGAIN)
        taken = self.inside < limit
        self.inside += taken
        try:
            await (self.app if taken else full)(scope, watched.receive, watched.send)
        finally:
            self.inside -= taken
            self.answered += 1
            self.metrics.requests.labels(str(watched.status)).inc()
            self.metrics.seconds.observe(time.perf_counter() - start)


class _Request:
    """The two ends of one request: keeps the status, and reads the rest of a body before it is refused."""

    def __init__(self, receive: Receive, send: Send, gate: RequestLimit) -> None:
        self._receive, self._send, self._gate = receive, send, gate
        self._arrived = False
        self.status = 0

    async def receive(self) -> Message:
        message = await self._receive()
        self._arrived = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LINGER):
                    while not self._arrived:
                        await self.receive()
            if self._gate.draining:
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
        await self._send(message)


def _about(name: str, classes: Sequence[str], limits: Limits, *, locked: bool) -> str:
    """What the page says of the service, in Markdown; who has no key does not learn the classes."""
    key = ' -H "Authorization: Bearer KEY"' if locked else ""
    lines = [
        f"Names what is in images, with the model {escaped(name)}. Try `POST {PREDICT}` below, or send a file:",
        f"```\ncurl{key} -F images=@bird.jpg 'http://HOST:PORT{PREDICT}?top=3'\n```",
        f"At most {limits.images} images a request, {limits.megabytes} MB together.",
    ]
    if not locked:
        more = f" and {len(classes) - SHOWN} more" if len(classes) > SHOWN else ""
        lines.append(f"{len(classes)} classes: {', '.join(map(escaped, classes[:SHOWN]))}{more}.")
    return "\n\n".join(lines)


def _lock(api_key: str) -> Callable[..., Awaitable[None]]:
    """A dependency that raises unless the request has the key."""
    scheme = HTTPBearer(auto_error=False, description="the service's key")

    async def check(given: Annotated[HTTPAuthorizationCredentials | None, Depends(scheme)]) -> None:
        if given is None or not hmac.compare_digest(given.credentials.encode(), api_key.encode()):
            raise HTTPException(401, "the header Authorization: Bearer KEY is required", {"WWW-Authenticate": "Bearer"})

    return check


def _reasons(predictions: Sequence[Prediction]) -> str:
    """Why no image could be read."""
    if len(predictions) == 1:
        return str(predictions[0].error)
    return "; ".join(f"{one.image or f'image {number}'}: {one.error}" for number, one in enumerate(predictions))
