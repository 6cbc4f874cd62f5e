"""Before the first caller: every graph is run, timed, and the batch size found past which a row gets no cheaper."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import numpy as np

from saccade.backends import Array, Backend, Conditioning, Labels, Specialising, Ticket
from saccade.backends.pace import Pace
from saccade.card import Card
from saccade.errors import ModelError

log = logging.getLogger(__name__)

LARGEST_BATCH = 8
WORTHWHILE = 0.15
MEASURING_S = 0.04
WARM_UP_PX = 512


class Trial:
    """One picture of a size (H, W) through `backend`: whatever it holds is noise."""

    def __init__(self, backend: Backend, size: tuple[int, int]) -> None:
        self.backend = backend
        latent, random = backend.card.latent, np.random.default_rng(0)
        cells = [edge // latent.stride for edge in size]
        self.picture: Array = random.uniform(-1, 1, (1, 3, *size)).astype(np.float32)
        self.noise: Array = random.standard_normal((1, latent.channels, *cells), np.float32)
        self.conditioning: Conditioning = {}

    @property
    def labels(self) -> list[int]:
        """Those that pictures are encoded with: the first of every task."""
        card = self.backend.card
        return sorted({task.label for task in card.tasks.values()}) or [min(card.labels)]

    async def encode(self, label: int, ticket: Ticket) -> Conditioning:
        """Before any step."""
        task = np.full(1, label, np.int64)
        self.conditioning = await self.backend.encode(self.picture, self.picture, task, ticket)
        return self.conditioning

    async def step(self, rows: int, ticket: Ticket) -> Array:
        wanted, timestep = self.backend.card.conditioning, self.backend.card.noise.timesteps - 1
        seen = {name: np.repeat(value, rows, 0) for name, value in self.conditioning.items() if name in wanted}
        noise, timesteps = np.repeat(self.noise, rows, 0), np.full(rows, timestep, np.int64)
        return await self.backend.denoise(noise, timesteps, self._labels(rows), seen, ticket)

    async def decode(self, ticket: Ticket) -> Array:
        return await self.backend.decode(self.noise, ticket)

    def _labels(self, rows: int) -> Labels:
        return np.full(rows, min(self.backend.card.labels), np.int64)

    async def bytes(self, rows: int, ticket: Ticket) -> list[bytes]:
        """Of all that comes out."""
        found = [value for label in self.labels for value in (await self.encode(label, ticket)).values()]
        found += [await self.step(rows, ticket), await self.decode(ticket)]
        return [value.tobytes() for value in found]


class WarmUp:
    """Runs `backend` at the largest default size of its tasks, and tells `pace` what a batch of each kind takes, of
    encodings for every task: no first caller pays for a part of the encoder that never ran.

    `alike`: whether batches that are told that they are alone give the same bytes as others, at every size tried.
    """

    def __init__(self, backend: Backend, pace: Pace) -> None:
        self.backend, self.pace = backend, pace
        self.alike = False
        multiple = self.card.latent.multiple
        self.edge = -(-(self.card.largest or WARM_UP_PX) // multiple) * multiple
        self.trial = Trial(backend, (self.edge, self.edge))

    @property
    def card(self) -> Card:
        return self.backend.card

    async def run(self, batch_size: int | None) -> int:
        """The batch size: the one given, or else the knee. Raises ModelError or BackendUnavailable."""
        await self.trial.encode(self.trial.labels[0], Ticket())
        size = batch_size or await self._knee()
        self.pace.batch_size = size
        if isinstance(self.backend, Specialising):
            special = await self.backend.specialise(size)
            self.alike = self.pace.concurrency > 1 and await self._same_bytes(size, special)
        for alone in (False, True) if self.pace.concurrency > 1 else (False,):
            await self._time(size, alone)
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

    async def _step_s(self, rows: int) -> float:
        """Of the fastest step of so many rows."""
        return await _fastest_s(partial(self.trial.step, rows, Ticket()))

    async def _time(self, size: int, alone: bool) -> None:
        """What a batch of each kind takes, alone or in the company of as many as run at once."""
        pixels, ticket = self.edge**2, Ticket(alone=alone)
        together = 1 if alone else self.pace.concurrency

        async def company(run: Callable[[Ticket], Awaitable[object]]) -> None:
            await asyncio.gather(*(run(ticket) for _ in range(together)))

        step = partial(self.trial.step, size)
        for label in self.trial.labels:
            encode = partial(self.trial.encode, label)
            self.pace.saw("encode", pixels, await _fastest_s(partial(company, encode)), alone, label)
        self.pace.saw("decode", pixels, await _fastest_s(partial(company, self.trial.decode)), alone)
        self.pace.saw("denoise", pixels, await _fastest_s(partial(company, step)), alone)

    async def _same_bytes(self, size: int, special: Sequence[tuple[int, int]]) -> bool:
        half, quarter = (self._multiple_of(self.edge // part) for part in (2, 4))
        for height_width in ((self.edge, self.edge), (half, self.edge), (quarter, quarter), *special):
            if not await self._same_at(height_width, size):
                log.warning("%s: other bytes alone than in company; nothing is told that it is alone", self.card.name)
                return False
        return True

    async def _same_at(self, height_width: tuple[int, int], size: int) -> bool:
        trials = [Trial(self.backend, height_width) for _ in range(self.pace.concurrency)]
        try:
            first, *others = await asyncio.gather(*(trial.bytes(size, Ticket()) for trial in trials))
        except ModelError:  # not every model takes every size
            return True
        try:
            return all(found == first for found in [*others, await trials[0].bytes(size, Ticket(alone=True))])
        except ModelError:
            return False

    def _multiple_of(self, edge: int) -> int:
        multiple = self.card.latent.multiple
        return max(1, edge // multiple) * multiple


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
