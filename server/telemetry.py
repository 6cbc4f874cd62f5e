"""What the server counts, for Prometheus. Gauges read the state itself when they are asked, so that none can leak."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from saccade.tasks import TASKS

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """One registry per app."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # processor time, resident memory, open files, start
        self.requests = self._counter("saccade_requests", "Answered requests; 499: the client left.", "task", "status")
        self.request_seconds = self._histogram(
            "saccade_request_seconds", "From the first byte to the answer.", _SECONDS, "task"
        )
        self.phase_seconds = self._histogram("saccade_phase_seconds", "Time in each phase.", _SECONDS, "task", "phase")
        self.batch_rows = self._histogram("saccade_batch_rows", "Rows that ran together.", _ROWS, "kind")
        self.batch_seconds = self._histogram("saccade_batch_seconds", "Time of one batch.", _SECONDS, "kind")
        self.rows = self._counter("saccade_rows", "Rows computed.", "kind")
        self.http_requests = self._counter(
            "saccade_http_requests", "Answers of every route.", "route", "method", "status"
        )
        self.in_flight = 0
        self.gauge("saccade_in_flight_requests", "Requests that are being answered.", lambda: self.in_flight)
        self.memory_refused = self._counter("saccade_memory_refused", "Requests refused for want of memory.")
        self.rejected = self._counter("saccade_rejected", "Requests refused because the queue was full.", "task")
        self.cancelled = self._counter("saccade_cancelled", "Requests withdrawn before their end.", "task", "reason")
        self.cache = self._counter("saccade_cache_lookups", "Look-ups in the exact caches.", "cache", "outcome")
        self.budgets = self._counter("saccade_budgets", "Answers within a budget: complete, cut, or late.", "outcome")
        self.jobs = self._counter("saccade_jobs_finished", "Jobs that ended by themselves.", "task", "status")
        self.webhooks = self._counter("saccade_webhooks", "Tries to deliver a webhook.", "outcome")
        self.model_loads = self._counter("saccade_model_loads", "Attempts to open a model.", "outcome")
        for outcome in ("opened", "failed"):  # there from the start, so that a first failure is an increase
            self.model_loads.labels(outcome)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(name, help, labels, registry=self.registry)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, help, labels, buckets=buckets, registry=self.registry)

    def gauge(self, name: str, help: str, read: Callable[[], float]) -> None:
        Gauge(name, help, registry=self.registry).set_function(read)

    def info(self, name: str, help: str, labels: Iterable[str], read: Callable[[], Iterable[Iterable[str]]]) -> None:
        """A gauge that is 1 for each row of label values that `read` gives."""
        self.registry.register(_Info(name, help, tuple(labels), read))

    def batch(self, kind: str, rows: int, seconds: float) -> None:
        self.batch_rows.labels(kind).observe(rows)
        self.batch_seconds.labels(kind).observe(seconds)
        self.rows.labels(kind).inc(rows)

    def phases(self, task: str, timings_ms: Mapping[str, float]) -> None:
        for phase, milliseconds in timings_ms.items():
            self.phase_seconds.labels(task, phase).observe(milliseconds / 1e3)

    def render(self) -> bytes:
        return generate_latest(self.registry)


class _Info(Collector):
    def __init__(
        self, name: str, help: str, labels: tuple[str, ...], read: Callable[[], Iterable[Iterable[str]]]
    ) -> None:
        self._name, self._help, self._labels, self._read = name, help, labels, read

    def collect(self) -> Iterable[GaugeMetricFamily]:
        family = GaugeMetricFamily(self._name, self._help, labels=self._labels)
        for values in self._read():
            family.add_metric(list(values), 1)
        return [family]


class Telemetry:
    """ASGI layer that counts answers: all of them by route, those of the tasks with their seconds."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        task = str(scope["path"]).removeprefix("/")
        began = time.perf_counter()

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                status = str(message["status"])
                self.metrics.http_requests.labels(_route(scope), _method(scope), status).inc()
                if task in TASKS:
                    self.metrics.requests.labels(task, status).inc()
                    self.metrics.request_seconds.labels(task).observe(time.perf_counter() - began)
            await send(message)

        self.metrics.in_flight += 1
        try:
            await self.app(scope, receive, counted)
        finally:
            self.metrics.in_flight -= 1


def _route(scope: Scope) -> str:
    """The route's pattern, of which there are few, and never the path, which a stranger makes up."""
    return str(getattr(scope.get("route"), "path", "none"))


def _method(scope: Scope) -> str:
    return str(scope["method"]) if scope["method"] in METHODS else "other"
