"""Run a model in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Self

from saccade.backends.engines import Engine, choose, default_threads, open_engine
from saccade.backends.graphs import Feeds, Graphs, Part, Results, names
from saccade.card import Card
from saccade.errors import BackendUnavailable, ModelError
from saccade.repository import Repository


class Embedded(Graphs):
    """Three compiled graphs and one worker thread: calls run one after another, each on all of the engine's threads.

    The event loop stays free meanwhile. A call that is cancelled before its turn never runs.
    `engine`, `precision` and `threads` say what was chosen; the decoder is always fp32, it is tiny.
    """

    def __init__(self, card: Card, engines: Mapping[Part, Engine], engine: str, precision: str, threads: int) -> None:
        super().__init__(card, engines)
        self.engine = engine
        self.precision = precision
        self.threads = threads
        self._engines = engines
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="saccade-embedded")

    @classmethod
    def load(
        cls,
        repository: Repository,
        model: str | None = None,
        *,
        engine: str = "auto",
        precision: str = "auto",
        threads: int | None = None,
    ) -> Self:
        """Verify the files against the card's digests, compile them, check that they are what the card says.

        `engine`: auto, openvino, onnxruntime. `precision`: auto, fp32, bf16. `threads`: None takes the physical cores.
        Raises ModelError.
        """
        card = repository.card(model or repository.default())
        repository.verify(card)
        engine, precision = choose(engine, precision)
        threads = threads or default_threads()
        parts = names(card)

        def compiled(part: Part) -> Engine:
            own = "fp32" if part == "decoder" else precision
            return open_engine(repository.graph(parts[part]), engine, own, threads)

        with ThreadPoolExecutor(len(parts)) as pool:  # most of a start is compiling
            return cls(card, dict(zip(parts, pool.map(compiled, parts), strict=True)), engine, precision, threads)

    async def run(self, part: Part, feeds: Feeds) -> Results:
        try:
            future = asyncio.get_running_loop().run_in_executor(self._worker, self._compute, part, feeds)
        except RuntimeError as error:  # the pool's word for being shut down
            raise BackendUnavailable("the backend is closed") from error
        return await future

    async def aclose(self) -> None:
        """Let the calls in hand end; later ones are refused."""
        await asyncio.to_thread(self._worker.shutdown)

    def _compute(self, part: Part, feeds: Feeds) -> Results:
        self.check_feeds(part, feeds)
        try:
            results = self._engines[part].run(feeds)
        except Exception as error:  # every engine has its own
            raise ModelError(f"the {part} of {self.card.name} failed to run") from error
        self.check_results(part, feeds, results)
        return results
