"""One model in service: the queue of its steps, its readiness, and the requests that are using it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Self

from saccade.backends import Backend, Remote
from saccade.backends.embedded import Embedded
from saccade.backends.stepping import Stepping
from saccade.card import Card
from saccade.pipeline import Pipeline
from server.cache import Remembering
from server.health import Readiness, try_out
from server.settings import Settings
from server.tally import Tally
from server.telemetry import Metrics
from server.tracing import Tracing

logger = logging.getLogger(__name__)


class Model:
    """Everything that belongs to one model and goes with it. `users` requests are being answered by it."""

    def __init__(self, settings: Settings, backend: Backend, metrics: Metrics, tracing: Tracing | None = None) -> None:
        self.stepping = Stepping(
            backend,
            batch_size=settings.batch_size,
            concurrency=_at_once(settings, backend),
            observer=self._batch,
            tracer=tracing,
        )
        self.latents = Remembering(
            self.stepping, settings.latent_cache_bytes, lambda found: metrics.cache.labels("latents", found).inc()
        )
        self.pipeline = Pipeline(self.latents) if tracing is None else Pipeline(self.latents, tracing.phase)
        self.readiness = Readiness(Pipeline(self.stepping), settings.readiness_ttl_s)
        self.users = 0
        self.tally = Tally()
        self._backend = backend
        self._metrics = metrics
        self._patience_s = settings.drain_timeout_s

    @property
    def card(self) -> Card:
        return self.stepping.card

    @property
    def name(self) -> str:
        return self.card.name

    @property
    def engine(self) -> Mapping[str, str]:
        """Engine, precision, threads, streams, and the sizes that have graphs of their own: what decides how fast it
        is, and the answers' last digits. Nothing where the model runs in another process."""
        if not isinstance(backend := self._backend, Embedded):
            return {}
        sizes = " ".join(f"{width}x{height}" for height, width in backend.special)
        return {
            "engine": backend.engine,
            "precision": backend.precision,
            "threads": str(backend.threads),
            "streams": str(backend.streams),
            "sizes": sizes,
        }

    @property
    def endpoints(self) -> Mapping[str, str]:
        """Address -> state of the servers that run the model; none where it runs in this process."""
        return self._backend.states if isinstance(self._backend, Remote) else {}

    @contextmanager
    def used(self) -> Iterator[Self]:
        """The model stays open while the block runs."""
        self.users += 1
        try:
            yield self
        finally:
            self.users -= 1

    async def start(self) -> None:
        """Warm up, and answer a tiny request of every task. Raises ModelError or BackendUnavailable."""
        await self.stepping.start()
        await try_out(Pipeline(self.stepping))

    async def aclose(self) -> None:
        """Let running batches end, within `drain_timeout_s`. Never raises: nobody is left to deal with it."""
        await self.readiness.aclose()
        closing = asyncio.create_task(self.stepping.aclose())
        if not await self._ended(closing):
            logger.warning("%s still runs after %g s: its batches are given up", self.name, self._patience_s)
            closing.cancel()
            await self._ended(closing)

    async def _ended(self, closing: asyncio.Task[None]) -> bool:
        done, _ = await asyncio.wait({closing}, timeout=self._patience_s)
        if done and not closing.cancelled() and (error := closing.exception()):
            logger.error("the backend of %s did not close well", self.name, exc_info=error)
        return bool(done)

    def _batch(self, kind: str, rows: int, seconds: float) -> None:
        self._metrics.batch(kind, rows, seconds)
        self.tally.add(kind, rows, seconds)
        if kind == "decode":  # the last part of every answer: whatever went before it worked
            self.readiness.prove()


def _at_once(settings: Settings, backend: Backend) -> int:
    """Batches that are worth having in flight."""
    if isinstance(backend, Embedded):
        return backend.streams
    return settings.triton_batches if settings.backend == "triton" else 1
