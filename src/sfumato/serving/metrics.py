"""All metrics, for `GET /metrics` in Prometheus' text format. Every metric's name is in this file.

Events in this process are counted as they happen; the engine's counters and current values are
read on each scrape.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sfumato import __version__
from sfumato.engine.protocol import DeviceState

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
"""Upper bounds of the histograms: from a health check to a video."""


@dataclass(frozen=True, slots=True)
class EventMetric:
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


HTTP = EventMetric("sfumato_http_requests_total", "HTTP requests answered.", ("route", "method", "status"))
HTTP_SECONDS = EventMetric(
    "sfumato_http_request_seconds", "Time from a request to the end of its answer.", ("route", "method")
)
QUEUE_WAIT = EventMetric("sfumato_queue_wait_seconds", "Time a picture waited in the queue.", ("priority",))
PICTURE_SECONDS = EventMetric(
    "sfumato_picture_seconds", "Time from a picture's turn to its end.", ("model", "priority")
)
FAILED = EventMetric("sfumato_failures_total", "Requests that were accepted but failed.", ("model", "code"))
REJECTED = EventMetric("sfumato_rejected_total", "Requests that were not accepted.", ("code",))

EVENT_METRICS = (HTTP, HTTP_SECONDS, QUEUE_WAIT, PICTURE_SECONDS, FAILED, REJECTED)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Values that are read on each scrape."""

    ready: bool
    queue_depth: Mapping[str, int]
    """Priority → pictures."""
    running: Mapping[str, int]
    uptime: float


Values: TypeAlias = float | Mapping[tuple[str, ...], float]
"""A number, or one for each combination of label values."""


@dataclass(frozen=True, slots=True)
class _Read:
    """A metric that is read on each scrape."""

    name: str
    """A counter's name ends in `_total`."""
    help: str

    @property
    def kind(self) -> Literal["counter", "gauge"]:
        return "counter" if self.name.endswith("_total") else "gauge"


@dataclass(frozen=True, slots=True)
class SnapshotMetric(_Read):
    """One metric read from a `Snapshot`."""

    value: Callable[[Snapshot], Values]
    labels: tuple[str, ...] = ()

    def family(self, snapshot: Snapshot) -> Metric:
        return _family(self, self.labels, {(): self.value(snapshot)})


@dataclass(frozen=True, slots=True)
class DeviceMetric(_Read):
    """One metric read of each device. If there are several, their names are the label `device`."""

    value: Callable[[DeviceState], Values]
    labels: tuple[str, ...] = ()

    def family(self, devices: Sequence[DeviceState]) -> Metric:
        if len(devices) == 1:
            return _family(self, self.labels, {(): self.value(devices[0])})
        return _family(self, ("device", *self.labels), {(device.name,): self.value(device) for device in devices})


def _family(metric: _Read, labels: Sequence[str], values: Mapping[tuple[str, ...], Values]) -> Metric:
    """`values`: by the values of the first labels."""
    cls = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = cls(metric.name, metric.help, labels=labels)
    for first, value in values.items():
        for others, number in value.items() if isinstance(value, Mapping) else [((), value)]:
            family.add_metric((*first, *others), number)
    return family


SNAPSHOT_METRICS = (
    SnapshotMetric(
        "sfumato_build_info", "Always 1; the label is the version.", lambda now: {(__version__,): 1}, ("version",)
    ),
    SnapshotMetric("sfumato_uptime_seconds", "Time since this process started.", lambda now: now.uptime),
    SnapshotMetric("sfumato_ready", "1 if a worker is up and a model file is usable.", lambda now: now.ready),
    SnapshotMetric(
        "sfumato_queue_depth",
        "Pictures waiting in the queue.",
        lambda now: {(priority,): count for priority, count in now.queue_depth.items()},
        ("priority",),
    ),
    SnapshotMetric(
        "sfumato_running_pictures",
        "Pictures in flight. Those of the priority `batch` may be waiting for others between two steps.",
        lambda now: {(priority,): count for priority, count in now.running.items()},
        ("priority",),
    ),
)

