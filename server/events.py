"""How an answer comes about, told as server-sent events: accepted, progress, preview, and answer or problem."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from fastapi import Response
from starlette.types import Receive, Scope, Send

from saccade import render
from saccade.pipeline import Glimpse, Phase, Resolved
from saccade.tasks import TaskName
from server import negotiation, problems
from server.problems import ClientGone

MEDIA_TYPE = "text/event-stream"
KEEP_ALIVE_S = 15.0
SMALL_BYTES = 2**16
Name = Literal["accepted", "progress", "preview", "answer", "problem"]


def wanted(accept: str) -> bool:
    """Whether events are asked for by name, and nothing is liked better."""
    ranges = negotiation.parse_accept(accept)
    named = max((r.q for r in ranges if r.specificity(MEDIA_TYPE) == 2), default=0.0)
    return named > 0 and named >= max(r.q for r in ranges)


@dataclass(frozen=True)
class Event:
    """`data` is one line of JSON; `merges` with an unread one before it of the same."""

    id: int
    name: Name
    data: str
    merges: str | None = None

    def encode(self) -> bytes:
        return f"id: {self.id}\nevent: {self.name}\ndata: {self.data}\n\n".encode()


class Events:
    """What has happened so far, for any number of followers, who may come late.

    Progress replaces progress of the same phase, so the whole is as long as the previews are many, however slowly it
    is read.
    """

    def __init__(self, last: int = 0) -> None:
        """`last`: the number that the first event comes after."""
        self._log: list[Event] = []
        self._last = last
        self._news = asyncio.Event()
        self.begun = self.ended = False
        self.followers = 0

    def publish(self, name: Name, data: str, merges: str | None = None) -> None:
        self._last += 1
        if merges is not None and self._log and self._log[-1].merges == merges:
            self._log.pop()
        self._log.append(Event(self._last, name, data, merges))
        self.begun = True
        self._wake()

    async def end(self, response: Response) -> None:
        """The answer, or the problem that stands in its place; a large one is put into words off the event loop."""
        words = partial(outcome, response.status_code, dict(response.headers), bytes(response.body))
        try:
            last = words() if len(response.body) <= SMALL_BYTES else await asyncio.to_thread(words)
            if not self.ended:
                self.publish(*last)
        finally:
            self.close()

    def close(self) -> None:
        self.ended = True
        self._wake()

    def since(self, last: int) -> list[Event]:
        """What came after event `last`; everything, if there has been no such event (in this life of the server)."""
        last = last if last <= self._last else 0
        return [event for event in self._log if event.id > last]

    async def news(self, timeout_s: float | None = None) -> bool:
        """Wait until something happens; False if nothing did in time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                return await self._news.wait()
        return False

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


def outcome(status: int, headers: dict[str, str], body: bytes) -> tuple[Name, str]:
    """The last event of a request that was answered so: JSON as it is, any other file in base64."""
    kind = headers.get("content-type", "")
    if status >= 400:
        return "problem", body.decode()
    if kind == render.MEDIA_TYPES["json"]:
        return "answer", body.decode()
    told = {name: value for name, value in headers.items() if name not in ("content-type", "content-length")}
    return "answer", json.dumps({"media_type": kind, "data": base64.b64encode(body).decode(), "headers": told})


class Witness:
    """Tells `events` what it hears of one request: a `saccade.pipeline.Watch`.

    `in_thread` draws previews off the event loop; there are none while nobody `looks`.
    """

    def __init__(
        self,
        events: Events,
        in_thread: Callable[[Callable[[], bytes]], Coroutine[Any, Any, bytes]],
        request_id: str,
        looks: Callable[[], bool] = lambda: True,
    ) -> None:
        self.events, self.request_id = events, request_id
        self._in_thread, self._looks = in_thread, looks
        self._done = self._total = 0
        self._phase = "queue"
        self._chosen: set[int] = set()
        self._steps = self._seen = 0

    def begin(self, task: TaskName, options: Resolved, previews: int, frames: int = 1) -> None:
        """The request is admitted; it asks for `frames` answers with the same options, and all share the previews."""
        self._steps = options.steps
        self._done, self._total = 0, options.steps * options.ensemble_size * frames
        self._chosen = spread(previews, options.steps * frames)
        told = {"request_id": self.request_id, "task": task, "steps": options.steps}
        told |= {"ensemble_size": options.ensemble_size, "total_steps": self._total}
        self.events.publish("accepted", json.dumps(told))
        self._progress("queue")

    def phase(self, name: Phase) -> None:
        self._progress(name)

    async def step(self, member: int, step: int, glimpse: Glimpse) -> None:
        if member == 0:
            self._seen += 1
            if self._seen in self._chosen and self._looks():
                await self._preview(step, glimpse)
        self._done += 1
        self._progress(self._phase)

    async def _preview(self, step: int, glimpse: Glimpse) -> None:
        seen = await glimpse()
        style: render.Render = "data" if seen.task == "amodal" else "color"
        data = await self._in_thread(lambda: render.encode(seen, "png", style).data)
        height, width = seen.prediction.shape[:2]
        told = {"step": step, "steps": self._steps, "media_type": "image/png", "width": width, "height": height}
        self.events.publish("preview", json.dumps(told | {"image": base64.b64encode(data).decode()}))

    def _progress(self, phase: str) -> None:
        self._phase = phase
        told = json.dumps({"done": self._done, "total": self._total, "phase": phase})
        self.events.publish("progress", told, merges=phase)


def spread(previews: int, steps: int) -> set[int]:
    """Which of the steps 1 .. `steps` are shown: evenly, the last one always."""
    return {-(-steps * (index + 1) // previews) for index in range(previews)}


async def tell(events: Events, responding: Coroutine[Any, Any, Response]) -> Response:
    """The response, or the problem in its place, told as the last event. Raises ClientGone."""
    try:
        try:
            response = await responding
        except ClientGone:
            raise
        except Exception as error:
            response = problems.refusal(error)
        await events.end(response)
        return response
    finally:
        events.close()


async def begin(events: Events, working: asyncio.Task[Response]) -> Response:
    """The stream once the work is admitted; until then a refusal is a plain response. Raises ClientGone."""
    try:
        while not (events.begun or events.ended):
            await events.news()
        if events.ended and (response := await working).status_code >= 400:
            return response
    except asyncio.CancelledError:
        working.cancel()
        raise
    return EventStream(events, working=working)


class EventStream(Response):
    """Sends what `events` hold after `last`, and what comes, to their end; `working` ends with it."""

    media_type = MEDIA_TYPE

    def __init__(self, events: Events, last: int = 0, working: asyncio.Task[Response] | None = None) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no", "Vary": "Accept"})
        del self.headers["content-length"]
        self._events, self._last, self._working = events, last, working
        events.followers += 1  # from here on: what ends before the first byte is sent is told too

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await self._follow(receive, send)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ClientGone:
            return
        finally:
            self._events.followers -= 1
            if self._working is not None:
                self._working.cancel()
                await asyncio.gather(self._working, return_exceptions=True)

    async def _follow(self, receive: Receive, send: Send) -> None:
        """To the end. Raises ClientGone, where it is not `working` that hears of it."""
        await self.send_all(send)

    async def send_all(self, send: Send) -> None:
        while True:
            if waiting := self._events.since(self._last):
                self._last = waiting[-1].id
                await send(
                    {"type": "http.response.body", "body": b"".join(map(Event.encode, waiting)), "more_body": True}
                )
            elif self._events.ended:
                return
            elif not await self._events.news(KEEP_ALIVE_S):
                await send({"type": "http.response.body", "body": b": still at it\n\n", "more_body": True})
