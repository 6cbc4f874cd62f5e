"""Ask a Saccade server: `Client`, and `AsyncClient` with the same methods to await.

    with Client("http://127.0.0.1:8080") as client:
        answer = client.depth("photo.jpg", steps=10, ensemble_size=5)
        answer.prediction  # [H, W] float32, 0 nearest, 1 farthest

What goes wrong is one of `saccade.errors`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, closing
from types import TracebackType
from typing import Self, Unpack

import httpx

from saccade import asking, replies
from saccade.asking import DEFAULT_URL, RETRIES, WATCHING, Retries, Shared
from saccade.calls import Choices, Frames, ImageLike, Known, parts, points_text
from saccade.card import Card
from saccade.errors import BackendUnavailable
from saccade.later import Job, Update, ended
from saccade.pipeline import Answer
from saccade.sequence import Seen
from saccade.tasks import TaskName

__all__ = ["DEFAULT_URL", "RETRIES", "AsyncClient", "Client", "Retries"]


class Client(Shared):
    """Asks and waits. May be used by several threads.

    `timeout`: seconds without a sign of the server, None for ever. `retries`: when it is busy. `headers`: sent with
    every request. `api_key`: where the server wants one. Raises ServerError with the server's problem document,
    BackendUnavailable if it cannot be reached, InvalidInput for a picture that cannot be sent.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        timeout: float | None = 300.0,
        retries: Retries = RETRIES,
        headers: Mapping[str, str] | None = None,
        api_key: str | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        super().__init__(url, timeout, retries)
        self._http: httpx.Client = httpx.Client(**asking.settings(timeout, headers, api_key), transport=transport)

    def depth(self, image: ImageLike, *, known_depths: Known | None = None, **choices: Unpack[Choices]) -> Answer:
        """How far everything is: prediction [H, W] float32, 0 nearest, 1 farthest.

        `known_depths`: rows of x, y (pixels) and metres; the prediction is then in metres, and `metres` says how.
        """
        more = {"known_depths": points_text(known_depths)}
        return replies.answer(self._send(self._ask_for("depth", {"image": image}, choices, more)))

    def depths(
        self,
        frames: Frames,
        *,
        steady: bool | None = None,
        known_depths: Known | None = None,
        frames_stride: int | None = None,
        frames_limit: int | None = None,
        **choices: Unpack[Choices],
    ) -> Seen:
        """The depth of several pictures, or of a video's frames: a sequence of answers.

        `steady`: one scale for all, each fitted to the one before along the flow (default: for videos). `known_depths`:
        of the first frame, for all, where the scale is steady. `frames_stride`, `frames_limit`: which of a video's.
        """
        more = asking.clip_options(steady, known_depths, frames_stride, frames_limit)
        return replies.seen(self._send(self._ask_for("depth", parts(frames), choices, more)))

    def flows(
        self,
        frames: Frames,
        *,
        frames_stride: int | None = None,
        frames_limit: int | None = None,
        **choices: Unpack[Choices],
    ) -> Seen:
        """Where everything moved from each frame to the next, of pictures in a row or of a video."""
        more = asking.clip_options(None, None, frames_stride, frames_limit)
        return replies.seen(self._send(self._ask_for("flow", parts(frames), choices, more)))

    def flow(self, image: ImageLike, next_image: ImageLike, **choices: Unpack[Choices]) -> Answer:
        """Where everything moved: prediction [H, W, 2] float32 in pixels, u right and v down."""
        return replies.answer(self._send(self._ask_for("flow", {"image": image, "next_image": next_image}, choices)))

    def amodal(self, image: ImageLike, mask: ImageLike, **choices: Unpack[Choices]) -> Answer:
        """The whole of the object whose visible part is `mask`: prediction [H, W] bool."""
        return replies.answer(self._send(self._ask_for("amodal", {"image": image, "mask": mask}, choices)))

    def stream(
        self,
        task: TaskName,
        image: ImageLike,
        next_image: ImageLike | None = None,
        mask: ImageLike | None = None,
        *,
        previews: int = 4,
        **choices: Unpack[Choices],
    ) -> Iterator[Update]:
        """What happens until the answer, which comes last. Closing the iterator withdraws the work."""
        pictures = asking.pictures(image, next_image, mask)
        return self._updates(self._ask_for(task, pictures, choices, {"previews": previews}, WATCHING))

    def submit(
        self,
        task: TaskName,
        image: ImageLike,
        next_image: ImageLike | None = None,
        mask: ImageLike | None = None,
        *,
        previews: int = 0,
        webhook: str | None = None,
        idempotency_key: str | None = None,
        **choices: Unpack[Choices],
    ) -> Job:
        """Leave the request with the server, which keeps it until it is answered, whatever happens to the server.

        `webhook`: an https URL to be told at. `idempotency_key`: the same key is the same job, whoever asks again.
        """
        pictures, more = asking.pictures(image, next_image, mask), {"previews": previews, "webhook": webhook}
        return replies.taken(self._send(self._ask_for(task, pictures, choices, more, asking.later(idempotency_key))))

    def job(self, job: Job | str) -> Job:
        """How it stands with a job."""
        return replies.job(self._send(self._build("GET", asking.path(job))))

    def jobs(self, limit: int = 20) -> list[Job]:
        """One's own, newest first, 100 at most."""
        return replies.jobs(self._send(self._build("GET", "/jobs", params={"limit": limit})))

    def follow(self, job: Job | str) -> Iterator[Update]:
        """What happens to a job until its answer, which comes last; closing the iterator changes nothing."""
        return self._updates(self._build("GET", f"{asking.path(job)}/events", headers=WATCHING))

    def result(self, job: Job | str) -> Answer:
        """A job's answer, waiting for it, through restarts of the server. Raises ServerError for a job that failed,
        and OtherAnswer, which has the bytes, for one that was asked for in another format."""
        tried = 0
        while True:
            try:
                for update in self.follow(job):
                    tried = 0
                    if isinstance(update, Answer):
                        return update
            except BackendUnavailable:
                if tried >= self._retries.most:
                    raise
            time.sleep(asking.pause_s(tried))
            tried += 1

    def cancel(self, job: Job | str) -> None:
        """Withdraw a job that has not ended; make the server forget one that has."""
        replies.done(self._send(self._build("DELETE", asking.path(job))))

    def models(self) -> list[Card]:
        """The cards of what the server runs."""
        return replies.cards(self._send(self._build("GET", "/models")))

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _updates(self, request: httpx.Request) -> Iterator[Update]:
        response = self._send(request, stream=True)
        with closing(response), self._reaching():
            if not response.is_success:
                response.read()
                replies.read(response)
            reader = replies.reader(response)
            for line in response.iter_lines():
                if (update := replies.update(reader, line, response)) is not None:
                    yield update
                    if isinstance(update, Answer):
                        return
        raise ended(self.url)

    def _send(self, request: httpx.Request, stream: bool = False) -> httpx.Response:
        tried = 0
        while True:
            with self._reaching():
                response = self._http.send(request, stream=stream)
            wait_s = self._retries.wait_s(response, tried)
            if wait_s is None:
                return response
            response.close()
            time.sleep(wait_s)
            tried += 1


