"""Ask in this process: the same methods as `saccade.client.Client`, without a server.

    with Local() as local:
        answer = local.depth("photo.jpg", steps=10, ensemble_size=5)

What goes wrong is one of `saccade.errors`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from saccade.backends.embedded import Embedded
from saccade.backends.stepping import Stepping
from saccade.calls import MAX_PIXELS, Choices, ImageLike, to_bytes
from saccade.card import Card
from saccade.errors import BackendUnavailable
from saccade.formats import read_mask, read_picture
from saccade.pipeline import Answer, Inputs, Options, Pipeline
from saccade.repository import Repository, find_repository
from saccade.tasks import TaskName

T = TypeVar("T")


class Local:
    """One model, loaded once, for as many threads as ask: their steps share batches on one event loop of its own.

    `repository` and `model`: as `saccade.repository` finds them when left out. `engine`, `precision`, `threads`: as for
    `Embedded.load`; `batch_size`: as for `Stepping`, measured when left out. Raises ModelError for a repository that
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
        batch_size: int | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        path = find_repository(None if repository is None else Path(repository))
        embedded = Embedded.load(Repository(path), model, engine=engine, precision=precision, threads=threads)
        self._max_pixels = max_pixels
        self._backend = Stepping(embedded, batch_size=batch_size)
        self._pipeline = Pipeline(self._backend)
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

    def depth(self, image: ImageLike, **choices: Unpack[Choices]) -> Answer:
        """How far everything is: prediction [H, W] float32, 0 nearest, 1 farthest."""
        return self._ask("depth", choices, image)

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
    ) -> Answer:
        began = time.perf_counter()
        options = Options(**choices).resolve(self._pipeline.card, task)
        limit = self._max_pixels
        inputs = Inputs(
            task,
            read_picture(to_bytes(image, "image"), max_pixels=limit),
            None
            if next_image is None
            else read_picture(to_bytes(next_image, "next_image"), max_pixels=limit, param="next_image"),
            None if mask is None else read_mask(to_bytes(mask, "mask"), max_pixels=limit),
        )
        answer = self._run(self._pipeline(inputs, options))
        total_ms = (time.perf_counter() - began) * 1e3
        return replace(answer, timings_ms={**answer.timings_ms, "total": total_ms})

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