DEVICE_METRICS = (
    DeviceMetric("sfumato_device_ready", "1 if the worker of the device is up.", lambda now: now.ready),
    DeviceMetric(
        "sfumato_device_pictures",
        "Pictures that the device has been sent and has not answered yet.",
        lambda now: now.pictures,
    ),
    DeviceMetric("sfumato_forwards_total", "Forward passes of heavy modules.", lambda now: now.stats.forwards),
    DeviceMetric(
        "sfumato_batch_size_forwards_total",
        "Forward passes of the denoiser, by how many requests shared them.",
        lambda now: {(str(size),): count for size, count in sorted(now.stats.batch_sizes.items())},
        ("size",),
    ),
    DeviceMetric(
        "sfumato_unbatched_forwards_total",
        "Forward passes that could not have been batched with any other picture.",
        lambda now: dict(sorted(now.stats.unbatched.items())),
        ("module", "reason"),
    ),
    DeviceMetric(
        "sfumato_prompt_cache_total",
        "Calls of text encoders: answered from the prompt-embedding cache (hit), or computed (miss).",
        lambda now: {("hit",): now.stats.prompt_hits, ("miss",): now.stats.prompt_misses},
        ("result",),
    ),
    DeviceMetric(
        "sfumato_prompt_cache_bytes", "Memory of the prompt-embedding cache.", lambda now: now.stats.prompt_cache_bytes
    ),
    DeviceMetric("sfumato_steps_total", "Total denoising steps of all pictures.", lambda now: now.stats.steps),
    DeviceMetric(
        "sfumato_step_seconds_total",
        "Total time of these steps, summed over pictures.",
        lambda now: now.stats.step_seconds,
    ),
    DeviceMetric("sfumato_model_loads_total", "Models loaded into memory.", lambda now: now.stats.loads),
    DeviceMetric(
        "sfumato_model_evictions_total",
        "Models that left their device to make room for another.",
        lambda now: now.stats.evictions,
    ),
    DeviceMetric(
        "sfumato_worker_restarts_total", "Workers started to replace a dead one.", lambda now: now.stats.restarts
    ),
    DeviceMetric("sfumato_resident_models", "Models in memory.", lambda now: now.stats.resident_models),
    DeviceMetric(
        "sfumato_model_memory_bytes",
        "What the weights of each model in memory take; what two models share counts for both.",
        lambda now: {(name,): size for name, size in sorted(now.stats.model_bytes.items())},
        ("model",),
    ),
    DeviceMetric("sfumato_worker_memory_bytes", "Resident memory of the worker.", lambda now: now.stats.memory_bytes),
    DeviceMetric(
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
        self._queue_wait = QUEUE_WAIT.histogram(registry)
        self._picture_seconds = PICTURE_SECONDS.histogram(registry)
        self._failures = FAILED.counter(registry)
        self._rejections = REJECTED.counter(registry)
        ProcessCollector(registry=registry)

    def record_http(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count one HTTP request; `route` is a path template, so that their number is finite."""
        self._http.labels(route, method, str(status)).inc()
        self._http_seconds.labels(route, method).observe(seconds)

    def record_wait(self, priority: str, seconds: float) -> None:
        """Record how long one picture waited for its turn."""
        self._queue_wait.labels(priority).observe(seconds)

    def record_picture(self, model: str, priority: str, seconds: float) -> None:
        """Record how long one picture took from its turn to its end."""
        self.pictures += 1
        self._picture_seconds.labels(model, priority).observe(seconds)

    def record_failure(self, model: str, code: str) -> None:
        """Count a request that was accepted but failed; `code` is the error's."""
        self._failures.labels(model, code).inc()

    def record_rejection(self, code: str) -> None:
        """Count a request that was not accepted: the queue is full, the key is wrong, ..."""
        self._rejections.labels(code).inc()

    def render(
        self,
        *,
        ready: bool,
        queue_depth: Mapping[str, int],
        running: Mapping[str, int],
        devices: Sequence[DeviceState],
    ) -> bytes:
        """Everything, as `CONTENT_TYPE`. `queue_depth`, `running`: for each priority."""
        snapshot = Snapshot(ready, queue_depth, running, time.monotonic() - self._born)
        registry = CollectorRegistry()
        registry.register(_ReadNow(snapshot, devices))
        return generate_latest(self._registry) + generate_latest(registry)


class _ReadNow(Collector):
    def __init__(self, snapshot: Snapshot, devices: Sequence[DeviceState]) -> None:
        self._snapshot = snapshot
        self._devices = devices

    def collect(self) -> Iterator[Metric]:
        yield from (metric.family(self._snapshot) for metric in SNAPSHOT_METRICS)
        yield from (metric.family(self._devices) for metric in DEVICE_METRICS)
