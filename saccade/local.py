"""Ask in this process: the same methods as `saccade.client.Client`, without a server.

    with Local() as local:
        answer = local.depth("photo.jpg", steps=10, ensemble_size=5)

What goes wrong is one of `saccade.errors`.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from saccade import sequence
from saccade.backends.embedded import Embedded
from saccade.backends.stepping import Stepping
from saccade.calls import MAX_PIXELS, Choices, Frames, ImageLike, Known, points, to_bytes
from saccade.card import Card
from saccade.errors import BackendUnavailable, InvalidInput
from saccade.formats import read_mask, read_picture
from saccade.formats.video import Bounds, read_video
from saccade.metres import Points
from saccade.pipeline import Answer, Inputs, Options, Picture, Pipeline, Resolved
from saccade.planner import Planner, Shape
from saccade.repository import Repository, find_repository
from saccade.sequence import Seen
from saccade.tasks import TaskName

# People's own videos: as long as memory lasts.
BOUNDS = Bounds(frames=10_000, frame_pixels=MAX_PIXELS, clip_pixels=2_000_000_000, seconds=600)
T = TypeVar("T")


class Local:
    """One model, loaded once, for as many threads as ask: their steps share batches on one event loop of its own.

    `repository` and `model`: as `saccade.repository` finds them when left out. `engine`, `precision`, `threads`: as for
    `Embedded.load`; `streams`: so many of their batches run at once, which loads slower and takes more memory;
    `batch_size`: as for `Stepping`, measured when left out. Raises ModelError for a repository that
    is not in order, InvalidInput for pictures and options that cannot be used.
    """

    def __init__(
        self,
        repository: Path | str | None = None,
        model: str | None = None,
        *,
        engine: str = "auto",
        precision: str = "auto",
        threads: int | None = None,
        streams: int = 1,
        batch_size: int | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        path = find_repository(None if repository is None else Path(repository))
        embedded = Embedded.load(
            Repository(path), model, engine=engine, precision=precision, threads=threads, streams=streams
        )
        self._max_pixels = max_pixels
        self._backend = Stepping(embedded, batch_size=batch_size, concurrency=embedded.streams)
        self._pipeline = Pipeline(self._backend)
        self._planner = Planner()
        self._closed = False
        self._door = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="saccade-local", daemon=True)
        self._thread.start()
        try:
            self._run(self._backend.start())
        except BaseException:
            self.close()
            raise

    def depth(self, image: ImageLike, *, known_depths: Known | None = None, **choices: Unpack[Choices]) -> Answer:
        """How far everything is: prediction [H, W] float32, 0 nearest, 1 farthest; or metres, by `known_depths`."""
        return self._ask("depth", choices, image, known=points(known_depths))

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
        """As `Client.depths`."""
        read, fps = self._frames(frames, frames_stride, frames_limit)
        steadily = fps is not None if steady is None else steady
        return self._ask_all("depth", read, choices, fps, steadily, points(known_depths))

    def flows(
        self,
        frames: Frames,
        *,
        frames_stride: int | None = None,
        frames_limit: int | None = None,
        **choices: Unpack[Choices],
    ) -> Seen:
        """As `Client.flows`."""
        read, fps = self._frames(frames, frames_stride, frames_limit)
        return self._ask_all("flow", read, choices, fps)

    def flow(self, image: ImageLike, next_image: ImageLike, **choices: Unpack[Choices]) -> Answer:
        """Where everything moved: prediction [H, W, 2] float32 in pixels, u right and v down."""
        return self._ask("flow", choices, image, next_image=next_image)

    def amodal(self, image: ImageLike, mask: ImageLike, **choices: Unpack[Choices]) -> Answer:
        """The whole of the object whose visible part is `mask`: prediction [H, W] bool."""
        return self._ask("amodal", choices, image, mask=mask)

    def models(self) -> list[Card]:
        """The card of the model that is loaded."""
        return [self._pipeline.card]

    def close(self) -> None:
        """Let the model go; what still waits is withdrawn, and whoever asked is told. May be called twice."""
        with self._door:
            if self._closed:
                return
            self._closed = True
            ended = asyncio.run_coroutine_threadsafe(self._end(), self._loop)
        ended.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(
        self,
        task: TaskName,
        choices: Choices,
        image: ImageLike,
        next_image: ImageLike | None = None,
        mask: ImageLike | None = None,
        known: Points | None = None,
    ) -> Answer:
        began = time.perf_counter()
        wanted = Options(**choices)
        wanted.resolve(self._pipeline.card, task)  # what cannot be done is said before anything is read
        limit = self._max_pixels
        inputs = Inputs(
            task,
            read_picture(to_bytes(image, "image"), max_pixels=limit),
            None
            if next_image is None
            else read_picture(to_bytes(next_image, "next_image"), max_pixels=limit, param="next_image"),
            None if mask is None else read_mask(to_bytes(mask, "mask"), max_pixels=limit),
        )
        (answer,) = self._run(self._seen([inputs], wanted, began, known=known))
        painted = answer.completed  # now: what it is made of is larger
        total_ms = (time.perf_counter() - began) * 1e3
        return replace(answer, painting=painted, timings_ms={**answer.timings_ms, "total": total_ms})

    def _ask_all(
        self,
        task: TaskName,
        frames: Sequence[Picture],
        choices: Choices,
        fps: float | None,
        steadily: bool = False,
        known: Points | None = None,
    ) -> Seen:
        began = time.perf_counter()
        wanted = Options(**choices)
        wanted.resolve(self._pipeline.card, task)
        asked = sequence.questions(task, frames)
        return self._run(self._seen(asked, wanted, began, steadily=steadily, known=known, fps=fps))

    async def _seen(
        self,
        asked: Sequence[Inputs],
        wanted: Options,
        began: float,
        *,
        steadily: bool = False,
        known: Points | None = None,
        fps: float | None = None,
    ) -> Seen:
        """On the loop, where it is known what else there is to do."""
        pipeline, task = self._pipeline, asked[0].task
        options = wanted.resolve(pipeline.card, task)
        shapes = await asyncio.to_thread(lambda: [self._shape(inputs, options) for inputs in asked])
        arrived = asyncio.get_running_loop().time() - (time.perf_counter() - began)
        chosen, spend = self._planner.spend(
            self._backend, pipeline.card, task, wanted, options, shapes, steadily=steadily, arrived=arrived
        )
        ticket = self._planner.ticket(pipeline.card, task, chosen, spend, shapes)
        with self._backend.place(ticket):
            seen = await sequence.ask(
                pipeline, asked, chosen, steadily=steadily, known=known, fps=fps, ticket=ticket, spend=spend
            )
        for answer, shape in zip(seen, shapes, strict=True):
            self._planner.learn(answer, shape)
        if spend is not None and wanted.budget_ms is not None and (plan := seen[0].plan) is not None:
            self._planner.cut(spend, plan, time.perf_counter() - began - wanted.budget_ms / 1e3)
        return seen

    def _shape(self, inputs: Inputs, options: Resolved) -> Shape:
        height, width = self._pipeline.fit(inputs, options).padded
        return Shape(height * width, inputs.image.shape[0] * inputs.image.shape[1])

    def _frames(self, frames: Frames, stride: int | None, limit: int | None) -> tuple[Sequence[Picture], float | None]:
        """The pictures, and how many make a second where they are a video's."""
        if isinstance(frames, str | os.PathLike | bytes):
            clip = read_video(to_bytes(frames, "video"), bounds=BOUNDS, stride=stride or 1, limit=limit)
            return list(clip.frames), clip.fps
        if not len(frames):
            raise InvalidInput("there are no frames", param="image")
        return [read_picture(to_bytes(image, "image"), max_pixels=self._max_pixels) for image in frames], None

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Await on the loop's thread; leaving early (Ctrl-C) withdraws the work."""
        with self._door:
            if self._closed:
                coroutine.close()
                raise BackendUnavailable("this Local has been closed")
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()

    async def _end(self) -> None:
        """Close the backend, then see every request off: refused, or with its answer. Later ones find the door shut."""
        await self._backend.aclose()
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)
