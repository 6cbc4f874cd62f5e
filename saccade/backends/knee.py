"""Before the first caller: every graph is run, timed, and the batch size found past which a row gets no cheaper."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

import numpy as np

from saccade.backends import Array, Backend, Conditioning, Labels, Specialising, Ticket
from saccade.backends.pace import Pace
from saccade.card import Card
from saccade.errors import ModelError

LARGEST_BATCH = 8
WORTHWHILE = 0.15
MEASURING_S = 0.04
WARM_UP_PX = 512


class WarmUp:
    """Runs `backend` at the largest default size of its tasks, and tells `pace` what a batch of each kind takes."""

    def __init__(self, backend: Backend, pace: Pace) -> None:
        self.backend, self.pace = backend, pace
        latent = self.card.latent
        self.edge = -(-(self.card.largest or WARM_UP_PX) // latent.multiple) * latent.multiple
        random = np.random.default_rng(0)
        cells = self.edge // latent.stride
        self.picture: Array = random.uniform(-1, 1, (1, 3, self.edge, self.edge)).astype(np.float32)
        self.noise: Array = random.standard_normal((1, latent.channels, cells, cells), np.float32)
        self.conditioning: Conditioning = {}

    @property
    def card(self) -> Card:
        return self.backend.card

    async def run(self, batch_size: int | None) -> int:
        """The batch size: the one given, or else the knee. Raises ModelError or BackendUnavailable."""
        self.conditioning = await self.backend.encode(self.picture, self.picture, self._labels(1), Ticket())
        size = batch_size or await self._knee()
        if isinstance(self.backend, Specialising):
            await self.backend.specialise(size)
        encode = partial(self.backend.encode, self.picture, self.picture, self._labels(1))
        self.pace.saw("encode", self.edge**2, await _fastest_s(lambda: encode(Ticket())))
        decode = partial(self.backend.decode, self.noise)
        self.pace.saw("decode", self.edge**2, await _fastest_s(lambda: decode(Ticket())))
        self.pace.batch_size = size
        self.pace.saw("denoise", self.edge**2, await self._step_s(size))
        return size

    async def _knee(self) -> int:
        """The batch size past which doubling makes a row less than 15% cheaper."""
        size, step_s = 1, await self._step_s(1)
        while size < LARGEST_BATCH:
            try:
                doubled = await self._step_s(size * 2)
            except ModelError:  # `size` rows have just run: so many are too many for it
                break
            if doubled / 2 > step_s * (1 - WORTHWHILE):
                break
            size, step_s = size * 2, doubled
        return size

    async def _step_s(self, size: int) -> float:
        """Of the fastest step of `size` rows."""
        timestep = np.full(size, self.card.noise.timesteps - 1, np.int64)
        seen = {
            name: np.repeat(value, size, 0)
            for name, value in self.conditioning.items()
            if name in self.card.conditioning
        }
        rows, labels = np.repeat(self.noise, size, 0), self._labels(size)
        return await _fastest_s(lambda: self.backend.denoise(rows, timestep, labels, seen, Ticket()))

    def _labels(self, size: int) -> Labels:
        return np.full(size, min(self.card.labels), np.int64)


async def _fastest_s(run: Callable[[], Awaitable[object]]) -> float:
    """Seconds of the fastest run within `MEASURING_S`, after one that is not counted; of one at least."""
    await run()
    clock = asyncio.get_running_loop().time
    best_s, until = float("inf"), clock() + MEASURING_S
    while best_s == float("inf") or clock() < until:
        began = clock()
        await run()
        best_s = min(best_s, clock() - began)
    return best_s
