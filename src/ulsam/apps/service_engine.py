"""From an image's bytes to its probabilities, together with the images of other requests.

The images are batched by async-batcher, 250 lines on asyncio alone without an open end: it is finished rather than
left. Its younger likes sleep before a batch that is not full, need PyTorch, or have had one release.
"""

import asyncio
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from async_batcher.batcher import AsyncBatcher

from ulsam.apps.service_limits import Limits
from ulsam.apps.service_metrics import Metrics
from ulsam.apps.service_readers import Readers
from ulsam.base.processes import return_freed_memory
from ulsam.data.images import Pixels, image_pixels, read_pixels
from ulsam.deploy.classifier import Classifier
from ulsam.training.predict import Logits, probabilities

LAST = 2.0
"""Seconds for which the end waits for images that nobody waits for any more."""

LARGE = 4_000_000
"""Pixels of an image from which on the memory that it took is returned to the system."""


class _Batches(AsyncBatcher):  # type: ignore[misc]  # carries no types
    """Whenever the model is free it computes the images that wait by then; none waits for more to come."""

    def __init__(self, model: Classifier, limits: Limits, metrics: Metrics, executor: ThreadPoolExecutor) -> None:
        super().__init__(max_batch_size=limits.batch, max_queue_time=0, executor=executor)
        self.model, self.metrics = model, metrics

    def process_batch(self, batch: Sequence[Pixels]) -> list[Logits]:
        self.metrics.batch.observe(len(batch))
        with self.metrics.model_seconds.time():
            return list(self.model.logits(np.stack(batch)))


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
        self._runner = ThreadPoolExecutor(1, "model")
        self._batches = _Batches(model, limits, metrics, self._runner)

    async def probabilities(self, content: bytes) -> Logits:
        """Of the classes [classes], for an image file's bytes.

        Raises:
            UnreadableImage: it is no image, damaged, or has too many pixels.
            NotFinite: the model's outputs are not finite.
        """
        image = await asyncio.wrap_future(self._readers.submit(self._read, content))
        # shielded: the batcher would take a request that was given up for an error of the whole batch
        row: Logits = await asyncio.shield(self._batches.process(image))
        return probabilities(row[None], self.model.thresholds)[0]

    async def close(self) -> None:
        """End the threads; nothing may be waiting any more. An image that is still being decoded is left."""
        await self._batches.stop(force=True)
        self._readers.close(LAST)
        self._runner.shutdown()

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
