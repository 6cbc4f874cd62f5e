"""A backend in front of a real Triton for tests that each run an event loop of their own."""

from __future__ import annotations

import asyncio
from weakref import WeakKeyDictionary

from saccade.backends import Array, Conditioning, Labels, Ticket
from saccade.backends.triton import Triton
from saccade.card import Card
from saccade.repository import Repository
from tests.triton.server import TritonServer


class BehindTriton:
    """Connects once in every loop, and closes when that loop ends."""

    def __init__(self, server: TritonServer) -> None:
        self.server = server
        repository = Repository(server.repository)
        self.card: Card = repository.card(repository.default())
        self._keepers: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Task[None]] = WeakKeyDictionary()
        self._connected: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Future[Triton]] = WeakKeyDictionary()

    async def encode(self, image: Array, prompt: Array, task: Labels, ticket: Ticket) -> Conditioning:
        return await (await self._inner()).encode(image, prompt, task, ticket)

    async def denoise(
        self, latent: Array, timestep: Labels, task: Labels, conditioning: Conditioning, ticket: Ticket
    ) -> Array:
        return await (await self._inner()).denoise(latent, timestep, task, conditioning, ticket)

    async def decode(self, latent: Array, ticket: Ticket) -> Array:
        return await (await self._inner()).decode(latent, ticket)

    async def aclose(self) -> None:
        return None

    async def _inner(self) -> Triton:
        loop = asyncio.get_running_loop()
        if loop not in self._keepers:
            self._connected[loop] = loop.create_future()
            self._keepers[loop] = loop.create_task(self._keep(self._connected[loop]))
        return await asyncio.shield(self._connected[loop])

    async def _keep(self, connected: asyncio.Future[Triton]) -> None:
        """Cancelled, as every task is, when the loop ends."""
        triton = await Triton.connect([self.server.url])
        try:
            connected.set_result(triton)
            await asyncio.Event().wait()
        finally:
            await triton.aclose()
