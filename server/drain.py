"""Leaving well: say so, accept for a moment more, finish what was accepted, and end within a bound whatever hangs."""

from __future__ import annotations

import logging
import os
import threading
import time
from types import FrameType

import uvicorn
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CLOSING_S = 10.0
"""For the backend to close, after the last answer."""
logger = logging.getLogger(__name__)


class Drain:
    """Whether the server is leaving, and since when."""

    def __init__(self) -> None:
        self.since: float | None = None

    @property
    def leaving(self) -> bool:
        return self.since is not None

    def begin(self) -> None:
        self.since = time.monotonic()

    def lasted(self, seconds: float) -> bool:
        return self.since is not None and time.monotonic() - self.since >= seconds


class Shed:
    """ASGI layer: while the server leaves, every answer closes its connection, so that callers find another server."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self.app, self.drain = app, drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def shedding(message: Message) -> None:
            if message["type"] == "http.response.start" and self.drain.leaving:
                MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        await self.app(scope, receive, shedding)


class Server(uvicorn.Server):
    """The first signal begins the drain: `delay_s` of accepting as before, then the HTTP server's own shutdown. What
    has not ended `bound_s` after the signal, such as a thread in a stuck engine, is left behind by force.

    A second signal skips the delay; a second Ctrl-C after that, everything.
    """

    def __init__(self, config: uvicorn.Config, drain: Drain, delay_s: float, bound_s: float) -> None:
        super().__init__(config)
        self.drain, self.delay_s, self.bound_s = drain, delay_s, bound_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.drain.leaving or not self.started:
            return super().handle_exit(sig, frame)
        self._captured_signals.append(sig)
        self.drain.begin()
        forced = threading.Timer(self.bound_s, _force, (self.bound_s,))
        forced.daemon = True
        forced.start()

    async def on_tick(self, counter: int) -> bool:
        if self.drain.leaving and not self.should_exit and self.drain.lasted(self.delay_s):
            logger.info("draining: no new connections from here on")
            self.should_exit = True
        return await super().on_tick(counter)


def _force(bound_s: float) -> None:
    logger.critical("still not ended %g s after the signal: something hangs, and is left behind", bound_s)
    logging.shutdown()
    os._exit(1)
