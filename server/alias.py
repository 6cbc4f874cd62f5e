"""Which model answers: the one that is wanted, once it has proved that it can; until then the one before it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from saccade.backends import Backend
from saccade.errors import BackendUnavailable, ModelError, SaccadeError
from server.model import Model
from server.settings import Settings
from server.telemetry import Metrics
from server.tracing import Tracing
from server.wanted import WantedModel

LOOK_S = 1.0
ABSENT_S, BROKEN_S = 5.0, 60.0  # longest pauses between attempts: nothing is there, or what is there is broken
Opener = Callable[[str | None], Awaitable[Backend]]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trouble:
    """Why the model that is wanted could not be opened: in full for the log, as `told` for anybody."""

    cause: str
    told: str
    failures: int
    again_at: float


class Alias:
    """Points at the model that answers new requests, and moves when another one is wanted.

    A request `use`s the model that is pointed at when it begins, until it ends. The model that is wanted is opened
    beside the one that serves, warmed up and probed; then the alias moves, and the one before is closed as soon as its
    last request has ended. At most two models are open: a third one waits until the one that leaves has gone, while
    one that is wanted back before it has gone takes over at once. A model that cannot be opened leaves everything as
    it is and is tried again, ever more rarely. Starting is the same, with nothing to move from.
    """

    def __init__(
        self,
        settings: Settings,
        open_backend: Opener,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        tracing: Tracing | None = None,
    ) -> None:
        self.wanted = WantedModel(settings.model_file, settings.model)
        self._settings, self._open_backend, self._metrics, self._clock = settings, open_backend, metrics, clock
        self._tracing = tracing
        self.serving: Model | None = None
        self._spare: Model | None = None  # is about to serve, or has served and ends its last requests
        self._trouble: Trouble | None = None
        self._following: asyncio.Task[None] | None = None

    @property
    def current(self) -> Model:
        """The model for whoever asks now. Raises BackendUnavailable where there is none yet."""
        if self.serving is None:
            wait_s = self._trouble.again_at - self._clock() if self._trouble is not None else LOOK_S
            raise BackendUnavailable(self.fault or "no model is open yet", retry_after_s=max(wait_s, LOOK_S))
        return self.serving

    @property
    def open(self) -> list[Model]:
        """The models in memory, the one that serves first."""
        return [model for model in (self.serving, self._spare) if model is not None]

    @property
    def fault(self) -> str | None:
        """What keeps the wanted model from serving, in words for anybody."""
        return self.wanted.fault or (None if self._trouble is None else self._trouble.told)

    @property
    def settled(self) -> bool:
        """Whether the model that is wanted serves."""
        return self.fault is None and self._is_wanted(self.serving)

    @contextmanager
    def use(self) -> Iterator[Model]:
        """The current model, which stays open to the end of the block, wherever the alias may move meanwhile."""
        with self.current.used() as model:
            yield model

    async def begin(self) -> None:
        """Return with a model that serves. Raises SaccadeError if there can be none now."""
        if self.serving is None:
            await self._advance()
        if self.serving is None:
            raise ModelError(f"{self.wanted.fault}: {self.wanted.file}")

    def follow(self) -> None:
        """From now on look at what is wanted every second."""
        self._following = asyncio.create_task(self._follow())

    async def aclose(self) -> None:
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        await asyncio.gather(*(model.aclose() for model in self.open))

    async def _follow(self) -> None:
        while True:
            try:
                await self._advance()
            except Exception as error:  # whatever it is, the model that serves goes on serving
                self._fail(error)
            await asyncio.sleep(LOOK_S)

    async def _advance(self) -> None:
        """One look, and what follows from it: open, move, close. Raises what keeps a model from being opened."""
        await self._look()
        if self._is_due():
            self._spare = await self._opened(self.wanted.name)
            await self._look()  # that took its time: another model may be wanted by now
        if self._is_wanted(self._spare):
            self._move()
        if self._spare is not None and not self._spare.users:
            leaving, self._spare = self._spare, None
            await leaving.aclose()
            logger.info("model %s is closed", leaving.name)

    async def _look(self) -> None:
        before = self.wanted.name
        await self.wanted.look()
        if self.wanted.name != before or self._is_wanted(self.serving):
            self._trouble = None

    def _is_wanted(self, model: Model | None) -> bool:
        return model is not None and self.wanted.name in (None, model.name)

    def _is_due(self) -> bool:
        """Whether the wanted model should be opened now."""
        missing = self.wanted.known and self._spare is None and not self._is_wanted(self.serving)
        return missing and (self._trouble is None or self._clock() >= self._trouble.again_at)

    async def _opened(self, name: str | None) -> Model:
        """Open, warmed up and probed. Raises ModelError or BackendUnavailable."""
        model = Model(self._settings, await self._open_backend(name), self._metrics, self._tracing)
        try:
            await model.start()
        except BaseException:
            await model.aclose()
            raise
        self._metrics.model_loads.labels("opened").inc()
        return model

    def _move(self) -> None:
        self.serving, self._spare = self._spare, self.serving
        serving, leaving = self.current, self._spare
        logger.info("model %s serves, in batches of up to %d", serving.name, serving.stepping.batch_size)
        if leaving is not None:
            logger.info("model %s leaves; %d requests end on it", leaving.name, leaving.users)

    def _fail(self, error: Exception) -> None:
        """Say it once, and try again later."""
        self._metrics.model_loads.labels("failed").inc()
        absent = isinstance(error, BackendUnavailable)
        name = "the model" if self.wanted.name is None else f"model {self.wanted.name!r}"
        told = f"{name} cannot be opened" + (f": {error}" if absent else "; the log says why")
        before, failures = self._trouble, 1 if self._trouble is None else self._trouble.failures + 1
        wait_s = min(2.0 ** min(failures - 1, 10), ABSENT_S if absent else BROKEN_S)
        self._trouble = Trouble(repr(error), told, failures, self._clock() + wait_s)
        if before is None or before.cause != self._trouble.cause:
            foreseen = isinstance(error, SaccadeError)
            logger.error("%s cannot be opened, it will be tried again: %s", name, error, exc_info=not foreseen)
