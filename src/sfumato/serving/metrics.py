"""All metrics, for `GET /metrics` in Prometheus' text format. Every metric's name is in this file.

Events in this process are counted as they happen; the engine's counters and current values are
read on each scrape.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sfumato import __version__
from sfumato.core import EngineStats

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
"""Upper bounds of the histograms: from a health check to a video."""


@dataclass(frozen=True, slots=True)
class Counted:
    """One metric updated as events happen: a histogram of seconds, or a counter if its name ends in `_total`."""

    name: str
    help: str
    labels: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        return "counter" if self.name.endswith("_total") else "histogram"

    def counter(self, registry: CollectorRegistry) -> Counter:
        return Counter(self.name, self.help, self.labels, registry=registry)

    def histogram(self, registry: CollectorRegistry) -> Histogram:
        return Histogram(self.name, self.help, self.labels, registry=registry, buckets=SECONDS)


HTTP = Counted("sfumato_http_requests_total", "HTTP requests answered.", ("route", "method", "status"))
HTTP_SECONDS = Counted(
    "sfumato_http_request_seconds", "Time from a request to the end of its answer.", ("route", "method")
)
WAITED = Counted("sfumato_queue_wait_seconds", "Time a picture waited in the queue.")
DREW = Counted("sfumato_picture_seconds", "Time from a picture's turn to its end.", ("model",))
FAILED = Counted("sfumato_failures_total", "Requests that were accepted but failed.", ("model", "code"))
REJECTED = Counted("sfumato_rejected_total", "Requests that were not accepted.", ("code",))

COUNTED = (HTTP, HTTP_SECONDS, WAITED, DREW, FAILED, REJECTED)


@dataclass(frozen=True, slots=True)
class Moment:
    """Values that are read on each scrape."""

    ready: bool
    queue_depth: int
    running: int
    uptime: float
    stats: EngineStats


@dataclass(frozen=True, slots=True)
class Reading:
    """One metric read from a `Moment`."""

    name: str
    """A counter's name ends in `_total`."""
    help: str
    value: Callable[[Moment], float | Mapping[tuple[str, ...], float]]
    """A number, or one for each combination of label values."""
    labels: tuple[str, ...] = ()

    @property
    def kind(self) -> Literal["counter", "gauge"]:
        return "counter" if self.name.endswith("_total") else "gauge"

    def family(self, moment: Moment) -> Metric:
        cls = CounterMetricFamily if self.kind == "counter" else GaugeMetricFamily
        family = cls(self.name, self.help, labels=self.labels)
        value = self.value(moment)
        for labels, number in value.items() if isinstance(value, Mapping) else [((), value)]:
            family.add_metric(labels, number)
        return family


READINGS = (
    Reading("sfumato_build_info", "Always 1; the label is the version.", lambda now: {(__version__,): 1}, ("version",)),
    Reading("sfumato_uptime_seconds", "Time since this process started.", lambda now: now.uptime),
    Reading("sfumato_ready", "1 if a worker is up and a model file is usable.", lambda now: now.ready),
    Reading("sfumato_queue_depth", "Pictures waiting in the queue.", lambda now: now.queue_depth),
    Reading("sfumato_running_pictures", "Pictures in flight.", lambda now: now.running),
    Reading("sfumato_forwards_total", "Forward passes of heavy modules.", lambda now: now.stats.forwards),
    Reading(
        "sfumato_batch_size_forwards_total",
        "Forward passes of the denoiser, by how many requests shared them.",
        lambda now: {(str(size),): count for size, count in sorted(now.stats.batch_sizes.items())},
        ("size",),
    ),
    Reading(
        "sfumato_unbatched_forwards_total",
        "Forward passes that could not have been batched with any other picture.",
        lambda now: dict(sorted(now.stats.unbatched.items())),
        ("module", "reason"),
    ),
    Reading("sfumato_steps_total", "Total denoising steps of all pictures.", lambda now: now.stats.steps),
    Reading(
        "sfumato_step_seconds_total",
        "Total time of these steps, summed over pictures.",
        lambda now: now.stats.step_seconds,
    ),
    Reading("sfumato_model_loads_total", "Models loaded into memory.", lambda now: now.stats.loads),
    Reading("sfumato_model_evictions_total", "Models unloaded to make room.", lambda now: now.stats.evictions),
    Reading("sfumato_worker_restarts_total", "Workers started to replace a dead one.", lambda now: now.stats.restarts),
    Reading("sfumato_resident_models", "Models in memory.", lambda now: now.stats.resident_models),
    Reading("sfumato_worker_memory_bytes", "Resident memory of the worker.", lambda now: now.stats.memory_bytes),
    Reading(
        "sfumato_device_memory_bytes", "Memory allocated on the accelerator.", lambda now: now.stats.device_memory_bytes
    ),
)


class Metrics:
    """The metrics of one server; two servers in one process share nothing."""

    def __init__(self) -> None:
        self.pictures = 0
        """Pictures drawn so far."""
        self._born = time.monotonic()
        self._registry = registry = CollectorRegistry()
        self._http = HTTP.counter(registry)
        self._http_seconds = HTTP_SECONDS.histogram(registry)
        self._waited = WAITED.histogram(registry)
        self._drew = DREW.histogram(registry)
        self._failed = FAILED.counter(registry)
        self._rejected = REJECTED.counter(registry)
        ProcessCollector(registry=registry)

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count one HTTP request; `route` is a path template, so that their number is finite."""
        self._http.labels(route, method, str(status)).inc()
        self._http_seconds.labels(route, method).observe(seconds)

    def waited(self, seconds: float) -> None:
        """Record how long one picture waited for its turn."""
        self._waited.observe(seconds)

    def drew(self, model: str, seconds: float) -> None:
        """Record how long one picture took from its turn to its end."""
        self.pictures += 1
        self._drew.labels(model).observe(seconds)

    def failed(self, model: str, code: str) -> None:
        """Count a request that was accepted but failed; `code` is the error's."""
        self._failed.labels(model, code).inc()

    def rejected(self, code: str) -> None:
        """Count a request that was not accepted: the queue is full, the key is wrong, ..."""
        self._rejected.labels(code).inc()

    def render(self, *, ready: bool, queue_depth: int, running: int, stats: EngineStats) -> bytes:
        """Everything, as `CONTENT_TYPE`."""
        moment = Moment(ready, queue_depth, running, time.monotonic() - self._born, stats)
        read = CollectorRegistry()
        read.register(_Readings(moment))
        return generate_latest(self._registry) + generate_latest(read)


class _Readings(Collector):
    def __init__(self, moment: Moment) -> None:
        self._moment = moment

    def collect(self) -> Iterator[Metric]:
        return (reading.family(self._moment) for reading in READINGS)
