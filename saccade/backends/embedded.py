"""Run a model in this process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self

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


class Embedded(Graphs):
    """Three compiled graphs and one worker thread: calls run one after another, each on all of the engine's threads.

    The event loop stays free meanwhile. A call that is cancelled before its turn never runs.
    `engine`, `precision` and `threads` say what was chosen; the decoder is always fp32, it is tiny.
    `special` has the (H, W) of the model's pictures that `specialise` has made fast.
    """

    def __init__(
        self,
        card: Card,
        engines: Mapping[Part, Engine],
        engine: str,
        precision: str,
        threads: int,
        ratios: Sequence[Size] = (),
    ) -> None:
        super().__init__(card, engines)
        self.engine = engine
        self.precision = precision
        self.threads = threads
        self.special: list[Size] = []
        self._ratios = ratios
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
        ratios: Sequence[Size] = (),
    ) -> Self:
        """Verify the files against the card's digests, compile them, check that they are what the card says.

        `engine`: auto, openvino, onnxruntime. `precision`: auto, fp32, bf16. `threads`: None takes the physical cores.
        `ratios`: of height to width; `specialise` makes pictures of these fast. Raises ModelError.
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
            engines = dict(zip(parts, pool.map(compiled, parts), strict=True))
        return cls(card, engines, engine, precision, threads, ratios)

    async def run(self, part: Part, feeds: Feeds) -> Results:
        try:
            future = asyncio.get_running_loop().run_in_executor(self._worker, self._compute, part, feeds)
        except RuntimeError as error:  # the pool's word for being shut down
            raise BackendUnavailable("the backend is closed") from error
        return await future

    async def specialise(self, batch_size: int) -> None:
        """Compile encoder and denoiser for the tasks' default sizes and the ratios, as many as memory is set aside for.
        Where the engine cannot, all goes on as it was."""
        edges = {task.defaults.processing_resolution for task in self.card.tasks.values()} - {0}
        fits = [Fit.plan(ratio, edge, self.card.latent.multiple) for edge in sorted(edges) for ratio in self._ratios]
        most = SPECIAL_BYTES // (4 * max(1, self.card.parameters))
        for size in list(dict.fromkeys(fit.padded for fit in fits))[:most]:
            try:
                if await asyncio.to_thread(self._specialise, size, batch_size):
                    self.special.append(size)
            except Exception:  # every engine has its own
                log.warning("%s: no graphs of fixed size for %d x %d px", self.card.name, *size[::-1], exc_info=True)
                break
        if self.special:
            told = ", ".join(f"{width} x {height}" for height, width in self.special)
            log.info("%s has graphs of fixed size for %s px", self.card.name, told)

    def _specialise(self, size: Size, batch_size: int) -> bool:
        picture, latent = (1, 3, *size), self.card.latent
        conditioning = self._engines["encoder"].specialise({"image": picture, "prompt": picture, "task": (1,)})
        if not conditioning:
            return False
        cells = (batch_size, latent.channels, size[0] // latent.stride, size[1] // latent.stride)
        seen = {name: (batch_size, *conditioning[name][1:]) for name in self.card.conditioning}
        rows = {"latent": cells, "timestep": (batch_size,), "task": (batch_size,)}
        return bool(self._engines["denoiser"].specialise(rows | seen))

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
