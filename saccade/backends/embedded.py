"""Run a model in this process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from saccade.backends import Ticket
from saccade.backends.engines import Engine, choose, default_threads, open_engine
from saccade.backends.graphs import Feeds, Graphs, Part, Results, names
from saccade.card import Card
from saccade.errors import BackendUnavailable, ModelError
from saccade.fit import Fit
from saccade.repository import Repository

log = logging.getLogger(__name__)
Size = tuple[int, int]
SPECIAL_BYTES = 2**29
"""Of weights that are held once more, for the sizes that come most."""
SMALL_BYTES = 2**27
"""Of weights, in models whose steps do not keep many threads busy."""
THREADS_OF_A_STREAM = 4
Engines = Mapping[Part, Engine]


class Embedded(Graphs):
    """Three compiled graphs and a worker thread for each stream: `streams` calls run at once, each on its share of the
    engine's threads. Small steps gain little from many threads, so that more of them are done in a second.

    A call whose ticket says that it is `alone` runs on all threads instead, in graphs compiled once more for that.

    The event loop stays free meanwhile. A call that is cancelled before its turn never runs. `engine`, `precision`,
    `threads` and `streams` say what was chosen; the decoder is always fp32, it is tiny. `special` has the (H, W) of the
    model's pictures that `specialise` has made fast.
    """

    def __init__(
        self,
        card: Card,
        engines: Engines,
        alone: Engines,
        engine: str,
        precision: str,
        threads: int,
        streams: int,
        ratios: Sequence[Size] = (),
    ) -> None:
        super().__init__(card, engines)
        self.engine = engine
        self.precision = precision
        self.threads = threads
        self.streams = streams
        self.special: list[Size] = []
        self._ratios = ratios
        self._engines = engines
        self._alone = alone
        self._in_hand: set[Future[Results]] = set()
        self._workers = ThreadPoolExecutor(streams, thread_name_prefix="saccade-embedded")

    @classmethod
    def load(
        cls,
        repository: Repository,
        model: str | None = None,
        *,
        engine: str = "auto",
        precision: str = "auto",
        threads: int | None = None,
        streams: int | None = None,
        ratios: Sequence[Size] = (),
    ) -> Self:
        """Verify the files against the card's digests, compile them, check that they are what the card says.

        `engine`: auto, openvino, onnxruntime. `precision`: auto, fp32, bf16. `threads`: None takes the physical cores.
        `streams`: calls that run at once; None: as `default_streams` has it. `ratios`: of height to width; `specialise`
        makes pictures of these fast. Raises ModelError.
        """
        card = repository.card(model or repository.default())
        repository.verify(card)
        engine, precision = choose(engine, precision)
        threads = threads or default_threads()
        streams = streams or default_streams(engine, threads, card.parameters)
        if streams > threads:
            raise ModelError(f"{streams} streams cannot share {threads} threads: ask for fewer, or for more threads")
        if streams > 1 and engine != "openvino":
            raise ModelError(f"the engine {engine} runs one batch at a time: ask for one stream, or for openvino")
        parts = names(card)

        def compiled(part: Part, streams: int) -> Engine:
            own = "fp32" if part == "decoder" else precision
            return open_engine(repository.graph(parts[part]), engine, own, threads, streams)

        with ThreadPoolExecutor(2 * len(parts)) as pool:  # most of a start is compiling
            shared = {part: pool.submit(compiled, part, streams) for part in parts}
            alone = {part: pool.submit(compiled, part, 1) for part in parts if streams > 1}
        shares = _results(shared)
        return cls(card, shares, _results(alone) or shares, engine, precision, threads, streams, ratios)

    async def run(self, part: Part, feeds: Feeds, ticket: Ticket) -> Results:
        # One that was called off may still run: then nothing is alone, whatever the caller thinks.
        engines = self._alone if ticket.alone and not self._in_hand else self._engines
        try:
            call = self._workers.submit(self._compute, engines, part, feeds)
        except RuntimeError as error:  # the pool's word for being shut down
            raise BackendUnavailable("the backend is closed") from error
        self._in_hand.add(call)
        call.add_done_callback(self._in_hand.discard)
        return await asyncio.wrap_future(call)

    async def specialise(self, batch_size: int) -> Sequence[Size]:
        """Compile encoder and denoiser for the tasks' default sizes and the ratios, as many as memory is set aside for.
        Where the engine cannot, all goes on as it was. All sizes that were tried."""
        edges = {task.defaults.processing_resolution for task in self.card.tasks.values()} - {0}
        fits = [Fit.plan(ratio, edge, self.card.latent.multiple) for edge in sorted(edges) for ratio in self._ratios]
        copies = min(self.streams, 2)
        most = SPECIAL_BYTES // (4 * max(1, self.card.parameters) * copies)
        tried = []
        for size in list(dict.fromkeys(fit.padded for fit in fits))[:most]:
            tried.append(size)
            try:
                if await asyncio.to_thread(self._specialise, size, batch_size):
                    self.special.append(size)
            except Exception:  # every engine has its own
                log.warning("%s: no graphs of fixed size for %d x %d px", self.card.name, *size[::-1], exc_info=True)
                break
        if self.special:
            told = ", ".join(f"{width} x {height}" for height, width in self.special)
            log.info("%s has graphs of fixed size for %s px", self.card.name, told)
        return tried

    def _specialise(self, size: Size, batch_size: int) -> bool:
        picture, latent = (1, 3, *size), self.card.latent
        cells = (batch_size, latent.channels, size[0] // latent.stride, size[1] // latent.stride)
        for engines in (self._engines, self._alone)[: min(self.streams, 2)]:
            conditioning = engines["encoder"].specialise({"image": picture, "prompt": picture, "task": (1,)})
            if not conditioning:
                return False
            seen = {name: (batch_size, *conditioning[name][1:]) for name in self.card.conditioning}
            rows = {"latent": cells, "timestep": (batch_size,), "task": (batch_size,)}
            if not engines["denoiser"].specialise(rows | seen):
                return False
        return True

    async def aclose(self) -> None:
        """Let the calls in hand end; later ones are refused."""
        await asyncio.to_thread(self._workers.shutdown)

    def _compute(self, engines: Engines, part: Part, feeds: Feeds) -> Results:
        self.check_feeds(part, feeds)
        try:
            results = engines[part].run(feeds)
        except Exception as error:  # every engine has its own
            raise ModelError(f"the {part} of {self.card.name} failed to run") from error
        self.check_results(part, feeds, results)
        return results


def default_streams(engine: str, threads: int, parameters: int) -> int:
    """Calls that run at once where nobody says: of small models one for four threads, with OpenVINO."""
    if engine != "openvino" or 4 * parameters > SMALL_BYTES:
        return 1
    return max(1, threads // THREADS_OF_A_STREAM)


def _results(made: Mapping[Part, Future[Engine]]) -> dict[Part, Engine]:
    return {part: future.result() for part, future in made.items()}
