"""The queue of the service: what waits is computed together, and for how long."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import pytest

from serving import gray
from ulsam.apps.service import create_app
from ulsam.apps.service_engine import ServiceEngine
from ulsam.apps.service_limits import Limits
from ulsam.apps.service_metrics import Metrics
from ulsam.data.preprocessing import Preprocessing

T = TypeVar("T")


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


def played(scene: Callable[[Brightness, ServiceEngine], Awaitable[T]], model: Brightness, batch: int = 4) -> T:
    """What a scene returns, within 20 seconds."""

    async def whole() -> T:
        limits = Limits(batch=batch)
        return await scene(model, ServiceEngine(model, limits, Metrics(limits)))

    return asyncio.run(asyncio.wait_for(whole(), 20))


def test_what_waits_is_computed_together_and_a_request_given_up_harms_no_other():
    async def scene(model: Brightness, engine: ServiceEngine) -> list[Any]:
        tasks = [asyncio.create_task(engine.probabilities(gray(20 * number))) for number in range(10)]
        await queued(10, model, engine)
        tasks[0].cancel()
        tasks[6].cancel()
        model.go.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        await engine.close()
        return found

    model = Brightness()
    found = played(scene, model)
    assert 8 <= sum(model.sizes) <= 10  # of those given up, what had begun is computed
    assert max(model.sizes) == 4
    for number, shares in enumerate(found):
        if number in (0, 6):
            assert isinstance(shares, asyncio.CancelledError)
        else:
            assert shares[1] == pytest.approx(1 / (1 + np.exp(1 - 2 * 20 * number / 255)), abs=1e-4)


async def begun(values: Sequence[int], model: Brightness, engine: ServiceEngine) -> list[asyncio.Task[Any]]:
    """Requests for gray images in this order: the first is a batch of its own, which the model holds."""
    tasks = []
    for number, value in enumerate(values):
        tasks.append(asyncio.create_task(engine.probabilities(gray(value))))
        await queued(number + 1, model, engine)
    return tasks


def test_what_was_given_up_before_its_batch_is_not_computed():
    async def scene(model: Brightness, engine: ServiceEngine) -> None:
        tasks = await begun(range(6), model, engine)  # batches of 1, 4 and 1
        tasks[5].cancel()
        model.go.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.1)
        await engine.close()

    model = Brightness()
    played(scene, model)
    assert model.sizes == [1, 4]


def test_the_service_ends_after_the_batch_that_is_computed():
    async def scene(model: Brightness, engine: ServiceEngine) -> bool:
        tasks = await begun(range(6), model, engine)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        end = asyncio.create_task(engine.close())
        threading.Timer(0.2, model.go.set).start()
        await end
        return model.go.is_set() and engine._batches._task.done()

    model = Brightness()
    assert played(scene, model)
    assert model.sizes == [1]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("model", "reader"))]


@pytest.mark.parametrize(
    "reason", [ValueError("too bright"), MemoryError("too bright"), StopIteration(), SystemExit(3)]
)
def test_a_batch_that_fails_is_an_error_of_its_requests_alone(reason: BaseException):
    class Failing(Brightness):
        def logits(self, images):
            found = super().logits(images)
            if images.max() > 200:
                raise reason
            return found

    async def scene(model: Brightness, engine: ServiceEngine) -> list[Any]:
        tasks = await begun((10, 250, 30, 40), model, engine)  # batches of 1, 2 and 1
        model.go.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        found.append(await engine.probabilities(gray(50)))  # it goes on
        await engine.close()
        assert b"ulsam_batch_images_sum 5.0" in engine.metrics.text()
        return found

    first, *failed, last, after = played(scene, Failing(), batch=2)
    for error in failed:
        assert isinstance(error, type(reason) if isinstance(reason, ValueError | MemoryError) else RuntimeError)
        assert str(error) in ("too bright", f"the model raised {reason!r}")
    for shares, value in ((first, 10), (last, 40), (after, 50)):
        assert shares[1] == pytest.approx(1 / (1 + np.exp(1 - 2 * value / 255)), abs=1e-4)


def test_a_failed_batch_that_was_given_up_is_logged(caplog: pytest.LogCaptureFixture):
    class Failing(Brightness):
        def logits(self, images):
            super().logits(images)
            raise ValueError("out of order")

    async def scene(model: Brightness, engine: ServiceEngine) -> None:
        (task,) = await begun([10], model, engine)
        task.cancel()
        model.go.set()
        with pytest.raises(ValueError, match="out of order"):
            await engine.probabilities(gray(20))
        await engine.close()

    played(scene, Failing())
    (record,) = caplog.records
    assert "out of order" in caplog.text
    assert record.getMessage() == "a batch failed that nobody waited for any more"


def test_rows_that_are_too_few_are_an_error():
    class Short(Brightness):
        def logits(self, images):
            return super().logits(images)[:-1]

    async def scene(model: Brightness, engine: ServiceEngine) -> None:
        model.go.set()
        with pytest.raises(ValueError, match=r"^the model gave 0 rows for 1 images$"):
            await engine.probabilities(gray(20))
        await engine.close()

    played(scene, Short())


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
