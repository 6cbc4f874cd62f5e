"""Notices what the engine and the event loop cannot say of themselves: that they have stopped."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from server.model import Model

LOOK_S = 1.0
logger = logging.getLogger(__name__)


@dataclass
class _Seen:
    """A model at the last look: how many batches it had finished, and since when it has been at the next one."""

    finished: int
    since: float
    stuck: bool = False


class Watchdog:
    """An engine is stuck when it is busy and has finished no batch for `patience_s`; until it finishes one, for callers
    who gave up leave a stuck engine looking idle, and so it is asked something now and then. `fault` says so meanwhile.

    A thread inside an engine cannot be ended from outside: the advice is to restart the process. `lag_s` is how late
    the event loop was at the last look.
    """

    def __init__(
        self,
        models: Callable[[], Iterable[Model]],
        patience_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._models, self._patience_s, self._clock = models, patience_s, clock
        self._seen: dict[int, _Seen] = {}
        self._asking: asyncio.Task[object] | None = None
        self.lag_s = 0.0

    @property
    def stuck(self) -> bool:
        return any(seen.stuck for seen in self._seen.values())

    @property
    def fault(self) -> str | None:
        """What is wrong, in words for anybody; None where nothing is."""
        told = f"the engine has not finished a batch for {self._patience_s:g} s; restart the server"
        return told if self.stuck else None

    def look(self) -> None:
        self._seen = {id(model): self._judge(model) for model in self._models()}

    def _judge(self, model: Model) -> _Seen:
        now, before, lane, name = self._clock(), self._seen.get(id(model)), model.stepping, model.name
        if before is None or lane.finished != before.finished or not (lane.busy or before.stuck):
            if before is not None and before.stuck:
                logger.warning("the engine of %s moves again", name)
            return _Seen(lane.finished, now)
        if not before.stuck and now - before.since >= self._patience_s:
            before.stuck = True
            logger.critical(
                "the engine of %s is stuck: busy, and no batch finished for %g s. Not ready from here on, until it "
                "moves; what waits for it times out. Restart this server, and look at what the engine runs on.",
                *(name, self._patience_s),
            )
        return before

    async def follow(self) -> None:
        while True:
            due = self._clock() + LOOK_S
            await asyncio.sleep(LOOK_S)
            self.lag_s = max(0.0, self._clock() - due)
            self.look()
            self._ask()

    def _ask(self) -> None:
        """Give a stuck engine something to finish."""
        stuck = [model for model in self._models() if self._seen[id(model)].stuck]
        if stuck and (self._asking is None or self._asking.done()):
            self._asking = asyncio.create_task(stuck[0].readiness.check())
