"""From an image's bytes to its probabilities, together with the images of other requests."""

import asyncio
import io
import logging
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ulsam.apps.service_limits import Limits
from ulsam.apps.service_metrics import Metrics
from ulsam.apps.service_readers import Readers
from ulsam.base.processes import return_freed_memory
from ulsam.data.images import Pixels, image_pixels, read_pixels
from ulsam.deploy.classifier import Classifier
from ulsam.training.predict import Logits, probabilities

_LOG = logging.getLogger(__name__)

LAST = 2.0
"""Seconds for which the end waits for images that are still being decoded."""

LARGE = 4_000_000
"""Pixels of an image from which on the memory that it took is returned to the system."""


class _Batches:
    """Whenever the model is free it computes the images that wait by then; none waits for more to come.

    async-batcher does this too, but may miss its end: before Python 3.12 `asyncio.wait_for`, which it calls each
    second, drops a cancellation that comes together with a result (https://github.com/python/cpython/issues/86296).
    """

    def __init__(self, model: Classifier, limits: Limits, metrics: Metrics) -> None:
        self.model, self.limits, self.metrics = model, limits, metrics
        self._thread = ThreadPoolExecutor(1, "model")
        self._waiting: deque[tuple[Pixels, asyncio.Future[Logits]]] = deque()
        self._task: asyncio.Task[None] | None = None

    async def logits(self, image: Pixels) -> Logits:
        """Of one image; once given up, it is passed over unless its batch has begun."""
        row = asyncio.get_running_loop().create_future()
        self._waiting.append((image, row))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())
        return await row

    async def close(self) -> None:
        """End after the batch that is being computed; nobody may be waiting any more."""
        if self._task is not None:
            await self._task
        self._thread.shutdown()

    async def _work(self) -> None:
        while batch := self._next():
            images, rows = zip(*batch, strict=True)
            found = await asyncio.get_running_loop().run_in_executor(self._thread, self._logits, images)
            waiting = [number for number, row in enumerate(rows) if not row.done()]
            for number in waiting:
                if isinstance(found, Exception):
                    rows[number].set_exception(found)
                else:
                    rows[number].set_result(found[number])
            if isinstance(found, Exception) and not waiting:
                _LOG.error("a batch failed that nobody waited for any more", exc_info=found)

    def _next(self) -> list[tuple[Pixels, asyncio.Future[Logits]]]:
        batch: list[tuple[Pixels, asyncio.Future[Logits]]] = []
        while self._waiting and len(batch) < self.limits.batch:
            image, row = self._waiting.popleft()
            if not row.done():
                batch.append((image, row))
        return batch

    def _logits(self, images: tuple[Pixels, ...]) -> list[Logits] | Exception:
        """Of each image; or why there are none."""
        self.metrics.batch.observe(len(images))
        try:
            with self.metrics.model_seconds.time():
                found = list(self.model.logits(np.stack(images)))
        except BaseException as error:  # what is no error, or ends a generator, would end the loop's task
            if isinstance(error, Exception) and not isinstance(error, StopIteration):
                return error
            return RuntimeError(f"the model raised {error!r}")
        if len(found) != len(images):
            return ValueError(f"the model gave {len(found)} rows for {len(images)} images")
        return found


class ServiceEngine:
    """A model with the threads that decode images for it and the one that runs it.

    Args:
        model: to run.
        limits: of batches and pixels.
        metrics: that count batches and images.
    """

    def __init__(self, model: Classifier, limits: Limits, metrics: Metrics) -> None:
        self.model, self.limits, self.metrics = model, limits, metrics
        self._readers = Readers(os.cpu_count() or 1, limits.pixels)
        self._batches = _Batches(model, limits, metrics)

    async def probabilities(self, content: bytes) -> Logits:
        """Of the classes [classes], for an image file's bytes.

        Raises:
            UnreadableImage: it is no image, damaged, or has too many pixels.
            NotFinite: the model's outputs are not finite.
        """
        image = await asyncio.wrap_future(self._readers.submit(self._read, content))
        row = await self._batches.logits(image)
        return probabilities(row[None], self.model.thresholds)[0]

    async def close(self) -> None:
        """End the threads; nothing may be waiting any more. An image that is still being decoded is left."""
        await self._batches.close()
        self._readers.close(LAST)

    def _read(self, content: bytes) -> Pixels:
        look, max_pixels = self.model.preprocessing, self.limits.pixels
        pixels = image_pixels(io.BytesIO(content), max_pixels=max_pixels)
        self._readers.take(pixels)
        try:
            return look.crop(
                read_pixels(io.BytesIO(content), look.reduction, max_pixels=max_pixels, channels=look.channels)
            )
        finally:
            if pixels >= LARGE:
                return_freed_memory()
            self._readers.give_back(pixels)
