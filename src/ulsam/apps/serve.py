"""Run a service in this process until it is stopped."""

import asyncio
import contextlib
import logging
import math
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import h11
import numpy as np
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ulsam.apps.listening import is_loopback, listen, url
from ulsam.apps.service import RequestLimit, create_app
from ulsam.apps.service_engine import ServiceEngine
from ulsam.apps.service_limits import Limits
from ulsam.apps.service_metrics import Metrics
from ulsam.base.errors import UlsamError
from ulsam.base.processes import active_stop_signals
from ulsam.deploy.classifier import open_classifier
from ulsam.training.predict import probabilities

if TYPE_CHECKING:
    from torch import nn

    from ulsam.model.spec import ModelSpec

KEY = "ULSAM_API_KEY"
"""The environment variable of the key that clients must give."""

GRACE = 0.5
"""Seconds for requests to arrive on connections that were accepted before the end; then idle ones are closed."""

LAST = 5.0
"""Seconds, beyond a request's time limit, for which the end waits for the requests that are in progress."""


def serve(
    model: "nn.Module | str",
    *,
    spec: "ModelSpec | None" = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    threads: int | None = None,
    device: str | None = None,
    limits: Limits | None = None,
    ready: Callable[[str], None] = print,
) -> int:
    """Answer requests to classify images over HTTP, until SIGTERM or SIGINT.

    Then no connection is taken any more, what is in progress is answered, and the function returns. A second signal
    does what it would without the service. Nothing of a request is written to a file. One process, one model, no state:
    replicas may stand behind any load balancer.

    Args:
        model: a model file, or a model in memory, whose model is folded; or an exported one, which needs no PyTorch.
        spec: of a model in memory, as of `ulsam.load`.
        host: name or address to listen on.
        port: 0 for any that is free.
        api_key: that requests must carry as ``Authorization: Bearer KEY``; required beyond loopback addresses.
        threads: that compute a batch; by default one a core.
        device: that computes it, as of `ulsam.deploy.predict.predict`.
        limits: what is taken at most; by default `Limits()`.
        ready: called with the service's URL as soon as it answers.

    Returns:
        How many requests to name images were answered, refusals included.

    Raises:
        UlsamError: no such model or device; the address cannot be listened on, or is reachable from elsewhere and there
            is no key.

    >>> serve("birds.onnx", host="0.0.0.0", port=0)
    Traceback (most recent call last):
    ulsam.base.errors.UlsamError: 0.0.0.0 can be reached from elsewhere: set ULSAM_API_KEY to the key that is asked for
    """
    limits = limits or Limits()
    if api_key and not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
        raise UlsamError(f"{KEY} must be ASCII letters, digits and signs, without spaces")
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # the sender of a bad form is answered instead
    with listen(host, port) as listening:
        if not (api_key or is_loopback(listening)):
            raise UlsamError(f"{host} can be reached from elsewhere: set {KEY} to the key that is asked for")
        opened = open_classifier(model, spec, threads=threads, folded=True, device=device)
        look = opened.preprocessing
        first = opened.logits(np.zeros((1, *look.size, look.channels), np.uint8))  # which takes longer
        probabilities(first, opened.thresholds)  # raises where they are not finite
        engine = ServiceEngine(opened, limits, Metrics(limits))
        name = Path(model).name if isinstance(model, str) else spec.base if spec else type(model).__name__
        gate = create_app(engine, limits, api_key or None, name)
        asyncio.run(_run(_Server(gate, limits, ready), listening, engine))
    return gate.answered


async def _run(server: "_Server", listening: socket.socket, engine: ServiceEngine) -> None:
    try:
        await server.serve([listening])
    finally:
        await engine.close()


class _Server(uvicorn.Server):
    """Uvicorn's, but a signal ends it with status 0, and requests on open connections get `GRACE` to arrive."""

    def __init__(self, gate: RequestLimit, limits: Limits, ready: Callable[[str], None]) -> None:
        self.gate, self.ready = gate, ready
        config = uvicorn.Config(
            gate,
            http=_Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=limits.idle,
            timeout_graceful_shutdown=math.ceil(limits.timeout + LAST),
        )
        super().__init__(config)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Within it the first signal ends the service; the next one does what it would without the service."""
        before = {number: signal.getsignal(number) for number in active_stop_signals()}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def request_stop(number: int, frame: object) -> None:
            self.should_exit = True
            restore()

        for number in before:
            signal.signal(number, request_stop)
        try:
            yield
        finally:
            restore()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for one in sockets or []:
            self.ready(url(one))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.gate.draining = True
        for server in self.servers:
            server.close()
        await asyncio.sleep(GRACE)
        await super().shutdown(sockets)


class _Connection(H11Protocol):
    """Uvicorn's, but cut when the header of a request, or the taking of its answer, lasts too long.

    Uvicorn's own clock runs from an answer to the next byte alone.
    """

    clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as Uvicorn has it
        super().connection_made(transport)
        self.restart_clock()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.restart_clock()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.restart_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.clock:
            self.clock.cancel()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:  # what is broken came behind the answer, and h11 lets no second one be sent
            self.transport.abort()

    def restart_clock(self) -> None:
        if self.clock:
            self.clock.cancel()
        self.clock = self.loop.call_later(self.timeout_keep_alive, self.time_out)

    def time_out(self) -> None:
        if self.flow.write_paused or self.cycle is None or self.cycle.response_complete:
            self.transport.abort()
