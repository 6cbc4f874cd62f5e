"""Readiness that does not lie: a real, tiny inference, or proof that real work has just succeeded."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from saccade.backends import Backend, Ticket
from saccade.errors import BackendUnavailable
from saccade.pipeline import Inputs, Options, Pipeline
from saccade.tasks import TASKS, TaskName

PROBE_PX = 64
PROBE_TIMEOUT_S = 10.0
TRIAL_STEPS = 4
logger = logging.getLogger(__name__)


class Readiness:
    """`check` is None where the model answers, else what is wrong, in words for the caller.

    A result holds `ttl_s`. Within that time a picture that the backend decoded (`prove`) counts as a success: all that
    went before passed the same checks as a probe's. So a full queue neither starves readiness nor is made longer by it,
    and a backend that has stopped moving is found out by the next probe. Concurrent checks share one probe.
    """

    def __init__(self, pipeline: Pipeline, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.pipeline, self.ttl_s, self.clock = pipeline, ttl_s, clock
        self._fault: str | None = None
        self._at = float("-inf")
        self._probe: asyncio.Task[None] | None = None

    def prove(self) -> None:
        self._conclude(None)

    async def check(self) -> str | None:
        if self.clock() - self._at >= self.ttl_s:
            if self._probe is None or self._probe.done():
                self._probe = asyncio.create_task(self._run())
            await asyncio.shield(self._probe)
        return self._fault

    async def aclose(self) -> None:
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.gather(self._probe, return_exceptions=True)

    def _conclude(self, fault: str | None) -> None:
        self._fault, self._at = fault, self.clock()

    async def _run(self) -> None:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                task = next(iter(self.pipeline.card.tasks), None)
                await (probe_graphs(self.pipeline.backend) if task is None else probe(self.pipeline, task))
        except TimeoutError:
            if self.clock() - self._at >= self.ttl_s:  # else real work has succeeded meanwhile
                self._conclude(f"a tiny inference did not finish within {PROBE_TIMEOUT_S:g} s")
        except Exception as error:  # whatever it is, the model does not answer
            logger.error("the readiness probe failed", exc_info=error)
            self._conclude("a tiny inference failed")
        else:
            self._conclude(None)


async def try_out(pipeline: Pipeline) -> None:
    """What a model must pass before it serves: a few steps of every task, from pure noise to nearly none; of a model
    without tasks, each of its graphs.

    Raises ModelError or BackendUnavailable.
    """
    steps = min(TRIAL_STEPS, pipeline.card.noise.timesteps)
    trials = [partial(probe, pipeline, task, steps) for task in pipeline.card.tasks]
    for trial in trials or [partial(probe_graphs, pipeline.backend)]:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                await trial()
        except TimeoutError as error:
            raise BackendUnavailable(f"a tiny inference did not finish within {PROBE_TIMEOUT_S:g} s") from error


async def probe(pipeline: Pipeline, task: TaskName, steps: int = 1) -> None:
    """One member on a small ramp, through the whole pipeline."""
    ramp = np.linspace(0, 255, PROBE_PX * PROBE_PX * 3).reshape(PROBE_PX, PROBE_PX, 3).astype(np.uint8)
    prompt = TASKS[task].prompt
    next_image = ramp if prompt == "next_image" else None
    mask = ramp[..., 0] > 127 if prompt == "mask" else None
    chosen = Options(steps=steps, ensemble_size=1, processing_resolution=PROBE_PX, spacing="trailing")
    await pipeline(Inputs(task, ramp, next_image, mask), chosen.resolve(pipeline.card, task))


async def probe_graphs(backend: Backend) -> None:
    """The three graphs, one after another, on a small blank picture and its blank latent."""
    latent, label = backend.card.latent, np.array([min(backend.card.labels)], np.int64)
    edge = -(-PROBE_PX // latent.multiple) * latent.multiple
    picture = np.zeros((1, 3, edge, edge), np.float32)
    blank = np.zeros((1, latent.channels, edge // latent.stride, edge // latent.stride), np.float32)
    seen = await backend.encode(picture, picture, label, Ticket())
    conditioning = {name: seen[name] for name in backend.card.conditioning}
    await backend.denoise(blank, np.zeros(1, np.int64), label, conditioning, Ticket())
    await backend.decode(blank, Ticket())
