"""From a picture's bytes to its probabilities, together with the pictures of other requests.

The pictures are batched by async-batcher, 250 lines on asyncio alone without an open end: it is finished rather than
left. Its younger likes sleep before a batch that is not full, need PyTorch, or have had one release.
"""

import asyncio
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from async_batcher.batcher import AsyncBatcher

from ulsam.data.pictures import Pixels, read_pixels
from ulsam.prediction import Logits, softmax
from ulsam.serving.limits import Limits
from ulsam.serving.metrics import Metrics
from ulsam.serving.nets import Net


class _Batches(AsyncBatcher):  # type: ignore[misc]  # carries no types
    """Whenever the net is free it computes the pictures that wait by then; none waits for more to come."""

    def __init__(self, net: Net, limits: Limits, metrics: Metrics, executor: ThreadPoolExecutor) -> None:
        super().__init__(max_batch_size=limits.batch, max_queue_time=0, executor=executor)
        self.net, self.metrics = net, metrics

    def process_batch(self, batch: Sequence[Pixels]) -> list[Logits]:
        self.metrics.batch.observe(len(batch))
        with self.metrics.net_seconds.time():
            return list(self.net.logits(np.stack(batch)))


class Engine:
    """A net with the threads that decode pictures for it and the one that runs it.

    Args:
        net: to run.
        limits: of batches and pixels.
        metrics: that count batches and pictures.
    """

    def __init__(self, net: Net, limits: Limits, metrics: Metrics) -> None:
        self.net, self.limits, self.metrics = net, limits, metrics
        self._readers = ThreadPoolExecutor(os.cpu_count(), "reader")
        self._runner = ThreadPoolExecutor(1, "net")
        self._batches = _Batches(net, limits, metrics, self._runner)

    async def probabilities(self, content: bytes) -> Logits:
        """Of the classes [classes], for a picture file's bytes.

        Raises:
            UnreadablePicture: it is no picture, damaged, or has too many pixels.
            NotFinite: the net's outputs are not finite.
        """
        loop = asyncio.get_running_loop()
        image = await loop.run_in_executor(self._readers, self._read, content)
        # shielded: the batcher would take a request that was given up for an error of the whole batch
        row: Logits = await asyncio.shield(self._batches.process(image))
        return softmax(row[None])[0]

    async def close(self) -> None:
        """End the threads; nothing may be waiting any more."""
        await self._batches.stop(force=True)
        self._readers.shutdown()
        self._runner.shutdown()

    def _read(self, content: bytes) -> Pixels:
        look = self.net.preprocessing
        return look.crop(read_pixels(io.BytesIO(content), look.reduction, most=self.limits.pixels))
