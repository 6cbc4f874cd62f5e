"""OpenTelemetry traces, where somebody collects them: a span for each request, its phases, and the batches it ran in.

Where no collector is named nothing is loaded for it, and nothing is done.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from saccade import __version__
from saccade.errors import SaccadeError
from server.logs import QUIET_PATHS, current_trace, state
from server.settings import Settings

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PATH = "/v1/traces"
FLUSH_S = 3.0
logger = logging.getLogger(__name__)


class Tracing:
    """Makes spans and sends them in batches, from a thread of its own. Also a `saccade.backends.stepping.Tracer`."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry import context, trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._context, self._trace, self._provider = context, trace, provider
        self._tracer = provider.get_tracer("saccade", __version__)
        self._propagator = TraceContextTextMapPropagator()

    @contextmanager
    def request(self, scope: Scope) -> Iterator[Span]:
        """Around a request; the caller's `traceparent` is honoured."""
        parent = self._propagator.extract(dict(Headers(scope=scope)))
        facts = {"http.request.method": str(scope["method"]), "saccade.request_id": str(state(scope)["request_id"])}
        with self._tracer.start_as_current_span(
            str(scope["method"]), parent, self._trace.SpanKind.SERVER, facts, record_exception=False
        ) as span:
            token = current_trace.set(format(span.get_span_context().trace_id, "032x"))
            try:
                yield span
            finally:
                current_trace.reset(token)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with self._tracer.start_as_current_span(name, record_exception=False):
            yield

    def here(self) -> object:
        return self._context.get_current()

    @contextmanager
    def batch(self, kind: str, callers: Sequence[object]) -> Iterator[None]:
        """A batch belongs to all of its callers: the first one's span is its parent, the others' are linked."""
        contexts = cast("Sequence[Context]", callers)
        spans = [self._trace.get_current_span(context).get_span_context() for context in contexts]
        others = {span.span_id: span for span in spans if span.span_id != spans[0].span_id}
        links = [self._trace.Link(span) for span in others.values()]
        facts: dict[str, str | int] = {"saccade.batch.kind": kind, "saccade.batch.rows": len(callers)}
        with self._tracer.start_as_current_span(
            f"batch {kind}", contexts[0], attributes=facts, links=links, record_exception=False
        ):
            yield

    def failed(self, span: Span, status: int) -> None:
        span.set_status(self._trace.StatusCode.ERROR, str(status))

    async def aclose(self) -> None:
        """Send what is left, for a moment: a collector that is away keeps nobody."""
        ending = threading.Thread(target=self._provider.shutdown, daemon=True)
        ending.start()
        await asyncio.to_thread(ending.join, FLUSH_S)


class Traced:
    """ASGI layer around whatever is to be inside a request's span."""

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self.app, self.tracing = app, tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in QUIET_PATHS:
            return await self.app(scope, receive, send)
        with self.tracing.request(scope) as span:

            async def noted(message: Message) -> None:
                if message["type"] == "http.response.start":
                    self._note(span, scope, message["status"])
                await send(message)

            await self.app(scope, receive, noted)

    def _note(self, span: Span, scope: Scope, status: int) -> None:
        span.set_attribute("http.response.status_code", status)
        if route := getattr(scope.get("route"), "path", None):
            span.set_attribute("http.route", route)
            span.update_name(f"{scope['method']} {route}")
        if status >= 500:
            self.tracing.failed(span, status)


def opened(settings: Settings) -> Tracing | None:
    """None where no collector is named. Raises SaccadeError where the setting names one and the extra is missing."""
    endpoint = settings.otlp_endpoint
    if not endpoint and (not any(map(os.environ.get, VARIABLES)) or _is_off()):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        told = f"{error.name} is not installed: pip install 'saccade[otel]'"
        if endpoint:
            raise SaccadeError(f"otlp_endpoint is set, but {told}") from error
        logger.warning("no traces: the environment names a collector, but %s", told)
        return None
    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "saccade"}
    resource = Resource.create(named | {"service.version": __version__})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + PATH if endpoint else None)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    logger.info("traces go to %s", endpoint or "the collector that the environment names")
    return Tracing(provider)


def _is_off() -> bool:
    return (
        os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
        or os.environ.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp"
    )