class AsyncClient(Shared):
    """`Client` to await; cancelling a call closes its connection, and the server drops its work."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        timeout: float | None = 300.0,
        retries: Retries = RETRIES,
        headers: Mapping[str, str] | None = None,
        api_key: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(url, timeout, retries)
        self._http: httpx.AsyncClient = httpx.AsyncClient(
            **asking.settings(timeout, headers, api_key), transport=transport
        )

    async def depth(self, image: ImageLike, *, known_depths: Known | None = None, **choices: Unpack[Choices]) -> Answer:
        """As `Client.depth`."""
        more = {"known_depths": points_text(known_depths)}
        return await self._ask("depth", {"image": image}, choices, more)

    async def depths(
        self,
        frames: Frames,
        *,
        steady: bool | None = None,
        known_depths: Known | None = None,
        frames_stride: int | None = None,
        frames_limit: int | None = None,
        **choices: Unpack[Choices],
    ) -> Seen:
        """As `Client.depths`."""
        return await self._ask_all(
            "depth", frames, choices, asking.clip_options(steady, known_depths, frames_stride, frames_limit)
        )

    async def flows(
        self,
        frames: Frames,
        *,
        frames_stride: int | None = None,
        frames_limit: int | None = None,
        **choices: Unpack[Choices],
    ) -> Seen:
        """As `Client.flows`."""
        return await self._ask_all(
            "flow", frames, choices, asking.clip_options(None, None, frames_stride, frames_limit)
        )

    async def flow(self, image: ImageLike, next_image: ImageLike, **choices: Unpack[Choices]) -> Answer:
        """As `Client.flow`."""
        return await self._ask("flow", {"image": image, "next_image": next_image}, choices)

    async def amodal(self, image: ImageLike, mask: ImageLike, **choices: Unpack[Choices]) -> Answer:
        """As `Client.amodal`."""
        return await self._ask("amodal", {"image": image, "mask": mask}, choices)

    async def stream(
        self,
        task: TaskName,
        image: ImageLike,
        next_image: ImageLike | None = None,
        mask: ImageLike | None = None,
        *,
        previews: int = 4,
        **choices: Unpack[Choices],
    ) -> AsyncGenerator[Update]:
        """As `Client.stream`."""
        pictures = asking.pictures(image, next_image, mask)
        request = await asyncio.to_thread(self._ask_for, task, pictures, choices, {"previews": previews}, WATCHING)
        async with aclosing(self._updates(request)) as updates:
            async for update in updates:
                yield update

    async def submit(
        self,
        task: TaskName,
        image: ImageLike,
        next_image: ImageLike | None = None,
        mask: ImageLike | None = None,
        *,
        previews: int = 0,
        webhook: str | None = None,
        idempotency_key: str | None = None,
        **choices: Unpack[Choices],
    ) -> Job:
        """As `Client.submit`."""
        pictures, more = asking.pictures(image, next_image, mask), {"previews": previews, "webhook": webhook}
        headers = asking.later(idempotency_key)
        return replies.taken(
            await self._send(await asyncio.to_thread(self._ask_for, task, pictures, choices, more, headers))
        )

    async def job(self, job: Job | str) -> Job:
        """As `Client.job`."""
        return replies.job(await self._send(self._build("GET", asking.path(job))))

    async def jobs(self, limit: int = 20) -> list[Job]:
        """As `Client.jobs`."""
        return replies.jobs(await self._send(self._build("GET", "/jobs", params={"limit": limit})))

    def follow(self, job: Job | str) -> AsyncGenerator[Update]:
        """As `Client.follow`."""
        return self._updates(self._build("GET", f"{asking.path(job)}/events", headers=WATCHING))

    async def result(self, job: Job | str) -> Answer:
        """As `Client.result`."""
        tried = 0
        while True:
            try:
                async with aclosing(self.follow(job)) as updates:
                    async for update in updates:
                        tried = 0
                        if isinstance(update, Answer):
                            return update
            except BackendUnavailable:
                if tried >= self._retries.most:
                    raise
            await asyncio.sleep(asking.pause_s(tried))
            tried += 1

    async def cancel(self, job: Job | str) -> None:
        """As `Client.cancel`."""
        replies.done(await self._send(self._build("DELETE", asking.path(job))))

    async def models(self) -> list[Card]:
        """As `Client.models`."""
        return replies.cards(await self._send(self._build("GET", "/models")))

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _ask(
        self,
        task: TaskName,
        pictures: Mapping[str, ImageLike],
        choices: Choices,
        more: Mapping[str, object] | None = None,
    ) -> Answer:
        """Files are read and arrays coded beside the event loop, not on it."""
        request = await asyncio.to_thread(self._ask_for, task, pictures, choices, more)
        return await asyncio.to_thread(replies.answer, await self._send(request))

    async def _ask_all(self, task: TaskName, frames: Frames, choices: Choices, more: Mapping[str, object]) -> Seen:
        request = await asyncio.to_thread(self._ask_for, task, parts(frames), choices, more)
        return await asyncio.to_thread(replies.seen, await self._send(request))

    async def _updates(self, request: httpx.Request) -> AsyncGenerator[Update]:
        response = await self._send(request, stream=True)
        async with aclosing(response):
            with self._reaching():
                if not response.is_success:
                    await response.aread()
                    replies.read(response)
                reader = replies.reader(response)
                async for line in response.aiter_lines():
                    if (update := replies.update(reader, line, response)) is not None:
                        yield update
                        if isinstance(update, Answer):
                            return
        raise ended(self.url)

    async def _send(self, request: httpx.Request, stream: bool = False) -> httpx.Response:
        tried = 0
        while True:
            with self._reaching():
                response = await self._http.send(request, stream=stream)
            wait_s = self._retries.wait_s(response, tried)
            if wait_s is None:
                return response
            await response.aclose()
            await asyncio.sleep(wait_s)
            tried += 1
