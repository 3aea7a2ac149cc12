"""The queue of the service: what waits is computed together, and for how long."""

import asyncio
import json
import threading
from typing import Any

import numpy as np
import pytest

from serving import gray
from ulsam.apps.service import create_app
from ulsam.apps.service_engine import ServiceEngine
from ulsam.apps.service_limits import Limits
from ulsam.apps.service_metrics import Metrics
from ulsam.data.preprocessing import Preprocessing


class Brightness:
    """A model of two outputs that holds its first batch until it is let go, and keeps the sizes of its batches."""

    classes = ("dark", "light")
    preprocessing = Preprocessing((4, 4), "nearest", 1.0, (0.5,) * 3, (0.5,) * 3)
    thresholds = None

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.go = threading.Event()

    def logits(self, images):
        self.sizes.append(len(images))
        assert self.go.wait(20)
        light = images.mean((1, 2, 3)) / 255
        return np.stack([1 - light, light], 1).astype(np.float32)


async def queued(tasks: int, model: Brightness, engine: ServiceEngine) -> None:
    """Return once so many requests are decoded, and wait for the model or are computed."""
    while not model.sizes or len(engine._batches._waiting) + sum(model.sizes) < tasks:
        await asyncio.sleep(0.01)


def test_what_waits_is_computed_together_and_a_request_given_up_harms_no_other():
    async def scene() -> tuple[list[int], list[Any]]:
        model, limits = Brightness(), Limits(batch=4)
        engine = ServiceEngine(model, limits, Metrics(limits))
        tasks = [asyncio.create_task(engine.probabilities(gray(20 * number))) for number in range(10)]
        await queued(10, model, engine)
        tasks[0].cancel()
        tasks[6].cancel()
        model.go.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        await engine.close()
        return model.sizes, found

    sizes, found = asyncio.run(asyncio.wait_for(scene(), 20))
    assert 8 <= sum(sizes) <= 10  # of those given up, what had begun is computed
    assert max(sizes) == 4
    for number, shares in enumerate(found):
        if number in (0, 6):
            assert isinstance(shares, asyncio.CancelledError)
        else:
            assert shares[1] == pytest.approx(1 / (1 + np.exp(1 - 2 * 20 * number / 255)), abs=1e-4)


def test_the_service_ends_while_what_was_given_up_still_waits():
    async def scene() -> list[int]:
        model, limits = Brightness(), Limits(batch=4)
        engine = ServiceEngine(model, limits, Metrics(limits))
        tasks = []
        for number in range(6):  # one after another: batches of 1, 4 and 1
            tasks.append(asyncio.create_task(engine.probabilities(gray(number))))
            await queued(number + 1, model, engine)
        tasks[5].cancel()
        model.go.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        await engine.close()
        return model.sizes

    assert asyncio.run(asyncio.wait_for(scene(), 20)) == [1, 4]


def test_a_batch_that_fails_is_an_error_of_its_requests_alone():
    class Failing(Brightness):
        def logits(self, images):
            found = super().logits(images)
            if images.max() > 200:
                raise ValueError("too bright")
            return found

    async def scene() -> list[Any]:
        model, limits = Failing(), Limits(batch=2)
        engine = ServiceEngine(model, limits, Metrics(limits))
        tasks = []
        for number, value in enumerate((10, 250, 30, 40)):  # batches of 1, 2 and 1
            tasks.append(asyncio.create_task(engine.probabilities(gray(value))))
            await queued(number + 1, model, engine)
        model.go.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        found.append(await engine.probabilities(gray(50)))  # it goes on
        await engine.close()
        return found

    first, *failed, last, after = asyncio.run(asyncio.wait_for(scene(), 20))
    assert [str(error) for error in failed] == ["too bright", "too bright"]
    for shares, value in ((first, 10), (last, 40), (after, 50)):
        assert shares[1] == pytest.approx(1 / (1 + np.exp(1 - 2 * value / 255)), abs=1e-4)


def test_no_answer_in_time_is_a_503_that_says_when_to_come_back():
    async def scene() -> tuple[list[dict[str, Any]], bytes]:
        model, limits = Brightness(), Limits(timeout=0.2)
        engine = ServiceEngine(model, limits, Metrics(limits))
        app = create_app(engine, limits, None)
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": gray(9), "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"", "http_version": "1.1"}
        await app({**scope, "headers": [(b"content-type", b"image/png")]}, receive, send)
        model.go.set()
        await engine.close()
        return sent, engine.metrics.text()

    (start, body), metrics = asyncio.run(scene())
    assert start["status"] == 503
    assert (b"retry-after", b"1") in start["headers"]
    assert json.loads(body["body"]) == {"detail": "no answer within 0.2 seconds"}
    assert b'ulsam_requests_total{status="503"} 1.0' in metrics
