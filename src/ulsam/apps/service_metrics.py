"""What a service counts, as Prometheus reads it (https://prometheus.io/docs/instrumenting/exposition_formats)."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from ulsam.apps.service_limits import Limits

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """The counters of one service; no label takes a value from a request.

    >>> metrics = Metrics(Limits())
    >>> metrics.requests.labels("200").inc()
    >>> 'ulsam_requests_total{status="200"} 1.0' in metrics.text().decode()
    True
    """

    def __init__(self, limits: Limits) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        powers = [2**power for power in range(limits.batch.bit_length()) if 2**power < limits.batch]
        self.requests = Counter(
            "ulsam_requests", "Requests to name images, by the answer's status", ["status"], registry=self.registry
        )
        self.in_progress = Gauge(
            "ulsam_requests_in_progress", "Requests being received or answered", registry=self.registry
        )
        self.seconds = Histogram(
            "ulsam_request_seconds", "From a request's headers to its answer", buckets=SECONDS, registry=self.registry
        )
        self.images = Counter(
            "ulsam_images", "Images, by whether they could be read", ["outcome"], registry=self.registry
        )
        self.batch = Histogram(
            "ulsam_batch_images",
            "Images that the model computed at once",
            buckets=[*powers, limits.batch],
            registry=self.registry,
        )
        self.model_seconds = Histogram(
            "ulsam_batch_seconds", "The model's time for a batch", buckets=SECONDS, registry=self.registry
        )

    def text(self) -> bytes:
        """All of them, in the text format."""
        return generate_latest(self.registry)
