"""What Prometheus reads at /metrics, of one service: two of them in a process do not mix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ris_core.encodings import Encodings

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The counters of a service.

    inside: tells how many requests are in it. caches: tells the encoded images of each model that is loaded.
    """

    def __init__(self, inside: Callable[[], int], caches: Callable[[], Mapping[str, Encodings]]):
        self.registry = CollectorRegistry()
        self.requests = Counter("ris_requests", "Requests answered.", ["path", "status"], registry=self.registry)
        self.seconds = Histogram(
            "ris_request_seconds",
            "From the first byte to the answer.",
            ["path"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.batches = Histogram(
            "ris_batch_expressions",
            "Expressions answered in one call of a model; the sum is all of them.",
            ["model"],
            buckets=SIZES,
            registry=self.registry,
        )
        ProcessCollector(registry=self.registry)
        self.registry.register(_Now(inside, caches))

    def text(self) -> bytes:
        """Give Prometheus' text format."""
        return generate_latest(self.registry)


class _Now(Collector):
    """What is asked for when Prometheus comes, and counted by nobody before."""

    def __init__(self, inside: Callable[[], int], caches: Callable[[], Mapping[str, Encodings]]):
        self.inside, self.caches = inside, caches

    def collect(self) -> Iterator[Metric]:
        waiting = GaugeMetricFamily("ris_requests_inside", "Requests in the service, waiting or being answered.")
        waiting.add_metric([], self.inside())
        hits = CounterMetricFamily("ris_cache_hits", "Images that were known already.", labels=["model"])
        misses = CounterMetricFamily("ris_cache_misses", "Images that had to be encoded.", labels=["model"])
        held = GaugeMetricFamily("ris_cache_bytes", "Encoded images that are held.", labels=["model"])
        for name, encodings in self.caches().items():
            hits.add_metric([name], encodings.hits)
            misses.add_metric([name], encodings.misses)
            held.add_metric([name], encodings.nbytes)
        yield from (waiting, hits, misses, held)
